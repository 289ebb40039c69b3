"""Group commit: while one batch runs the next one gathers, so nobody waits on purpose.

It costs nothing at low load and coalesces by itself under load. All of it runs on the event loop's thread; only
`Executor` leaves it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from serving.black_box import Record, unrecorded
from serving.engine.executor import Batch, Executor
from serving.engine.request import Request
from serving.errors import DeadlineExceeded, NotReady, PayloadTooLarge, QueueFull, ServingError
from serving.tensors import Tensors


class Observer(Protocol):
    """What a batcher tells of each batch that ran; times in seconds."""

    def ran(self, rows: int, queue_seconds: list[float], inference_seconds: float) -> None:
        """Take one executed batch: its rows, how long each of its requests waited, how long it ran."""

    def queued(self, rows: int) -> None:
        """Take how many rows wait now."""


class Unobserved:
    """An observer that looks away, for servers with metrics off."""

    def ran(self, rows: int, queue_seconds: list[float], inference_seconds: float) -> None:
        """Do nothing."""

    def queued(self, rows: int) -> None:
        """Do nothing."""


class Batcher:
    """Gathers requests into batches for one model.

    uniform: all requests have the same trailing shapes (the signature fixes them), so no comparison is needed.
    max_rows: of one batch; a larger request runs alone. max_queued_rows: beyond it `submit` raises QueueFull.
    max_delay: seconds that an idle model may wait for company; 0 never waits.
    """

    def __init__(
        self,
        run: Callable[[Tensors], Tensors],
        *,
        name: str,
        batched: bool,
        uniform: bool,
        max_rows: int,
        max_queued_rows: int,
        max_delay: float,
        instances: int,
        loop: asyncio.AbstractEventLoop,
        observer: Observer,
        open_record: Callable[[], Record] = unrecorded,
    ) -> None:
        self._loop = loop
        self._observer = observer
        self._batched = batched
        self._uniform = uniform
        self._max_rows = max_rows if batched else 1
        self._max_queued_rows = max_queued_rows
        self._max_delay = max_delay
        self._waiting: deque[Request] = deque()
        self._queued_rows = 0
        self._at_work: set[Batch] = set()
        self._idle = instances
        self._instances = instances
        self._scheduled = False
        self._closing = False
        self._row_seconds = 0.0
        self._lonely = True  # the last batch held one request: waiting for company would only cost time
        self._drained: asyncio.Event | None = None
        self._executor = Executor(
            run,
            name=name,
            batched=batched,
            instances=instances,
            loop=loop,
            done=self._finish,
            open_record=open_record,
        )

    def submit(self, request: Request) -> None:
        """Queue a request; its reply comes later, on the loop.

        Raises QueueFull with an honest `retry_after`, PayloadTooLarge where it could never fit, NotReady once closed.
        """
        rows = request.rows
        if self._queued_rows + rows > self._max_queued_rows:
            if rows > self._max_queued_rows:
                raise PayloadTooLarge(
                    f"{rows} rows in one request; the queue of this model holds {self._max_queued_rows}: send fewer"
                )
            wait = self._queued_rows * self._row_seconds / self._instances
            raise QueueFull("the queue of this model is full: come back later", retry_after=max(1, math.ceil(wait)))
        if self._closing:
            raise NotReady("this version of the model is going away")
        request.queued_at = time.monotonic()
        self._waiting.append(request)
        self._queued_rows += rows
        if self._idle and not self._scheduled:
            self._scheduled = True
            if self._max_delay:
                self._loop.call_later(self._max_delay, self._flush)
            elif self._lonely:
                self._flush()
            else:
                self._loop.call_soon(self._flush)  # what else arrived in this turn of the loop joins

    @property
    def queued_rows(self) -> int:
        """Rows that wait, not counting those that run."""
        return self._queued_rows

    def expire(self, now: float) -> None:
        """Answer those whose deadline passed while they wait, though the model is still busy with others."""
        if any(r.deadline <= now or r.gone for r in self._waiting):
            keep: deque[Request] = deque()
            for request in self._waiting:
                if self._live(request, now):
                    keep.append(request)
            self._waiting = keep

    def refuse(self, error: ServingError) -> None:
        """Answer all that waits and runs with `error`, and take no more; what the threads still make is lost."""
        self._closing = True
        for request in [*self._waiting, *(r for batch in self._at_work for r in batch.requests)]:
            if not request.gone:
                request.reply(error)
                request.gone = True  # it has its answer
        self._waiting.clear()
        self._at_work.clear()
        self._queued_rows = 0
        self._settled()

    async def close(self) -> None:
        """Take no more, finish what was accepted, let the threads go."""
        self._closing = True
        if self._waiting or self._at_work:
            self._drained = asyncio.Event()
            await self._drained.wait()
        self._executor.close()

    def abandon(self) -> None:
        """Let the threads go at once: there is no one left to ask for anything."""
        self._executor.close()
        del self._executor  # they know each other: this lets both go without waiting for the garbage collector

    def _live(self, request: Request, now: float) -> bool:
        """Tell whether it should run; who left costs no rows, who is late is told so."""
        if not request.gone and request.deadline > now:
            return True
        self._queued_rows -= request.rows
        if not request.gone:
            request.reply(DeadlineExceeded("the deadline passed while the request waited for its turn"))
        return False

    def _flush(self) -> None:
        self._scheduled = False
        while self._idle and self._waiting:
            batch = self._take()
            if batch is None:
                break
            self._idle -= 1
            self._at_work.add(batch)
            self._executor.submit(batch)
        self._settled()

    def _settled(self) -> None:
        self._observer.queued(self._queued_rows)
        if self._drained is not None and not self._waiting and not self._at_work:
            self._drained.set()

    def _take(self) -> Batch | None:
        """Gather the next batch: up to `max_rows`, one shape, in order of arrival."""
        now = time.monotonic()
        taken: list[Request] = []
        rows = 0
        others: list[Request] = []
        shapes: tuple[tuple[int, ...], ...] | None = None
        waiting = self._waiting
        while waiting:
            request = waiting[0]
            if taken and rows + request.rows > self._max_rows:
                break
            waiting.popleft()
            if (request.gone or request.deadline <= now) and not self._live(request, now):
                continue
            if not self._uniform and self._batched:
                trailing = tuple(array.shape[1:] for array in request.inputs)
                if shapes is None:
                    shapes = trailing
                elif shapes != trailing:
                    others.append(request)
                    continue
            taken.append(request)
            rows += request.rows
            if not self._batched:
                break
        waiting.extendleft(reversed(others))
        if not taken:
            return None
        self._queued_rows -= rows
        self._lonely = len(taken) == 1
        return Batch(taken, rows)

    def _finish(self, batch: Batch) -> None:
        self._idle += 1
        self._at_work.discard(batch)
        spent = batch.ended - batch.started
        self._row_seconds = 0.9 * self._row_seconds + 0.1 * spent / batch.rows
        started = batch.started
        self._observer.ran(batch.rows, [started - r.queued_at for r in batch.requests], spent)
        for request, outcome in zip(batch.requests, batch.outcomes, strict=True):
            if not request.gone:
                request.reply(outcome)
        if not self._waiting:
            self._settled()
        elif not self._scheduled:
            # Not at once: what has arrived at the sockets meanwhile joins, which makes batches five times as large.
            self._scheduled = True
            self._loop.call_soon(self._flush)
