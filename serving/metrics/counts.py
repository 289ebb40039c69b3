"""A worker's counters, in memory that outlives it: one that is killed loses none of what it has answered.

Each counter is a cell of anonymous shared memory (no file that a full disk could refuse): its value, and then its
name. Counting is one store of eight bytes; the parent reads all cells once the worker has ended.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Hashable
from multiprocessing import reduction
from typing import Any, Generic, TypeVar

from serving.metrics.definitions import VERSIONED, Cell, Key, Version

CELLS = 16384
_SIZE = 256
_TEXT = _SIZE - 8

K = TypeVar("K", bound=Hashable)


class Counts:
    """Cells by name and labels. It can be given to a spawned process, and both then see the same memory."""

    def __init__(self, descriptor: int = -1) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, CELLS * _SIZE)
        self._values = memoryview(self._memory).cast("d")
        self._places: dict[Key, int] = {}
        self._private: dict[Key, Cell] = {}
        """Those for which there was no room; a kill loses what they counted since the last snapshot."""
        self._taken = 1  # the first cell says how many are taken

    @classmethod
    def shared(cls) -> Counts:
        """Make one that the parent reads and its worker counts in."""
        descriptor = os.memfd_create("serving-counts")
        os.ftruncate(descriptor, CELLS * _SIZE)
        return cls(descriptor)

    def __reduce__(self) -> Any:
        return _opened, (reduction.DupFd(self._descriptor),)

    def cell(self, name: str, labels: tuple[str, ...]) -> Cell:
        """Return the counter of this name, as a view of one number that its only user adds to."""
        key = name, labels
        if key in self._private:
            return self._private[key]
        if key not in self._places:
            text = json.dumps(key).encode()
            if len(text) > _TEXT or self._taken == CELLS:
                return self._private.setdefault(key, memoryview(bytearray(8)).cast("d"))
            at = self._taken * _SIZE
            self._memory[at + 8 : at + 8 + len(text)] = text
            self._places[key] = at // 8
            # After the name: a worker may be killed between any two of these lines.
            self._taken += 1
            self._values[0] = self._taken
        place = self._places[key]
        return self._values[place : place + 1]

    def forget(self, version: Version) -> None:
        """Count a version's cells no more. They are not used again: a request that is late may still add to them."""
        for key in [key for key in (*self._places, *self._private) if key[0] in VERSIONED and key[1][:2] == version]:
            self._private.pop(key, None)
            if key in self._places:
                at = self._places.pop(key) * 8
                self._memory[at + 8 : at + _SIZE] = bytes(_TEXT)

    def kept(self) -> dict[Key, float]:
        """Return what is counted so far where the parent reads it; not what is zero. May be called on any thread."""
        return {key: self._values[place] for key, place in self._places.copy().items() if self._values[place]}

    def unkept(self) -> dict[Key, float]:
        """Return what is counted beyond that."""
        return {key: cell[0] for key, cell in self._private.copy().items() if cell[0]}

    # The parent's side, which knows the cells by their text alone.

    def read(self) -> dict[Key, float]:
        """Return what a worker has counted, once it has ended.

        A model's code may have written anywhere before it crashed: what can't be a counter is left out.
        """
        found: dict[Key, float] = {}
        taken = self._values[0]
        for at in range(_SIZE, int(taken if 0 <= taken <= CELLS else CELLS) * _SIZE, _SIZE):
            text, value = self._memory[at + 8 : at + _SIZE].rstrip(b"\0"), self._values[at // 8]
            if text and 0 < value < math.inf:
                with contextlib.suppress(ValueError, TypeError):
                    name, labels = json.loads(text)
                    found[str(name), tuple(map(str, labels))] = value
        return found

    def close(self) -> None:
        """Let the memory go, on the parent's side."""
        self._values.release()
        self._memory.close()
        os.close(self._descriptor)


class Cells(dict[K, "Cell"], Generic[K]):
    """Cells that are made when they are first counted in."""

    def __init__(self, make: Callable[[K], Cell]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: K) -> Cell:
        cell = self[key] = self._make(key)
        return cell


def _opened(descriptor: Any) -> Counts:
    return Counts(descriptor.detach())
