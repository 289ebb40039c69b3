"""Group commit: who runs with whom, who is dropped, who is told to come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serving.engine.batcher import REST_S, Batcher, Unobserved
from serving.engine.request import HIGH, LOW, NORMAL, Outcome, Request
from serving.errors import DeadlineExceeded, InferenceFailed, NotReady, PayloadTooLarge, QueueFull, ServingError
from serving.tensors import Overriding, Tensors


class Model:
    """A model that doubles its input; it can be held, and refuses rows that hold 13."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray[Any, Any]] = []
        self.open = threading.Event()
        self.open.set()

    def __call__(self, inputs: Tensors) -> Tensors:
        assert self.open.wait(10)
        self.batches.append(inputs[0])
        if (inputs[0] == 13).any():
            raise InferenceFailed("13")
        return (inputs[0] * 2,)

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


class Asked(Request):
    """A request whose answer can be awaited."""

    def __init__(self, *rows: float, width: int = 1, deadline: float = 60.0, priority: int = NORMAL) -> None:
        self.inputs = (np.repeat(np.array(rows, dtype=np.float32).reshape(-1, 1), width, axis=1),)
        self.rows = len(rows)
        self.deadline = time.monotonic() + deadline
        self.done = False
        self.priority = priority
        self.answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def reply(self, outcome: Outcome) -> None:
        assert not self.answer.done(), "answered twice"
        self.answer.set_result(outcome)

    async def values(self) -> list[float]:
        outcome = await asyncio.wait_for(self.answer, 10)
        assert not isinstance(outcome, ServingError), outcome
        return [float(v) for v in outcome[0][:, 0]]


def batcher(model: Callable[[Tensors], Tensors], **changes: Any) -> Batcher:
    settings: dict[str, Any] = {
        "name": "test",
        "batched": True,
        "uniform": True,
        "max_rows": 64,
        "max_queued_rows": 100,
        "max_delay": 0.0,
        "instances": 1,
        "loop": asyncio.get_running_loop(),
        "observer": Unobserved(),
        **changes,
    }
    return Batcher(model, **settings)


def threads(name: str) -> int:
    return sum(thread.name.startswith(f"{name}-") for thread in threading.enumerate())


async def test_a_model_has_threads_only_while_it_is_asked() -> None:
    """They start with its first batches, end when it has had none for a while, and start again."""
    made = batcher(Model(), name="seldom", instances=2)
    assert threads("seldom") == 0
    for _ in range(2):
        for _ in range(3):
            assert await ran_alone(made, Asked(1, 2)) == [2, 4]
        assert threads("seldom") == 2
        made.expire(time.monotonic())
        assert threads("seldom") == 2
        made.expire(time.monotonic() + REST_S + 1)
        while threads("seldom"):  # noqa: ASYNC110  threads have no event for it
            await asyncio.sleep(0.001)
    await made.close()


