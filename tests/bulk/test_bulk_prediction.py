"""Rows in bulk in the queue of a model: a short piece at a time, behind all others, whatever becomes of it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serving.bulk.batch import BadRow, Batch
from serving.engine.request import LOW, Outcome, Request, Run
from serving.errors import DeadlineExceeded, InferenceFailed, NotReady, QueueFull
from serving.prediction.bulk import BulkPrediction
from serving.prediction.request_options import RequestOptions
from tests.bulk.test_formats import described

ROW_S = 2e-5


class Queue:
    """Stands for a batcher: takes a piece at a time and answers it by what the rows hold."""

    def __init__(self, *, full: int = 0, live_at: float = 0.0) -> None:
        self.pieces: list[int] = []
        self.most_waiting = self.waiting = 0
        self.full = full
        self.live_at = live_at

    def submit(self, request: Request) -> None:
        assert request.priority == LOW
        if self.full:
            self.full -= 1
            raise QueueFull("others are there")
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        asyncio.get_running_loop().call_soon(self._run, request)

    def _run(self, request: Request) -> None:
        self.waiting -= 1
        self.pieces.append(request.rows)
        rows = request.inputs[0]
        request.ran = Run(0.0, ROW_S * request.rows, request.rows, 1)
        outcome: Outcome = (rows[:, 0], rows[:, :3])
        if (rows[:, 0] < 0).any():
            outcome = InferenceFailed("a value is one that the model refuses")
        elif (rows[:, 0] > 1e9).any():
            outcome = NotReady("it is going away")
        request.reply(outcome)


def prediction(queue: Queue, timeout: float | None = None, **changed: Any) -> BulkPrediction:
    given = described("iris")
    model = SimpleNamespace(
        batcher=queue,
        signature=given.signature,
        described=given,
        batched=True,
        limits=SimpleNamespace(max_queued_rows=4096, callers=None),
    )
    for name, value in changed.items():
        setattr(model, name, value)
    endpoint: Any = SimpleNamespace(
        access=None, canary=None, model=model, metrics=None, deadline=0.2, loop=asyncio.get_running_loop()
    )
    return BulkPrediction(endpoint, (), RequestOptions(timeout=timeout))


def batch(values: Any, *bad: BadRow) -> Batch:
    rows = np.zeros((len(values), 4), np.float32)
    rows[:, 0] = values
    taken = {each.line for each in bad}
    lines = np.array([line for line in range(1, len(values) + len(bad) + 1) if line not in taken], np.int64)
    return Batch((rows,), lines, bad)


async def test_rows_run_in_short_pieces() -> None:
    """A piece is a millisecond or a few of the model's time, and never over half of the queue."""
    queue = Queue()
    (scored,) = await prediction(queue).run(batch(np.arange(5000)))
    assert scored.outputs is not None
    assert (scored.outputs[0] == np.arange(5000)).all()
    assert sum(queue.pieces) == 5000
    assert max(queue.pieces) * ROW_S < 0.01
    queue = Queue()
    await prediction(queue, limits=SimpleNamespace(max_queued_rows=100, callers=None)).run(batch(np.arange(5000)))
    assert max(queue.pieces) == 50


@pytest.mark.parametrize(("live", "waiting", "longest"), [(False, 2, 0.006), (True, 1, 0.0015)])
async def test_beside_single_requests_pieces_are_shorter_and_one_at_a_time(
    live: bool, waiting: int, longest: float
) -> None:
    """Alone, the next piece waits while one runs; a single request waits for one short piece at most."""
    queue = Queue(live_at=time.monotonic() + 60 if live else 0.0)
    await prediction(queue).run(batch(np.arange(1000)))
    assert queue.most_waiting == waiting
    assert max(queue.pieces) * ROW_S < longest


async def test_rows_that_may_see_each_other_run_alone() -> None:
    """Where a model's rows are not proved independent, each has the answer that it has alone."""
    queue = Queue()
    await prediction(queue, batched=False).run(batch(np.arange(20)))
    assert queue.pieces == [1] * 20


async def test_a_row_that_the_model_refuses_is_found_among_others() -> None:
    """It is a bad row, in the place of its line among those that could not be read."""
    values = np.arange(300.0)
    values[[7, 200]] = -1
    asked = prediction(Queue())
    (scored,) = await asked.run(batch(values, BadRow(100, "/a", "is missing")))
    assert sorted(bad.line for bad in scored.bad) == [8, 100, 202]
    assert scored.bad[0].message == "a value is one that the model refuses"
    assert scored.outputs is not None
    assert len(scored.outputs[0]) == len(scored.lines) == 298
    assert (asked.good, asked.bad) == (298, 3)


async def test_no_room_is_waited_for_and_not_for_ever() -> None:
    """A full queue is tried again; once the model's deadline is over, or the caller's time, it is said."""
    assert (await prediction(Queue(full=2)).run(batch([1.0])))[0].outputs is not None
    with pytest.raises(DeadlineExceeded, match="other requests leave no room"):
        await prediction(Queue(full=1000)).run(batch([1.0]))
    with pytest.raises(DeadlineExceeded, match="the time that it may take is over"):
        await prediction(Queue(full=1000), timeout=0.05).run(batch([1.0]))


async def test_what_ends_a_model_ends_its_rows() -> None:
    """An error that is none of the rows' is no bad row."""
    with pytest.raises(NotReady):
        await prediction(Queue()).run(batch([1.0, 1e12]))
