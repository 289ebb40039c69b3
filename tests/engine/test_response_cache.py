"""The response cache: what is answered again, to whom, and above all what never is."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.batcher import Batcher, Unobserved
from serving.engine.limits import CacheSize
from serving.engine.request import HIGH, LOW, NORMAL, Outcome, Request
from serving.engine.response_cache import MOST_BYTES, ResponseCache
from serving.errors import DeadlineExceeded, InferenceFailed, QueueFull
from serving.tensors import Overriding, Tensors


class Numbering:
    """A model that answers each run with a number of its own, so that it shows whose answer one is. 13 fails."""

    def __init__(self) -> None:
        self.runs = 0
        self.open = threading.Event()
        self.open.set()

    def __call__(self, inputs: Tensors) -> Tensors:
        assert self.open.wait(10)
        self.runs += 1
        if inputs[0].dtype.kind == "f" and (inputs[0] == 13).any():
            raise InferenceFailed("13")
        return (np.full(len(inputs[0]), self.runs),)


class Asked(Request):
    def __init__(
        self, array: Any, caller: Hashable = "me", *, deadline: float = 60.0, priority: int = NORMAL, whole: Any = None
    ) -> None:
        self.inputs = (np.asarray(array),) if whole is None else whole
        self.rows = len(self.inputs[0])
        self.by = caller
        self.deadline = time.monotonic() + deadline
        self.priority = priority
        self.done = False
        self.answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def caller(self) -> Hashable:
        return self.by

    def reply(self, outcome: Outcome) -> None:
        assert not self.answer.done(), "answered twice"
        self.answer.set_result(outcome)

    async def run(self) -> int:
        """Return the number of the run that its answer came from."""
        outcome = await asyncio.wait_for(self.answer, 10)
        assert isinstance(outcome, tuple), outcome
        return int(outcome[0][0])


class Counted(Unobserved):
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def cached(self, outcome: str) -> None:
        self.outcomes.append(outcome)


class Made:
    """A model behind a batcher behind a cache."""

    def __init__(self, **size: int) -> None:
        self.model = Numbering()
        loop = asyncio.get_running_loop()
        self.batcher = Batcher(
            self.model,
            name="cached",
            batched=False,
            uniform=False,
            max_rows=64,
            max_queued_rows=100,
            max_delay=0.0,
            instances=1,
            loop=loop,
            observer=Unobserved(),
        )
        self.seen = Counted()
        self.cache = ResponseCache(
            self.batcher, CacheSize.model_construct(**(size or {"entries": 100})), loop=loop, observer=self.seen
        )

    def submit(self, request: Asked) -> Asked:
        self.cache.submit(request)
        return request

    async def ask(self, array: Any, caller: Hashable = "me") -> int:
        return await self.submit(Asked(array, caller)).run()

    async def held(self, value: float = 99.0) -> Asked:
        """Make the model busy, so that what follows waits."""
        self.model.open.clear()
        first = self.submit(Asked([value]))
        while self.batcher.queued_rows:  # noqa: ASYNC110  the batcher has no event for it
            await asyncio.sleep(0)
        return first


async def test_the_same_tensors_are_answered_without_a_run() -> None:
    """Equal requests of one caller get the answer of one run, and hits and misses are counted."""
    made = Made()
    assert [await made.ask([1.0, 2.0]) for _ in range(3)] == [1, 1, 1]
    assert await made.ask([2.0, 1.0]) == 2
    assert made.seen.outcomes == ["miss", "hit", "hit", "miss"]


TEXTS = np.array(["ab", "c"], dtype=object)
DIFFERENT = {
    "a zero with a sign": ([0.0], [-0.0]),
    "the shape": ([[1.0, 2.0]], [[1.0], [2.0]]),
    "the datatype, with the same bits": (np.array([1.0]), np.array([1.0]).view(np.int64)),
    "the bits of a NaN": (np.array([0x7FF8 << 48]).view(float), np.array([(0x7FF8 << 48) + 1]).view(float)),
    "where one text ends": (TEXTS, np.array(["a", "bc"], dtype=object)),
    "how a text is composed": (np.array(["\u00e9"], dtype=object), np.array(["e\u0301"], dtype=object)),
    "the order": ([1.0, 2.0], [2.0, 1.0]),
}


@pytest.mark.parametrize("what", DIFFERENT)
async def test_what_differs_is_another_request(what: str) -> None:
    """Whatever a model could tell apart is run apart; the same is not."""
    made = Made()
    one, other = DIFFERENT[what]
    assert [await made.ask(one), await made.ask(other), await made.ask(np.array(one)), await made.ask(other)] == [
        1,
        2,
        1,
        2,
    ]


async def test_callers_share_no_answer() -> None:
    """A caller never gets what another's request brought, neither kept nor in progress; unknown ones share nothing."""
    made = Made()
    assert [await made.ask([1.0], caller) for caller in ("a", "b", "a", "b")] == [1, 2, 1, 2]
    assert [await made.ask([1.0], None) for _ in range(2)] == [3, 4]
    first = await made.held()
    waiting = [made.submit(Asked([5.0], caller)) for caller in ("a", "b", "a", None, None)]
    made.model.open.set()
    assert await first.run() == 5
    numbers = [await asked.run() for asked in waiting]
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 4