async def test_where_the_system_gives_no_thread_callers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit of processes a model that has no thread yet answers NotReady, and once there is one, as usual."""
    made = batcher(Model(), name="starved")

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        asked = Asked(1)
        made.submit(asked)
        assert isinstance(await asyncio.wait_for(asked.answer, 10), NotReady)
    assert await ran_alone(made, Asked(1)) == [2]
    await made.close()


async def ran_alone(made: Batcher, request: Asked) -> list[float]:
    made.submit(request)
    return await request.values()


async def held(model: Model, made: Batcher) -> Asked:
    """Make the model busy with one request, so that what follows gathers."""
    model.open.clear()
    first = Asked(1)
    made.submit(first)
    while made.queued_rows:  # noqa: ASYNC110  the batcher has no event for it
        await asyncio.sleep(0)
    return first


async def test_what_arrives_while_a_batch_runs_runs_together_next() -> None:
    """Requests gather behind a running batch, run as one, and each gets its own rows."""
    model = Model()
    made = batcher(model)
    first = await held(model, made)
    others = [Asked(float(i), float(i) + 0.5) for i in range(10)]
    for other in others:
        made.submit(other)
    model.open.set()
    assert await first.values() == [2.0]
    assert [await o.values() for o in others] == [[2.0 * i, 2.0 * i + 1] for i in range(10)]
    assert model.sizes == [1, 20]


async def test_a_batch_has_at_most_max_rows_and_a_larger_request_runs_alone() -> None:
    """Rows are counted, not requests; one that is larger than a batch is not cut."""
    model = Model()
    made = batcher(model, max_rows=4)
    await held(model, made)
    asked = [Asked(1, 2, 3), Asked(4, 5), Asked(6), Asked(*range(9)), Asked(7)]
    for request in asked:
        made.submit(request)
    model.open.set()
    for request in asked:
        await request.values()
    assert model.sizes == [1, 3, 3, 9, 1]


async def test_shapes_never_mix_and_order_is_kept_within_each() -> None:
    """Requests of different trailing shapes run in batches of their own."""
    model = Model()
    made = batcher(model, uniform=False)
    await held(model, made)
    asked = [Asked(float(i), width=1 + i % 2) for i in range(6)]
    for request in asked:
        made.submit(request)
    model.open.set()
    assert [await r.values() for r in asked] == [[2.0 * i] for i in range(6)]
    assert [b.shape for b in model.batches] == [(1, 1), (3, 1), (3, 2)]


async def test_only_the_culprit_fails() -> None:
    """A batch that fails is halved until only the requests that break it fail."""
    model = Model()
    made = batcher(model)
    await held(model, made)
    asked = [Asked(float(i)) for i in range(30)]
    for request in asked:
        made.submit(request)
    model.open.set()
    for i, request in enumerate(asked):
        if i == 13:
            assert isinstance(await request.answer, InferenceFailed)
        else:
            assert await request.values() == [2.0 * i]


async def test_a_full_queue_says_when_to_come_back() -> None:
    """Beyond max_queued_rows a request is refused at once, with whole seconds; what could never fit is told so."""
    model = Model()
    made = batcher(model, max_queued_rows=10)
    await held(model, made)
    waiting = Asked(*range(10))
    made.submit(waiting)
    with pytest.raises(QueueFull) as refused:
        made.submit(Asked(1))
    assert isinstance(refused.value.retry_after, int)
    assert refused.value.retry_after >= 1
    with pytest.raises(PayloadTooLarge, match="11 rows"):
        made.submit(Asked(*range(11)))
    model.open.set()
    assert len(await waiting.values()) == 10
    late = Asked(1)
    made.submit(late)
    assert await late.values() == [2.0]


async def test_the_departed_and_the_late_are_not_run() -> None:
    """Whoever has left costs no rows; whoever's deadline passed is told so, even while the model is busy."""
    model = Model()
    made = batcher(model)
    await held(model, made)
    left, late, live = Asked(5), Asked(6, deadline=0.001), Asked(7)
    for request in (left, late, live):
        made.submit(request)
    left.done = True
    await asyncio.sleep(0.01)
    made.expire(time.monotonic())
    assert isinstance(late.answer.result(), DeadlineExceeded)
    assert made.queued_rows == 1
    model.open.set()
    assert await live.values() == [14.0]
    assert model.sizes == [1, 1]
    assert not left.answer.done()


async def test_a_model_without_a_batch_dimension_runs_one_by_one() -> None:
    """Where the batch is fixed at 1, several rows of one request run one after the other and come back together."""
    model = Model()
    made = batcher(model, batched=False, one_by_one=True)
    asked = [Asked(1, 2, 3), Asked(4)]
    for request in asked:
        made.submit(request)
    assert await asked[0].values() == [2.0, 4.0, 6.0]
    assert await asked[1].values() == [8.0]
    assert model.sizes == [1, 1, 1, 1]


async def test_waiting_for_company_is_a_choice() -> None:
    """With max_delay an idle model waits, and requests from different turns of the loop run together."""
    model = Model()
    made = batcher(model, max_delay=0.05)
    asked = [Asked(1), Asked(2)]
    made.submit(asked[0])
    await asyncio.sleep(0.001)
    made.submit(asked[1])
    for request in asked:
        await request.values()
    assert model.sizes == [2]


