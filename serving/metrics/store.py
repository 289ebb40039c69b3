"""One worker's counts, and the snapshot of them that the others read."""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from pydantic import TypeAdapter

from serving.metrics.definitions import (
    COUNTERS,
    GREATEST,
    HISTOGRAMS,
    LEAST,
    SUMMED,
    VERSIONED,
    Exemplar,
    Key,
    Labels,
    Sizes,
    Version,
)

log = logging.getLogger("serving.metrics")

MOST_SIZES = 512
"""Sizes of batches that are counted apart for one version: as many as batches have by default. The first ones stay."""


class Snapshot(NamedTuple):
    """A store as a worker writes it for the others; of each table the name, the labels and the value of each series.

    live: counters that the worker has in memory which its parent reads too, and adds to the others once it has ended.
    """

    counters: tuple[tuple[str, Labels, float], ...] = ()
    histograms: tuple[tuple[str, Labels, list[float]], ...] = ()
    gauges: tuple[tuple[str, Labels, float], ...] = ()
    sizes: tuple[tuple[Version, list[tuple[int, float, float]]], ...] = ()
    live: tuple[tuple[str, Labels, float], ...] = ()
    exemplars: tuple[tuple[str, Labels, dict[int, Exemplar]], ...] = ()


_SNAPSHOT = TypeAdapter(Snapshot)


class Store:
    """Counters, histograms and gauges of one worker, as they go into its snapshot."""

    def __init__(self) -> None:
        self.counters: dict[Key, float] = defaultdict(float)
        self.histograms: dict[Key, list[float]] = {}
        """For each: a count a bucket, one beyond the last, and the sum."""
        self.exemplars: dict[Key, dict[int, Exemplar]] = {}
        """For histograms, by bucket: the last prediction there of which a trace is known."""
        self.gauges: dict[Key, float] = {}
        self.sizes: dict[Version, Sizes] = {}
        """What batches of each size did; no metric, for each size would be a series."""

    def observe(self, name: str, labels: Labels, values: list[int] | list[float]) -> None:
        """Count values into a histogram."""
        if not values:
            return
        bounds = HISTOGRAMS[name][2]
        cells = self.histograms.setdefault((name, labels), [0.0] * (len(bounds) + 2))
        places = np.searchsorted(bounds, values)
        for index, number in enumerate(np.bincount(places, minlength=len(bounds) + 1).tolist()):
            cells[index] += number
        cells[-1] += math.fsum(values)

    def exemplify(self, name: str, labels: Labels, value: float, trace: str) -> None:
        """Note the trace of one value that was observed."""
        bucket = bisect_left(HISTOGRAMS[name][2], value)
        self.exemplars.setdefault((name, labels), {})[bucket] = trace, value, time.time()

    def ran(self, version: Version, rows: list[int], seconds: list[float]) -> None:
        """Count batches by their sizes."""
        if rows:
            sizes, places, numbers = np.unique(rows, return_inverse=True, return_counts=True)
            spent = np.bincount(places, seconds)
            self._ran(version, zip(sizes.tolist(), numbers.tolist(), spent.tolist(), strict=True))

    def _ran(self, version: Version, cells: Iterable[tuple[int, float, float]]) -> None:
        mine = self.sizes.setdefault(version, {})
        for size, number, seconds in cells:
            if size in mine or len(mine) < MOST_SIZES:
                before = mine.get(size, (0.0, 0.0))
                mine[size] = before[0] + number, before[1] + seconds

    def versions(self) -> list[Version]:
        """Return the versions, by name and version, of which something was counted, the first that was first."""
        found = (
            (of[0], of[1]) for table in (self.counters, self.histograms) for name, of in table if name in VERSIONED
        )
        return list(dict.fromkeys(found))

    def forget(self, version: Version) -> None:
        """Drop all that was counted of a version."""
        for table in (self.counters, self.histograms, self.gauges, self.exemplars):
            for key in [key for key in table if key[0] in VERSIONED and key[1][:2] == version]:
                del table[key]
        self.sizes.pop(version, None)

    def dump(self, live: dict[Key, float] | None = None) -> bytes:
        """Write it as JSON; live: see `Snapshot`."""

        def rows(table: dict[Key, Any]) -> list[Any]:
            return [[name, labels, value] for (name, labels), value in table.items()]

        sizes = [[of, [[size, *did] for size, did in mine.items()]] for of, mine in self.sizes.items()]
        tables = [rows(table) for table in (self.counters, self.histograms, self.gauges)]
        fields = [*tables, sizes, rows(live or {}), rows(self.exemplars)]
        return orjson.dumps(fields, option=orjson.OPT_NON_STR_KEYS)

    def add(self, snapshot: Snapshot) -> None:
        """Add what a snapshot holds, but series that are not known here: another release wrote it."""
        for name, labels, value in (*snapshot.counters, *snapshot.live):
            if name in COUNTERS:
                self.counters[name, labels] += value
        for name, labels, cells in snapshot.histograms:
            if name in HISTOGRAMS and len(cells) == len(HISTOGRAMS[name][2]) + 2:
                mine = self.histograms.setdefault((name, labels), [0.0] * len(cells))
                for index, cell in enumerate(cells):
                    mine[index] += cell
        for name, labels, buckets in snapshot.exemplars:
            known = self.exemplars.setdefault((name, labels), {})
            known.update({at: one for at, one in buckets.items() if at not in known or known[at][-1] < one[-1]})
        for version, batch in snapshot.sizes:
            self._ran(version, batch)
        for name, labels, value in snapshot.gauges:
            before = self.gauges.get((name, labels))
            if name in SUMMED:
                self.gauges[name, labels] = value + (before or 0.0)
            elif name in LEAST or name in GREATEST:
                worse = min if name in LEAST else max
                self.gauges[name, labels] = value if before is None else worse(value, before)


def read_snapshot(text: bytes) -> Snapshot:
    """Read what `Store.dump` wrote. Raises ValueError."""
    return _SNAPSHOT.validate_json(text)


def read_snapshots(files: Iterable[Path]) -> Iterator[Snapshot]:
    """Read workers' snapshots; one that can't be read is left out, and the log says so."""
    for file in files:
        try:
            yield read_snapshot(file.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            log.error("%s can't be read and is left out", file.name)
