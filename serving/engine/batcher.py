"""Group commit: while one batch runs the next one gathers, so nobody waits on purpose.

It costs nothing at low load and coalesces by itself under load. All of it runs on the event loop's thread; only
`Executor` leaves it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from serving.engine.executor import Batch, Executor, Seen
from serving.engine.latency_model import LatencyModel, seconds_to_come_back
from serving.engine.request import LOW, Outcome, Request
from serving.errors import DeadlineExceeded, NotReady, PayloadTooLarge, QueueFull, ServingError
from serving.heartbeat import Record, unrecorded
from serving.tensors import Overriding, Tensors

log = logging.getLogger("serving.batcher")

REST_S = 60.0
"""Seconds without a batch after which a model's threads end."""
_FIRST_FOR_ONCE = ((0, 1, 2), (2, 1, 0), (0, 1, 2), (1, 0, 2))
"""Lines in the order in which batches take from them, in turn: every fourth serves the last line first."""


class Observer(Protocol):
    """What a batcher tells of each batch that ran; times in seconds."""

    def ran(self, rows: int, queue_seconds: list[float], inference_seconds: float) -> None:
        """Take one executed batch: its rows, how long each of its requests waited, how long it ran."""

    def queued(self, rows: int) -> None:
        """Take how many rows wait now."""

    def cached(self, outcome: str) -> None:
        """Take what a response cache made of a request: `hit`, `joined` (it waits for an equal one) or `miss`."""


class Unobserved:
    """An observer that looks away, for servers with metrics off."""

    def ran(self, rows: int, queue_seconds: list[float], inference_seconds: float) -> None:
        """Do nothing."""

    def queued(self, rows: int) -> None:
        """Do nothing."""

    def cached(self, outcome: str) -> None:
        """Do nothing."""


