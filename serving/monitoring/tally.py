"""Counts values against a reference: vectors that add up over batches, workers and time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from serving.engine.reference import Column
from serving.engine.signature import Reference
from serving.tensors import Array

OTHER, ABOVE, MISSING = -3, -2, -1
"""Places in a vector of counts, behind those of bins or categories: values of other categories, or below the first bin;
above the last bin; missing."""


class Tally:
    """Counts one column's values. `size`: of its vector."""

    def __init__(self, column: Column, reference: Reference) -> None:
        self.column = column
        self.reference = reference
        self.size = len(reference.counts) + 3
        self.counts: Array = np.array([*reference.counts, reference.other, 0, reference.missing], np.int64)
        """Of the reference."""
        if reference.edges is not None:
            # The last bin has its upper edge.
            self._cuts = np.array([*reference.edges[:-1], np.nextafter(reference.edges[-1], np.inf)])
        self._places: dict[Any, int] = {value: i for i, value in enumerate(reference.categories or ())}

    def of(self, values: Array) -> Array:
        """Count values, one a row."""
        counts = np.zeros(self.size, np.int64)
        if self.reference.edges is None:
            for value, number in Counter(values.tolist()).items():
                missing = value == "" and value not in self._places
                counts[self._places.get(value, MISSING if missing else OTHER)] += number
            return counts
        numbers = values.astype(np.float64)
        # NaN goes to the end, as what is above.
        places = np.bincount(np.searchsorted(self._cuts, numbers, side="right"), minlength=self.size - 1)
        missing = int(np.isnan(numbers).sum())
        counts[:OTHER] = places[1:-1]
        counts[OTHER], counts[ABOVE], counts[MISSING] = places[0], places[-1] - missing, missing
        return counts
