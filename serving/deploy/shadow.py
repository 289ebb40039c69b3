"""A version in the shadow of another: it gets copies of answered requests, and its answers are only compared.

It runs on spare capacity: nothing is copied while live rows wait, few copies wait at any time, and they run on one
thread, in a session without threads of its own, for a tenth of the time at most, heavy models for a two-hundredth.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from serving.engine.model import Model
from serving.engine.session import OnnxSession
from serving.engine.signature import Signature
from serving.errors import ServingError
from serving.linux.thread_scheduling import lowest_priority
from serving.metrics.counts import Counts
from serving.metrics.metrics import Metrics
from serving.metrics.recorders import ShadowMetrics
from serving.repository.traffic import choose
from serving.tensors import Array, Tensors

log = logging.getLogger("serving.shadow")

MOST_WAITING = 32
"""Copies that may wait: more would hold memory, and say nothing more."""
MOST_ROWS = 4096
"""Rows of one request that is still copied: a larger one would hold a core for long."""
HEAVY_S = 0.005
"""Processor seconds in the session from which copies run at the lowest priority. Below, the thread is in Python for
much of its time, and one that is put off while it holds the interpreter's lock stops the event loop for as long."""
QUICK_S = 0.001
"""Seconds of a copy, waits included, up to which the event loop hardly feels it."""
REST, LONG_REST, MOST_REST_S = 9, 199, 30.0
"""Times as long as a quick copy, and as any other, took, the thread then sleeps; and most seconds of it. Live answers
that meet a long copy are late whatever its priority: so they are fewer than one in a hundred."""


Comparison: TypeAlias = tuple[int, int | None, list[float]]
"""Rows that two versions answered; how many got the same label, None where there are no labels; how far the scores of
each are apart, if at all."""