async def test_rows_that_cannot_be_told_apart_are_given_to_nobody() -> None:
    """A model that answers another number of rows than it got is an error, never another caller's rows."""
    made = batcher(lambda inputs: (inputs[0][:1],))
    asked = [Asked(1, 2), Asked(3, 4)]
    for request in asked:
        made.submit(request)
    for request in asked:
        assert isinstance(await asyncio.wait_for(request.answer, 10), InferenceFailed)


async def test_a_fault_outside_the_model_is_answered_and_the_thread_lives() -> None:
    """Whatever is raised on the executor's thread, callers get an answer and the next batch runs."""
    broken = True

    def model(inputs: Tensors) -> Tensors:
        if broken:
            raise ZeroDivisionError
        return inputs

    made = batcher(model)
    first = Asked(1)
    made.submit(first)
    assert isinstance(await asyncio.wait_for(first.answer, 10), InferenceFailed)
    broken = False
    second = Asked(1)
    made.submit(second)
    assert await second.values() == [1.0]


async def test_closing_finishes_what_was_accepted() -> None:
    """close answers all that waits, then refuses."""
    model = Model()
    made = batcher(model)
    first = await held(model, made)
    second = Asked(2)
    made.submit(second)
    closing = asyncio.ensure_future(made.close())
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        made.submit(Asked(3))
    model.open.set()
    await asyncio.wait_for(closing, 10)
    assert await first.values() == [2.0]
    assert await second.values() == [4.0]


async def test_instances_run_side_by_side() -> None:
    """With two instances a second batch starts while the first still runs."""
    both = threading.Barrier(2, timeout=10)

    def model(inputs: Tensors) -> Tensors:
        both.wait()
        return inputs

    made = batcher(model, instances=2)
    asked = [Asked(1), Asked(2)]
    for request in asked:
        made.submit(request)
        await asyncio.sleep(0.001)
    for request in asked:
        await request.values()


async def test_higher_priority_runs_first_and_none_starves() -> None:
    """Of what waits, higher priority runs first; yet of every four batches one begins with the last in line."""
    model = Model()
    made = batcher(model, max_rows=1)
    await held(model, made)
    low = [Asked(3.0, priority=LOW) for _ in range(4)]
    normal = [Asked(2.0) for _ in range(4)]
    high = [Asked(1.0, priority=HIGH) for _ in range(12)]
    for request in (*low, *normal, *high):
        made.submit(request)
    model.open.set()
    for request in (*low, *normal, *high):
        await request.values()
    ran = [int(batch[0, 0]) for batch in model.batches[1:]]
    assert ran[:16].count(1) == 8
    assert ran[:16].count(2) == 4
    assert ran[:16].count(3) == 4
    assert 1 in ran[:2]


async def test_higher_priority_takes_the_place_of_lower_in_a_full_queue() -> None:
    """Where the queue is full, the newest of lower priority is told to come back, and the higher one is taken."""
    model = Model()
    made = batcher(model, max_queued_rows=3)
    await held(model, made)
    older, newer = Asked(1, 1, priority=LOW), Asked(2, priority=LOW)
    for request in (older, newer):
        made.submit(request)
    with pytest.raises(QueueFull):
        made.submit(Asked(9, priority=LOW))
    high = Asked(3, priority=HIGH)
    made.submit(high)
    assert isinstance(newer.answer.result(), QueueFull)
    model.open.set()
    assert await high.values() == [6.0]
    assert await older.values() == [2.0, 2.0]
    assert made.queued_rows == 0


