"""Runs batches on dedicated threads: whole batches in, whole results out, one hop each way.

A hop for each request would cost more than a small model's prediction.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from serving.engine.isolation import Isolation
from serving.engine.request import Outcome, Request, Run
from serving.errors import InferenceFailed, NotReady, ServingError
from serving.heartbeat import Record, unrecorded
from serving.tensors import Tensors

log = logging.getLogger("serving.executor")


@dataclass(slots=True, eq=False)
class Batch:
    """Requests that run together, and what became of each. Times are monotonic seconds.

    cost: what they counted for in the queue.
    """

    requests: list[Request]
    rows: int
    cost: int
    outcomes: list[Outcome] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0


class Seen(Protocol):
    """Whoever looks at what a model was asked and answered. What it is shown belongs to the requests: it copies."""

    room: int
    """Rows that it still wants to see."""

    def offer(self, inputs: Tensors, outputs: Tensors) -> None:
        """Look at one request's rows and their answers."""


class Executor:
    """Up to `instances` threads that run batches of one model and post each result back to `loop`.

    They start with the first batches, so that a model that nobody asks has none. All but `_work` is for the loop's
    thread alone.

    seen_by: is shown requests and their answers, once these are on their way. open_record: called once on each thread;
    the line in which it notes when it runs.
    """

    def __init__(
        self,
        run: Callable[[Tensors], Tensors],
        *,
        name: str,
        batched: bool,
        one_by_one: bool,
        instances: int,
        loop: asyncio.AbstractEventLoop,
        done: Callable[[Batch], None],
        seen_by: Seen | None = None,
        open_record: Callable[[], Record] = unrecorded,
    ) -> None:
        self._run = run
        self._open_record = open_record
        self._batched = batched
        self._one_by_one = one_by_one
        self._loop = loop
        self._done = done
        self._seen_by = seen_by
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._name = name
        self._instances = instances
        self._threads = 0

    def submit(self, batch: Batch) -> None:
        """Have a batch run."""
        if self._threads < self._instances:
            try:
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
                self._threads += 1
            except RuntimeError:  # the system gives none
                if not self._threads:
                    log.error("%s can't run: the system gives no thread for it", self._name)
                    error = NotReady("the server has no thread left to run this model: come back later")
                    batch.outcomes = [error for _ in batch.requests]
                    batch.started = batch.ended = time.monotonic()
                    self._loop.call_soon(self._done, batch)
                    return
        self._queue.put(batch)

    def rest(self) -> None:
        """Let the threads end after what they have; the next batch starts new ones."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0

    def _work(self) -> None:
        record = self._open_record()
        since = record.since
        isolation = Isolation(self._together)
        while (batch := self._queue.get()) is not None:
            since[0] = batch.started = time.monotonic()
            try:
                batch.outcomes = isolation.outcomes(batch.requests)
            except Exception:  # whatever it is, every caller gets an answer and the thread lives on
                log.exception("a batch failed outside the model")
                batch.outcomes = [InferenceFailed("the model could not run") for _ in batch.requests]
            batch.ended = time.monotonic()
            since[0] = 0.0
            # Before anybody is answered: whoever writes an answer reads from its request how long it ran.
            _note(batch)
            # The loop hears of the batch after the answer was written here, so that it never writes a second one.
            if len(batch.requests) == 1:
                _answer(batch)
            try:
                self._loop.call_soon_threadsafe(self._done, batch)
            except RuntimeError:
                break  # the loop has closed: nobody waits any more
            if self._seen_by is not None and self._seen_by.room > 0:
                _show(batch, self._seen_by)
            # What was answered must not live until the next batch comes: its requests hold their model.
            del batch
        record.close()

    def _together(self, requests: list[Request]) -> list[Outcome]:
        if len(requests) == 1:
            return [self._alone(requests[0])]
        outputs = self._run(
            tuple(np.concatenate(columns) for columns in zip(*(r.inputs for r in requests), strict=True))
        )
        return _split(outputs, requests)

    def _alone(self, request: Request) -> Tensors:
        if not self._one_by_one or request.rows == 1:
            outputs = self._run(request.inputs)
            if self._batched:
                _check_rows(outputs, request.rows)
            return outputs
        rows = [self._run(tuple(array[i : i + 1] for array in request.inputs)) for i in range(request.rows)]
        return tuple(np.concatenate(columns) for columns in zip(*rows, strict=True))


def _note(batch: Batch) -> None:
    ran = Run(batch.started, batch.ended, batch.rows, len(batch.requests))
    for request in batch.requests:
        request.ran = ran


def _show(batch: Batch, seen_by: Seen) -> None:
    try:
        for request, outcome in zip(batch.requests, batch.outcomes, strict=True):
            if seen_by.room <= 0:
                break
            if not (request.made_up or isinstance(outcome, ServingError)):
                seen_by.offer(request.inputs, outcome)
    except Exception:  # nobody waits for it, and the thread lives on
        log.exception("rows could not be looked at")


def _answer(batch: Batch) -> None:
    try:
        batch.requests[0].answer_from_thread(batch.outcomes[0])
    except Exception:  # the loop answers, and the thread lives on
        log.exception("an answer could not be given from the model's thread")


def _split(outputs: Tensors, requests: list[Request]) -> list[Outcome]:
    """Give each request its own rows: views, no copy."""
    _check_rows(outputs, sum(r.rows for r in requests))
    bounds = [0, *itertools.accumulate([request.rows for request in requests])]
    columns = [[output[at:end] for at, end in itertools.pairwise(bounds)] for output in outputs]
    return list(zip(*columns, strict=True)) if columns else [() for _ in requests]


def _check_rows(outputs: Tensors, rows: int) -> None:
    for output in outputs:
        # Rows that can't be told apart must never be handed to somebody.
        if output.ndim == 0 or output.shape[0] != rows:
            raise InferenceFailed("the model answered another number of rows than it was given")