CONFUSABLE = [pair for pairs in DIFFERENT.values() for pair in pairs]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", None]), st.integers(0, len(CONFUSABLE) - 1), st.sampled_from([HIGH, LOW]),
            st.sampled_from(["ask", "ask", "leave", "hold", "open"]),
        ),
        max_size=40,
    ),
    st.sampled_from([{"entries": 3}, {"bytes": 4096}]),
)  # fmt: skip
def test_whose_answer_is_it(steps: list[tuple[Hashable, int, int, str]], size: dict[str, int]) -> None:
    """However requests interleave and leave, every run's answer goes to one caller and one input, and each gets one."""

    async def play() -> None:
        made = Made(**size)
        asked: list[tuple[Hashable, int, Asked]] = []
        for caller, which, priority, action in steps:
            if action == "hold":
                made.model.open.clear()
            elif action == "open":
                made.model.open.set()
                await asyncio.sleep(0.0005)
            else:
                request = made.submit(Asked(CONFUSABLE[which], caller, priority=priority))
                request.done = action == "leave"
                asked.append((caller, which, request))
        made.model.open.set()
        owners = defaultdict(set)
        for caller, which, request in asked:
            if not request.done:
                array = np.asarray(CONFUSABLE[which])
                same = (array.tolist(), array.tobytes()) if array.dtype != object else array.tolist()
                owner = (caller, array.dtype, array.shape, str(same)) if caller else id(request)
                owners[await request.run()].add(owner)
        assert all(len(found) == 1 for found in owners.values())
        assert all(request.done or request.answer.done() for _, _, request in asked)
        await made.batcher.close()

    uvloop.run(play())


async def test_equal_requests_in_progress_run_once() -> None:
    """While one runs, equal ones wait for its answer; the first may leave, and the others still get it."""
    made = Made()
    first = await made.held()
    waiting = [made.submit(Asked([5.0])) for _ in range(4)]
    waiting[0].done = True
    made.model.open.set()
    assert [await asked.run() for asked in (first, *waiting[1:])] == [1, 2, 2, 2]
    assert not waiting[0].answer.done()
    assert made.model.runs == 2
    assert await made.ask([5.0]) == 2
    assert made.seen.outcomes == ["miss", "miss", "joined", "joined", "joined", "hit"]


async def test_what_nobody_waits_for_is_not_run() -> None:
    """Where all have left the rows are dropped, and who comes after them starts anew."""
    made = Made()
    first = await made.held()
    for asked in [made.submit(Asked([5.0])) for _ in range(2)]:
        asked.done = True
    last = made.submit(Asked([5.0]))
    made.model.open.set()
    assert [await first.run(), await last.run()] == [1, 2]
    assert made.model.runs == 2


