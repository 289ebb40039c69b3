"""One worker's counts, and the snapshot of them that the others read."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from serving.metrics.definitions import (
    COUNTERS,
    GAUGES,
    GREATEST,
    HISTOGRAMS,
    LEAST,
    VERSIONED,
    Key,
    Labels,
    Sizes,
    Version,
)

log = logging.getLogger("serving.metrics")


MOST_SIZES = 512
"""Sizes of batches that are told apart of one version: as many as batches have by default. The first ones stay."""


class Store:
    """Counters, histograms and gauges of one worker, as they go into its snapshot."""

    def __init__(self) -> None:
        self.counters: dict[Key, float] = defaultdict(float)
        self.live: dict[Key, float] = {}
        """What of the counters came from the memory of the worker that `identity` names, which goes on counting."""
        self.identity = 0.0
        self.histograms: dict[Key, list[float]] = {}
        """For each: a count a bucket, one beyond the last, and the sum."""
        self.gauges: dict[Key, float] = {}
        self.sizes: dict[Version, Sizes] = {}
        """What batches of each size did; no metric, for each size would be a series."""

    def observe(self, name: str, labels: Labels, values: list[int] | list[float]) -> None:
        """Count values into a histogram."""
        if not values:
            return
        bounds = HISTOGRAMS[name][2]
        cells = self.histograms.get((name, labels))
        if cells is None:
            cells = self.histograms[name, labels] = [0.0] * (len(bounds) + 2)
        places = np.searchsorted(bounds, values)
        for index, number in enumerate(np.bincount(places, minlength=len(bounds) + 1).tolist()):
            cells[index] += number
        cells[-1] += math.fsum(values)

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
        for table in (self.counters, self.histograms, self.gauges):
            for key in [key for key in table if key[0] in VERSIONED and key[1][:2] == version]:
                del table[key]
        self.sizes.pop(version, None)

    def dump(self) -> bytes:
        """Write the snapshot that `add` reads."""

        def rows(table: dict[Key, Any]) -> list[Any]:
            return [[name, labels, value] for (name, labels), value in table.items()]

        sizes = [[of, [[size, *did] for size, did in mine.items()]] for of, mine in self.sizes.items()]
        live = [self.identity, rows(self.live)]
        return orjson.dumps([rows(self.counters), rows(self.histograms), rows(self.gauges), sizes, live])

    def read_live(self, text: bytes) -> None:
        """Take from a snapshot what of its counters was live, and whose. Raises ValueError where it is not one."""
        try:
            identity, live = orjson.loads(text)[4]
            self.identity, self.live = float(identity), {(str(n), tuple(map(str, ls))): float(v) for n, ls, v in live}
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError("not a snapshot") from error

    def add(self, text: bytes, *, gauges: bool, sizes: bool = True) -> None:
        """Add a snapshot. Raises ValueError, and adds nothing, where it is not one.

        gauges: with these. sizes: with what batches of each size did, which may be most of a snapshot.
        """
        try:
            counters, histograms, found, told, _ = orjson.loads(text)
            counted = [((str(n), tuple(map(str, ls))), float(v)) for n, ls, v in counters]
            observed = [((str(n), tuple(map(str, ls))), [float(c) for c in v]) for n, ls, v in histograms]
            measured = [((str(n), tuple(map(str, ls))), float(v)) for n, ls, v in found]
            batches = [
                ((str(name), str(version)), [(int(s), float(n), float(t)) for s, n, t in cells])
                for (name, version), cells in (told if sizes else ())
            ]
        except (TypeError, ValueError) as error:
            raise ValueError("not a snapshot") from error
        for key, value in counted:
            if key[0] in COUNTERS:
                self.counters[key] += value
        for key, cells in observed:
            if key[0] in HISTOGRAMS and len(cells) == len(HISTOGRAMS[key[0]][2]) + 2:
                mine = self.histograms.setdefault(key, [0.0] * len(cells))
                for index, cell in enumerate(cells):
                    mine[index] += cell
        for version, batch in batches:
            self._ran(version, batch)
        for key, value in measured if gauges else ():
            if key[0] in LEAST:
                self.gauges[key] = min(value, self.gauges.get(key, value))
            elif key[0] in GREATEST:
                self.gauges[key] = max(value, self.gauges.get(key, value))
            elif key[0] in GAUGES:
                self.gauges[key] = self.gauges.get(key, 0.0) + value


def add_file(store: Store, file: Path, *, gauges: bool, sizes: bool = True) -> None:
    """Add a worker's snapshot; one that can't be read is left out, and the log says so."""
    try:
        store.add(file.read_bytes(), gauges=gauges, sizes=sizes)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        log.error("%s can't be read and is left out", file.name)


def cumulative(bounds: tuple[float, ...], cells: list[float]) -> Iterator[tuple[str, float]]:
    """Yield each upper bound as text, and the count of all up to it."""
    total = 0.0
    for bound, cell in zip(bounds, cells, strict=False):
        total += cell
        yield f"{bound:g}", total
    yield "+Inf", total + cells[len(bounds)]
