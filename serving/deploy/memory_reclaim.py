"""Gives memory back to the system that a worker's models have taken and need no more."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from serving.engine.model import Model
from serving.engine.session import OnnxSession
from serving.linux.memory import give_back, private_memory

TRIM_AFTER_S = 0.5
"""Seconds until what loading a version, or its end, left in the heap is given back: its threads end meanwhile."""
MUCH_BYTES = 64 * 1024 * 1024
"""Growth of a worker from which what runs have taken is given back."""
RECLAIM_S = 2.0
"""Seconds between two times: a model that needs it in each run has to take it anew."""


class MemoryReclaim:
    """Used on the event loop. worker: a thread that is not of low priority, for whoever allocates waits for it."""

    def __init__(self, worker: ThreadPoolExecutor) -> None:
        self._worker = worker
        self._trim_at = math.inf
        self._usual_bytes = 0
        self._reclaimed = 0.0

    def follow(self, model: Model) -> None:
        """Give back what loading a large version has left in the heap, and later what its end leaves."""
        if model.session.large:
            self._trim_soon()
            weakref.finalize(model, self._trim_soon).atexit = False

    def _trim_soon(self) -> None:
        """Called on whichever thread had the last reference to a model: it notes the time, and the next tick acts."""
        self._trim_at = min(self._trim_at, time.monotonic() + TRIM_AFTER_S)

    def tick(self, sessions: Sequence[OnnxSession]) -> None:
        """Give back where this worker has grown by much: onnxruntime's arenas keep the most that a run ever took."""
        now = time.monotonic()
        if now > self._trim_at:
            self._trim_at = math.inf
            self._worker.submit(give_back)
        if now - self._reclaimed < RECLAIM_S:
            return
        size = private_memory()
        self._usual_bytes = min(self._usual_bytes, size) or size
        if size - self._usual_bytes > MUCH_BYTES:
            self._reclaimed = now
            self._worker.submit(self._shrink, sessions)

    def _shrink(self, sessions: Sequence[OnnxSession]) -> None:
        idle = not any(session.busy for session in sessions)
        for session in sessions:
            session.give_back()
        give_back()
        size = private_memory()
        # What a run has now may stay with its arena afterwards, and be usual no more.
        if idle and not any(session.busy for session in sessions):
            self._usual_bytes = size
