"""Arrays of as many strings as a long body has, let go of in steps: a million at once would take a tenth of a second.

Whoever lets go of the last one, often the event loop, holds the interpreter meanwhile. A thread of its own does it.
"""

from __future__ import annotations

import functools
import queue
import threading
import time

import numpy as np

from serving.tensors import Array

_STEP = 2048
_PAUSE_S = 20e-6
_FEW = 16_384
"""Strings that may go at once: a millisecond."""


class Objects(np.ndarray):
    """An array that a thread empties once nobody holds it, nor a view of it."""

    def __del__(self) -> None:
        """Come to life again, for the thread; Python calls this once."""
        if self.base is None and self.size > _FEW:
            _free.put(self)


_free: queue.SimpleQueue[Objects] = queue.SimpleQueue()


def _empty() -> None:
    while True:
        done = _free.get()
        for at in range(0, len(done), _STEP):
            done[at : at + _STEP] = None
            time.sleep(_PAUSE_S)
        del done


@functools.cache
def _start() -> None:
    threading.Thread(target=_empty, name="empty", daemon=True).start()


def objects(size: int) -> Array:
    """Make room for `size` objects: an array of one dimension, to be given away as a view."""
    _start()
    made: Array = Objects(size, dtype=object)
    return made


def joined(parts: list[Array]) -> Array:
    """Put arrays together along their first dimension, and forget them one by one.

    Raises ValueError where the other dimensions differ.
    """
    if len(parts) == 1:
        return parts.pop()
    if not parts[0].dtype.hasobject:
        return np.concatenate(parts)
    form = parts[0].shape[1:]
    if any(part.shape[1:] != form for part in parts):
        raise ValueError("parts have different shapes")
    made = objects(sum([part.size for part in parts])).view(np.ndarray)
    filled = 0
    for part in parts:
        made[filled : filled + part.size] = part.ravel()
        filled += part.size
    while parts:
        parts.pop()
    return made.reshape(-1, *form)