async def test_each_has_its_own_deadline() -> None:
    """Who waits with others is told at its own deadline, whoever came first, and the rest wait on."""
    made = Made()
    first = await made.held()
    short, long = made.submit(Asked([5.0], deadline=0.001)), made.submit(Asked([5.0]))
    later = made.submit(Asked([6.0]))
    soon = made.submit(Asked([6.0], deadline=0.001))
    made.cache.expire(time.monotonic() + 1)
    made.batcher.expire(time.monotonic() + 1)
    for asked in (short, soon):
        assert isinstance(await asked.answer, DeadlineExceeded)
    made.model.open.set()
    assert [await asked.run() for asked in (first, long, later)] == [1, 2, 3]


async def test_errors_are_told_to_all_and_not_kept() -> None:
    """A run that fails fails for those who waited for it, and for no later one; nor is a refusal kept."""
    made = Made()
    first = await made.held()
    waiting = [made.submit(Asked([13.0])) for _ in range(2)]
    made.model.open.set()
    await first.run()
    assert all([isinstance(await asked.answer, InferenceFailed) for asked in waiting])
    runs = made.model.runs
    assert isinstance(await made.submit(Asked([13.0])).answer, InferenceFailed)
    assert made.model.runs == runs + 1
    await made.held(98.0)
    full = [made.submit(Asked([float(value)])) for value in range(100, 200)]
    for _ in range(2):
        with pytest.raises(QueueFull):
            made.submit(Asked([5.0]))
    made.model.open.set()
    await full[-1].run()


async def test_a_faster_line_is_not_left_for_a_slower_one() -> None:
    """A request of high priority does not wait for an equal one of low priority."""
    made = Made()
    first = await made.held()
    low, other, high = (
        made.submit(Asked([value], priority=priority)) for value, priority in ((5.0, LOW), (6.0, NORMAL), (5.0, HIGH))
    )
    made.model.open.set()
    assert await first.run() == 1
    assert await high.run() < await other.run()
    assert await low.run() != await high.run()


async def test_a_reply_that_fails_keeps_no_other_from_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Those who wait for one run are answered though writing to one of them fails."""
    made = Made()
    await made.held()
    broken, healthy = made.submit(Asked([5.0])), made.submit(Asked([5.0]))
    broken.answer.cancel()
    made.model.open.set()
    assert await healthy.run() == 2
    assert "an answer could not be given" in caplog.text


async def test_no_more_is_kept_than_was_allowed() -> None:
    """By entries and by bytes the longest unused go first; what is too large is not kept, and weights run alone."""
    made = Made(entries=2)
    assert [await made.ask([float(value)]) for value in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 4]
    by_bytes = Made(bytes=64 * 1024)
    for value in (*range(100, 300), *range(299, 99, -1)):
        await by_bytes.ask(np.full(100, float(value)))
    assert 10 < by_bytes.seen.outcomes.count("hit") < 64 * 1024 / 1600  # bytes of a request and its answer
    large = np.zeros(MOST_BYTES // 8 + 1)
    assert await by_bytes.ask(large) != await by_bytes.ask(large)
    weights = Overriding((np.array([1.0]),))
    weights.overrides = {"w": np.array([1.0])}
    runs = [await by_bytes.submit(Asked([], whole=weights)).run() for _ in range(2)]
    assert runs[0] != runs[1]


async def test_what_is_kept_is_nobodys_to_change() -> None:
    """A kept answer is a copy of its own that can't be written to: the batch that it came from is let go."""
    made = Made()
    first = made.submit(Asked([1.0]))
    await first.run()
    (given,) = first.answer.result()
    given[:] = 77
    again = made.submit(Asked([1.0]))
    assert await again.run() == 1
    (kept,) = again.answer.result()
    assert kept.base is None
    with pytest.raises(ValueError, match="read-only"):
        kept[:] = 0


async def test_it_goes_with_its_version() -> None:
    """With the last request that is answered or has left, a cache and what it keeps go, and wait for no collector."""
    made = Made()
    first = await made.held()
    left = made.submit(Asked([5.0]))
    left.done = True
    made.model.open.set()
    assert await first.run() == 1
    await made.batcher.close()
    gc.collect()
    gc.disable()
    try:
        cache = weakref.ref(made.cache)
        made.batcher.abandon()
        del made
        assert cache() is None
    finally:
        gc.enable()