class Batcher:
    """Gathers requests into batches for one model.

    batched: requests may run together; else each runs alone, as it was sent, and counts as one row in the queue.
    one_by_one: the rows of a request run one after the other, for a model that takes one. uniform: all requests have
    the same trailing shapes (the signature fixes them), so no comparison is needed. max_rows: of one batch; a larger
    request runs alone. max_queued_rows: beyond it `submit` raises QueueFull, and so it does where a request could not
    be answered before its deadline. Requests wait in three lines, by priority.
    max_delay: seconds that an idle model may wait for company; 0 never waits.
    """

    def __init__(
        self,
        run: Callable[[Tensors], Tensors],
        *,
        name: str,
        batched: bool,
        one_by_one: bool = False,
        uniform: bool,
        max_rows: int,
        max_queued_rows: int,
        max_delay: float,
        instances: int,
        loop: asyncio.AbstractEventLoop,
        observer: Observer,
        seen_by: Seen | None = None,
        open_record: Callable[[], Record] = unrecorded,
    ) -> None:
        self._loop = loop
        self._observer = observer
        self._batched = batched
        self._counts_rows = batched or one_by_one
        self._uniform = uniform
        self._max_rows = max_rows if batched else 1
        self._max_queued_rows = max_queued_rows
        self._max_delay = max_delay
        self._lines: tuple[deque[Request], ...] = (deque(), deque(), deque())
        self._orders = tuple(tuple(self._lines[i] for i in order) for order in _FIRST_FOR_ONCE)
        self._taken = 0  # batches
        self._allowance = 0.0  # seconds that the first of the last batch had in all
        self._queued_rows = 0
        self._at_work: set[Batch] = set()
        self.live_at = 0.0
        """When a batch ended last that was not of the last line alone; monotonic seconds."""
        self._idle = instances
        self._instances = instances
        self._scheduled = False
        self._closing = False
        self._pace = LatencyModel()
        self._row_seconds = 0.0  # of a row in a batch as large as they are under load
        self._lag = 0.0  # from the end of the queue to an answer: the batch that runs, and its own
        self._freed = 0.0  # when a batch ended that left others waiting; 0 where none waited
        self._used = 0.0  # when a batch ended last; 0 where the threads rest
        self._lonely = True  # the last batch held one request: waiting for company would only cost time
        self._drained: asyncio.Event | None = None
        self._executor = Executor(
            run,
            name=name,
            batched=batched,
            one_by_one=one_by_one,
            instances=instances,
            loop=loop,
            done=self._finish,
            seen_by=seen_by,
            open_record=open_record,
        )

    def submit(self, request: Request) -> None:
        """Queue a request; its reply comes later, on the loop.

        Raises QueueFull with an honest `retry_after`, PayloadTooLarge where it could never fit, NotReady once closed.
        """
        rows = request.cost = max(1, request.rows) if self._counts_rows else 1  # one without rows has its turn too
        now = request.queued_at = time.monotonic()
        queued = self._queued_rows
        # All that is asked where there is room and time; who is refused, and for whom, is worth looking at the lines.
        if queued and (
            queued + rows > self._max_queued_rows or now + queued * self._row_seconds + self._lag > request.deadline
        ):
            self._judge(request, now)
        elif rows > self._max_queued_rows:
            raise self._too_many(rows)
        if self._closing:
            raise NotReady("this version of the model is going away")
        self._lines[request.priority].append(request)
        self._queued_rows += rows
        if self._idle and not self._scheduled:
            self._scheduled = True
            if self._max_delay:
                self._loop.call_later(self._max_delay, self._flush)
            elif self._lonely:
                self._flush()
            else:
                self._loop.call_soon(self._flush)  # what else arrived in this turn of the loop joins

    def _too_many(self, rows: int) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"{rows} rows in one request; the queue of this model holds {self._max_queued_rows}: send fewer"
        )

    def _judge(self, request: Request, now: float) -> None:
        """Refuse what finds no room, or what its deadline would overtake; rows of lower priority make room."""
        rows = request.cost
        if rows > self._max_queued_rows:
            raise self._too_many(rows)
        behind = sum(other.cost for line in self._lines[request.priority + 1 :] for other in line)
        ahead = self._queued_rows - behind
        wait = ahead * self._row_seconds + self._lag
        allowance = request.deadline - now
        if ahead + rows > self._max_queued_rows or wait > allowance:
            if wait > allowance:
                text = "this could not be answered before its deadline: come back later, or allow it more time"
                wait -= allowance
            else:
                text = "the queue of this model is full: come back later"
            raise QueueFull(text, seconds_to_come_back(wait))
        for line in reversed(self._lines[request.priority + 1 :]):
            while line and self._queued_rows + rows > self._max_queued_rows:
                displaced = line.pop()
                self._queued_rows -= displaced.cost
                text = "requests of higher priority took the place: come back later"
                reply(displaced, QueueFull(text, seconds_to_come_back(wait)))

    @property
    def queued_rows(self) -> int:
        """Rows that wait, not counting those that run."""
        return self._queued_rows

    def waits(self, request: Request) -> bool:
        """Tell whether a request has not begun to run."""
        return any(request in line for line in self._lines)

    def expire(self, now: float) -> None:
        """Answer those whose deadline passed while they wait, though the model is still busy with others.

        Threads that had nothing to do for a while end.
        """
        if self._used and now - self._used > REST_S and not self._at_work:
            self._used = 0.0
            self._executor.rest()
        for line in self._lines:
            if any(r.deadline <= now or r.done for r in line):
                keep = [request for request in line if self._live(request, now)]
                line.clear()
                line.extend(keep)

    def refuse(self, error: ServingError) -> None:
        """Answer all that waits and runs with `error`, and take no more; what the threads still make is lost."""
        self._closing = True
        at_work = (batch.requests for batch in self._at_work)
        for request in [request for requests in (*self._lines, *at_work) for request in requests]:
            reply(request, error)
            request.done = True  # what its batch still brings is for nobody
        for line in self._lines:
            line.clear()
        self._at_work.clear()
        self._queued_rows = 0
        self._settled()

    async def close(self) -> None:
        """Take no more, finish what was accepted, let the threads go."""
        self._closing = True
        if self._queued_rows or self._at_work:
            self._drained = asyncio.Event()
            await self._drained.wait()
        self._executor.rest()

    def abandon(self) -> None:
        """Let the threads go at once: there is no one left to ask for anything."""
        self._executor.rest()
        del self._executor  # they know each other: this lets both go without waiting for the garbage collector

    def _live(self, request: Request, now: float) -> bool:
        """Tell whether it should run; who left costs no rows, who is late is told so."""
        if not request.done and request.deadline > now:
            return True
        self._queued_rows -= request.cost
        reply(request, DeadlineExceeded("the deadline passed while the request waited for its turn"))
        return False

    def _flush(self) -> None:
        self._scheduled = False
        while self._idle and self._queued_rows:
            batch = self._take()
            if batch is None:
                break
            self._idle -= 1
            self._at_work.add(batch)
            if len(batch.requests) == 1:
                batch.requests[0].lend()
            self._executor.submit(batch)
        self._settled()

    def _settled(self) -> None:
        self._observer.queued(self._queued_rows)
        if self._drained is not None and not self._queued_rows and not self._at_work:
            self._drained.set()

    def _take(self) -> Batch | None:
        """Gather the next batch: one shape, by priority, then in order of arrival."""
        now = time.monotonic()
        taken: list[Request] = []
        rows = 0
        most = self._max_rows
        shapes: object = None
        self._taken += 1
        for line in self._orders[self._taken & 3]:
            others: list[Request] = []
            while line:
                request = line[0]
                if taken and rows + request.cost > most:
                    break
                line.popleft()
                if (request.done or request.deadline <= now) and not self._live(request, now):
                    continue
                if not self._uniform and self._batched:
                    trailing: object = tuple(array.shape[1:] for array in request.inputs)
                    if isinstance(request.inputs, Overriding):
                        trailing = object()  # like no other
                    if shapes is None:
                        shapes = trailing
                    elif shapes != trailing:
                        others.append(request)
                        continue
                if not taken:
                    self._allowance = allowance = request.deadline - request.queued_at
                    most = self._pace.rows(allowance, most)
                taken.append(request)
                rows += request.cost
                if not self._batched:
                    break
            line.extendleft(reversed(others))  # of other shapes: first in line again, in their order
            if rows >= most:
                break
        if not taken:
            return None
        self._queued_rows -= rows
        self._lonely = len(taken) == 1
        return Batch(taken, rows if self._counts_rows else taken[0].rows, rows)

    def _finish(self, batch: Batch) -> None:
        self._idle += 1
        self._at_work.discard(batch)
        spent = batch.ended - batch.started
        now = self._used = time.monotonic()
        # Between the batches of a busy model the loop reads and answers: who waits, waits for that too.
        self._pace.learn(batch.cost, now - self._freed if self._freed and self._instances == 1 else spent)
        self._freed = now if self._queued_rows else 0.0
        row_seconds, self._lag = self._pace.waits(self._allowance, self._max_rows)
        self._row_seconds = row_seconds / self._instances
        if batch.requests[0].priority != LOW or batch.requests[-1].priority != LOW:
            self.live_at = now
        started = batch.started
        self._observer.ran(batch.rows, [started - r.queued_at for r in batch.requests], spent)
        for request, outcome in zip(batch.requests, batch.outcomes, strict=True):
            reply(request, outcome)
        if not self._queued_rows:
            self._settled()
        elif not self._scheduled:
            # Not at once: what has arrived at the sockets meanwhile joins, which makes batches five times as large.
            self._scheduled = True
            self._loop.call_soon(self._flush)


def reply(request: Request, outcome: Outcome) -> None:
    """Answer one request, unless its caller has left.

    A transport that fails on it keeps nobody else from being answered, nor the model idle.
    """
    if request.done:
        return
    try:
        request.reply(outcome)
    except Exception:
        log.exception("an answer could not be given")