async def test_what_cannot_be_answered_in_time_is_refused_at_once() -> None:
    """Behind a queue that takes longer than its deadline a request is refused; with more time it is taken."""
    model = Model()

    def slow(inputs: Tensors) -> Tensors:
        time.sleep(0.02)
        return model(inputs)

    made = batcher(slow, max_rows=1)
    for _ in range(3):
        assert await ran_alone(made, Asked(1)) == [2.0]
    await held(model, made)
    waiting = [Asked(1) for _ in range(90)]
    for request in waiting:
        made.submit(request)
    with pytest.raises(QueueFull, match="deadline") as refused:
        made.submit(Asked(1, deadline=1.0))
    assert 1 <= refused.value.retry_after <= 3  # 90 rows at 20 ms take 1.8 s
    patient = Asked(1, deadline=30)
    made.submit(patient)
    for request in waiting:
        request.done = True
    model.open.set()
    assert await patient.values() == [2.0]


async def test_a_refused_queue_is_answered_in_every_line() -> None:
    """When all is refused, whoever runs or waits gets that answer once, whatever its priority, and closing ends."""
    model = Model()
    made = batcher(model)
    running = await held(model, made)
    waiting = [Asked(2, priority=priority) for priority in (HIGH, NORMAL, LOW)]
    for request in waiting:
        made.submit(request)
    made.refuse(NotReady("the end"))
    outcomes = [await asyncio.wait_for(request.answer, 10) for request in (running, *waiting)]
    assert all(isinstance(outcome, NotReady) for outcome in outcomes)
    assert made.queued_rows == 0
    await asyncio.wait_for(made.close(), 10)
    model.open.set()


class Broken(Asked):
    """A request whose answer can't be given."""

    def reply(self, outcome: Outcome) -> None:
        super().reply(outcome)
        raise RuntimeError("the transport is gone")


async def test_a_request_that_cannot_be_answered_costs_no_other_its_answer() -> None:
    """Whatever raises while one request is answered, run or refused, the others are answered and the model goes on."""
    model = Model()
    made = batcher(model, max_queued_rows=4)
    model.open.clear()
    requests = [Asked(0), Broken(1), Asked(2)]
    for request in requests:
        made.submit(request)
    model.open.set()
    assert [await request.values() for request in requests] == [[0], [2], [4]]
    assert await ran_alone(made, Asked(3)) == [6]

    model.open.clear()
    running = Asked(0)
    made.submit(running)
    late, low = [Broken(1, deadline=10), Asked(1, deadline=10)], [Broken(1, priority=LOW), Asked(1, priority=LOW)]
    for request in late:
        made.submit(request)
    made.expire(time.monotonic() + 11)
    for request in low:
        made.submit(request)
    high = Asked(*range(4), priority=HIGH)
    made.submit(high)
    assert {type(await request.answer) for request in late} == {DeadlineExceeded}
    assert {type(await request.answer) for request in low} == {QueueFull}
    model.open.set()
    assert await running.values() == [0]
    assert await high.values() == [0, 2, 4, 6]

    model.open.clear()
    stopped = [Broken(0), Broken(1), Asked(2)]
    for request in stopped:
        made.submit(request)
    made.refuse(NotReady("the end"))
    model.open.set()
    assert {type(await request.answer) for request in stopped} == {NotReady}
    await made.close()


async def test_who_sends_weights_of_his_own_runs_alone() -> None:
    """Requests that wait together are one batch, but for those that override weights of the graph; nobody waits on."""
    model = Model()
    made = batcher(model, uniform=False)
    model.open.clear()
    requests = [Asked(i) for i in range(7)]
    for request in (requests[2], requests[3], requests[6]):
        request.inputs = Overriding(request.inputs)
        request.inputs.overrides = {"w": np.zeros(2)}
    for request in requests:
        made.submit(request)
    await asyncio.sleep(0)
    model.open.set()
    assert [await request.values() for request in requests] == [[2.0 * i] for i in range(7)]
    alone = [batch.ravel().tolist() for batch in model.batches if {2, 3, 6} & set(batch.ravel().tolist())]
    assert sorted(alone) == [[2], [3], [6]]
    assert len(model.batches) < len(requests), "the others ran together"
    await made.close()


async def test_a_request_without_rows_has_its_turn() -> None:
    """An empty tensor is run as any other, and answered with none; it holds a place in the queue."""
    model = Model()
    made = batcher(model)
    nothing = Asked()
    made.submit(nothing)
    assert await nothing.values() == []
    await made.close()