class Shadow:
    """Copies requests of `live` to `model`. Made, offered to and closed on the event loop."""

    def __init__(self, live: Model, model: Model, percent: float, metrics: Metrics | None) -> None:
        self.live = live
        self.model = model
        self.percent = percent
        self._metrics = (
            metrics.shadow(model.name, model.version) if metrics is not None else ShadowMetrics(("", ""), Counts())
        )
        self._adapt = adapter(live.signature, model.signature)
        self._batched = model.signature.batch == "dynamic"
        self._compare = comparer(live.signature, model.signature)
        self._waiting: queue.SimpleQueue[tuple[Tensors, Tensors] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{model.name}-{model.version}-shadow", daemon=True)
        self._thread.start()

    def same(self, live: Model, model: Model, percent: float) -> bool:
        """Tell whether it already does what is asked, so that it goes on across a change of something else."""
        return (self.live, self.model, self.percent) == (live, model, percent)

    def offer(self, inputs: Tensors, rows: int, outputs: Tensors) -> None:
        """Copy an answered request, where it is in the share and nothing live has to wait for it."""
        if not choose(None, self.percent):
            return
        if self._adapt is None or (rows > 1 and not self._batched):
            self._metrics.skipped("incompatible")
        elif not self._spare() or self._waiting.qsize() >= MOST_WAITING or rows > MOST_ROWS:
            self._metrics.skipped("busy")
        else:
            self._waiting.put((inputs, outputs))

    def _spare(self) -> bool:
        """Tell whether nothing live waits."""
        return not self.live.batcher.queued_rows

    def close(self) -> None:
        """Compare no more; what waits is dropped."""
        self._closed.set()
        self._waiting.put(None)

    def _work(self) -> None:
        try:
            session = self._session()
        except Exception as error:  # live requests go on, and are counted as incompatible
            reason = error.message if isinstance(error, ServingError) else repr(error)
            log.error("%s %s can't run as shadow: %s", self.model.name, self.model.version, reason)
            self._adapt = None
            return
        while (copy := self._waiting.get()) is not None and not self._closed.is_set():
            began = time.monotonic()
            if not self._spare():
                self._tell(lambda: self._metrics.skipped("busy"))
            else:
                self._run(session, *copy)
            del copy  # what was compared must not be held until the next comes
            took = time.monotonic() - began
            self._closed.wait(min((REST if took < QUICK_S else LONG_REST) * took, MOST_REST_S))

    def _session(self) -> OnnxSession:
        """A session's own threads have the priority of who made it, and live traffic may need this one at full."""
        if self.model.session.threads == 1:
            return self.model.session
        made = self.model.session
        return OnnxSession(
            made.path,
            threads=1,
            warm_rows=1,
            prepared=made.prepared,
            memory_bytes=made.memory_bytes,
            providers=made.providers,
        )

    def _run(self, session: OnnxSession, inputs: Tensors, live: Tensors) -> None:
        assert self._adapt is not None  # noqa: S101  nothing is queued without it
        began, worked = time.monotonic(), time.thread_time()
        try:
            outputs = session.run(self._adapt(inputs))
            seconds = time.monotonic() - began
            if time.thread_time() - worked > HEAVY_S:
                lowest_priority()  # from now on; without privileges there is no way back
            found = self._compare(live, outputs)
        except Exception as error:  # whatever it is, it is the shadow's, and nobody waits for it
            if not isinstance(error, ServingError):
                log.exception("a shadow's answer could not be compared")
            self._tell(self._metrics.broke)
            return
        self._tell(lambda: self._metrics.compared(*found, seconds))

    def _tell(self, count: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody counts any more
            self._loop.call_soon_threadsafe(count)


def adapter(live: Signature, shadow: Signature) -> Callable[[Tensors], Tensors] | None:
    """Return what makes the shadow's feeds of the live version's, or None where it wants what those do not have.

    Features may be fewer or in another order; datatypes and shapes must be the same.
    """
    if live.layout != shadow.layout or live.batch != shadow.batch:
        return None
    if live.layout == "matrix":
        names = [f.name for f in live.features]
        wanted = [f.name for f in shadow.features]
        if live.inputs[0].datatype != shadow.inputs[0].datatype or not set(wanted) <= set(names):
            return None
        if wanted == names:
            return lambda inputs: inputs
        columns = [names.index(name) for name in wanted]
        return lambda inputs: (np.ascontiguousarray(inputs[0][..., columns]),)
    ports = {spec.name: (i, spec) for i, spec in enumerate(live.inputs)}
    picked = []
    for spec in shadow.inputs:
        position, there = ports.get(spec.name, (0, None))
        if there is None or there != spec:
            return None
        picked.append(position)
    return lambda inputs: tuple(inputs[position] for position in picked)


def comparer(live: Signature, shadow: Signature) -> Callable[[Tensors, Tensors], Comparison]:
    """Return what compares two answers: labels row by row, and the greatest difference of a row's scores.

    Where there are no scores, the first output counts, if both are numbers.
    """
    labels = _positions(live, shadow, live.label, shadow.label)
    scores = _positions(live, shadow, live.scores, shadow.scores)
    if scores is None and labels is None:
        scores = (0, 0)

    def compare(one: Tensors, other: Tensors) -> Comparison:
        rows = int(one[0].shape[0]) if one[0].ndim else 1
        agreeing = None
        if labels is not None:
            mine, its = one[labels[0]].ravel(), other[labels[1]].ravel()
            agreeing = int(np.count_nonzero(mine == its)) if mine.shape == its.shape else 0
        differences = _differences(one[scores[0]], other[scores[1]], rows) if scores is not None else []
        return rows, agreeing, differences

    return compare


def _positions(live: Signature, shadow: Signature, one: str | None, other: str | None) -> tuple[int, int] | None:
    if one is None or other is None:
        return None
    return [o.name for o in live.outputs].index(one), [o.name for o in shadow.outputs].index(other)


def _differences(one: Array, other: Array, rows: int) -> list[float]:
    if one.shape != other.shape or one.dtype.kind not in "fiub" or other.dtype.kind not in "fiub" or not one.size:
        return []
    apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).reshape(rows, -1).max(axis=1)
    return [float(value) for value in apart if np.isfinite(value)]
