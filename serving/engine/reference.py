"""How the values that a model takes and answers were distributed, for later ones to be compared with.

The exporter describes training rows so, and a server the first rows of a model that says nothing of itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from serving.engine.signature import Feature, Reference, Signature
from serving.tensors import Array, Tensors

BINS = 10
ROWS_A_BIN = 10
"""Of the reference: with fewer, a bin's own share is guesswork."""
MOST_CATEGORIES = 100
MOST_COLUMNS = 20
"""Columns of one output that are followed."""


class Column(NamedTuple):
    """One value of each row: where it lies among a model's inputs or outputs. part: of a row of it; None takes all."""

    name: str
    of: str
    """`input` or `output`."""
    position: int
    part: int | None
    categorical: bool

    def values(self, tensors: Tensors | Mapping[int, Array]) -> Array:
        """Return the column of these inputs, or outputs: one value a row."""
        tensor = tensors[self.position]
        return tensor[:, self.part] if self.part is not None else tensor.reshape(len(tensor))


def columns_of(signature: Signature) -> list[Column]:
    """Return what can be followed: scalar features, labels, scores and predictions; nothing where there are no rows."""
    if signature.batch == "none":
        return []
    found = []
    for at, feature in enumerate(signature.features):
        if signature.layout == "matrix":
            found.append(Column(feature.name, "input", 0, at, categorical=_categorical(feature)))
        elif not feature.shape:
            found.append(Column(feature.name, "input", at, None, categorical=_categorical(feature)))
    return found + list(_outputs(signature))


def _categorical(feature: Feature) -> bool:
    return feature.datatype in ("BYTES", "BOOL") or feature.categories is not None


def _outputs(signature: Signature) -> Iterator[Column]:
    for position, spec in enumerate(signature.outputs):
        width = spec.shape[1] if len(spec.shape) == 2 else 1
        if len(spec.shape) not in (1, 2) or width < 1:
            continue
        categorical = spec.name == signature.label or spec.datatype in ("BYTES", "BOOL")
        if width == 1:
            yield Column(f"output {spec.name}", "output", position, None, categorical=categorical)
        elif not categorical:
            names = signature.classes if spec.name == signature.scores else None
            # Of two scores one says it all.
            for index in range(1 if names and width == 2 else 0, min(width, MOST_COLUMNS)):
                name = names[index] if names and len(names) == width else index
                yield Column(f"output {spec.name}: {name}", "output", position, index, categorical=False)


def reference_of(column: Column, values: Array, categories: Sequence[Any] | None = None) -> Reference | None:
    """Describe values, one a row; None where they say nothing: texts that hardly occur twice, or no numbers at all.

    categories: those that are told apart; else those that occur. A missing number is NaN, a missing text is empty.
    """
    if not column.categorical:
        return _numbers(column.name, values.astype(np.float64))
    seen = Counter(values.tolist())
    missing = seen.pop("", 0)
    total = sum(seen.values())
    if categories is None:
        if not total or len(seen) > min(MOST_CATEGORIES, total / 2):
            return None
        categories = sorted(seen)
    counts = tuple(seen[value] for value in categories)
    return Reference(
        name=column.name, categories=tuple(categories), counts=counts, other=total - sum(counts), missing=missing
    )


def _numbers(name: str, values: Array) -> Reference | None:
    missing = int(np.isnan(values).sum())
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    distinct, times = np.unique(values, return_counts=True)
    bins = max(1, min(BINS, len(values) // ROWS_A_BIN))
    # Bins of as many rows each; cut between two values, so that rounding moves none of them to another bin.
    ends = np.searchsorted(np.cumsum(times), np.arange(1, bins) / bins * len(values))
    ends = np.unique(ends[ends < len(distinct) - 1])
    edges = np.concatenate([distinct[:1], distinct[ends] / 2 + distinct[ends + 1] / 2, distinct[-1:]])
    counts, _ = np.histogram(values, edges)
    return Reference(name=name, edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), missing=missing)


def scalar_scores(signature: Signature) -> Callable[[Tensors], Callable[[Tensors], Array]] | None:
    """Return what picks the one number by which a row is judged; None where there is none.

    It takes a row's own outputs, and gives what takes outputs of others to float64 [rows]: their score of that row's
    class; without scores, whether they have its label; else the number that is answered.
    """
    names = [spec.name for spec in signature.outputs]
    if signature.scores is not None:
        at = names.index(signature.scores)

        def by_score(own: Tensors) -> Callable[[Tensors], Array]:
            best = int(own[at][0].argmax())
            return lambda outputs: outputs[at][:, best].astype(np.float64)

        return by_score if len(signature.outputs[at].shape) == 2 else None
    if signature.label is not None:
        label = names.index(signature.label)
        return lambda own: lambda outputs: (outputs[label].ravel() == own[label].ravel()[0]).astype(np.float64)
    spec = signature.outputs[0]
    if len(names) == 1 and spec.datatype not in ("BYTES", "BOOL") and spec.shape[1:] in ((), (1,)):
        return lambda _: lambda outputs: outputs[0].ravel().astype(np.float64)
    return None
