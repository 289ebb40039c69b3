"""Who runs with whom where some requests make the model fail, and what that costs."""

from __future__ import annotations

from collections.abc import Hashable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import isolation
from serving.engine.admission import Pace
from serving.engine.isolation import Isolation, cheapest
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed
from serving.http_api.lane import _Turn


class Sent(Request):
    """A request for one row, whose sender is known."""

    def __init__(self, number: int, *, bad: bool = False, sender: Hashable = None) -> None:
        self.number = number
        self.rows = 1
        self.bad = bad
        self._sender = sender

    @property
    def sender(self) -> Hashable:
        return self._sender

    def reply(self, outcome: Outcome) -> None:
        raise AssertionError("whoever isolates answers nobody")


class Model:
    """Answers each request with its number, unless one of them is bad; seconds by a clock that it moves itself.

    fixed, each: what a run and a row of it cost. late: a run that fails costs as much as one that passes; it costs
    `refusal` besides. now: monotonic seconds. most: requests in one run beyond which it fails, whoever they are.
    """

    def __init__(self, fixed: float = 1e-5, each: float = 1e-6, *, refusal: float = 4e-5, late: bool = False) -> None:
        self.fixed, self.each, self.refusal, self.late = fixed, each, refusal, late
        self.most = 1000
        self.clock = 0.0
        self.now = 100.0
        self.runs: list[list[int]] = []

    def __call__(self, requests: list[Request]) -> list[Outcome]:
        sent = [request for request in requests if isinstance(request, Sent)]
        self.runs.append([request.number for request in sent])
        fails = len(sent) > self.most or any(request.bad for request in sent)
        if self.late or not fails:
            self.clock += self.fixed + self.each * len(sent)
        if fails:
            self.clock += self.refusal
            raise InferenceFailed("no")
        return [(np.array([request.number]),) for request in sent]

    def seconds(self, made: Isolation, batch: list[Request]) -> float:
        """Run a batch, check every answer, and return what it took."""
        before = self.clock
        for request, outcome in zip(batch, made.outcomes(batch), strict=True):
            assert isinstance(request, Sent)
            if request.bad:
                assert isinstance(outcome, InferenceFailed)
                assert [request.number] in self.runs  # it failed alone
            else:
                assert not isinstance(outcome, InferenceFailed)
                assert outcome[0].tolist() == [request.number]
        return self.clock - before


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model()
    monkeypatch.setattr(isolation, "time", SimpleNamespace(thread_time=lambda: made.clock, monotonic=lambda: made.now))
    return made


def batch(size: int = 32, *bad: int, start: int = 0) -> list[Request]:
    return [Sent(start + i, bad=i in bad) for i in range(size)]


def poisoned(batches: int, share: float, size: int = 32) -> list[list[Request]]:
    """Make batches of which a share is bad, at random."""
    rng = np.random.default_rng(5)
    return [[Sent(i, bad=bool(bad)) for i, bad in enumerate(rng.random(size) < share)] for _ in range(batches)]


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1), st.integers(0, 9)), min_size=1, max_size=20))
def test_who_is_refused_has_failed_alone_and_nobody_else_is(batches: list[tuple[int, float, int]]) -> None:
    """Whatever the batches and whoever is bad in them, each healthy request gets its own answer, and no other fails."""
    model, rng = Model(), np.random.default_rng(1)
    made = Isolation(model)
    for size, share, senders in batches:
        sent: list[Request] = [
            Sent(i, bad=bool(rng.random() < share), sender=i % (senders + 1) or None) for i in range(size)
        ]
        model.runs.clear()
        model.seconds(made, sent)


def test_whole_batches_run_while_none_fails_and_again_soon_after(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of healthy requests is one run; after failures it is so again in 100 batches, and no clock is read."""
    made = Isolation(model)
    model.seconds(made, batch())
    assert model.runs == [list(range(32))]
    for some in poisoned(50, 0.1):
        model.seconds(made, some)
    for _ in range(100):
        model.seconds(made, batch())
    model.runs.clear()
    monkeypatch.setattr(isolation, "time", None)
    for _ in range(10):
        model.seconds(made, batch())
    assert model.runs == [list(range(32))] * 10


def test_requests_that_only_fail_together_are_all_answered(model: Model) -> None:
    """Where a batch is too large for the model, and no request is at fault, none is refused."""
    made = Isolation(model)
    model.most = 5
    for _ in range(30):
        model.seconds(made, batch())


def test_a_single_culprit_is_found_in_few_runs(model: Model) -> None:
    """The first time that anything fails, one bad request of 32 takes two runs a halving."""
    for bad in range(32):
        model.runs.clear()
        model.seconds(Isolation(model), batch(32, bad))
        assert len(model.runs) <= 11


@pytest.mark.parametrize("late", [False, True])
def test_where_rows_cost_much_hardly_any_runs_twice(model: Model, late: bool) -> None:
    """Rows that cost more than a refusal are run once, though one request in ten fails, early or late."""
    model.each, model.late = 3e-4, late
    made = Isolation(model)
    for some in poisoned(30, 0.1):
        model.seconds(made, some)
    model.runs.clear()
    for some in poisoned(100, 0.1):
        model.seconds(made, some)
    assert sum(map(len, model.runs)) <= 1.03 * 3200


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_where_runs_cost_much_groups_are_made(model: Model, share: float, late: bool) -> None:
    """Where a run costs more than its rows, it takes less than nine tenths of what single runs take."""
    model.fixed, model.late = 1e-4, late
    made = Isolation(model)
    for some in poisoned(50, share):
        model.seconds(made, some)
    batches = poisoned(100, share)
    spent = sum(model.seconds(made, some) for some in batches)
    bad = sum(request.bad for some in batches for request in some if isinstance(request, Sent))
    alone = (3200 - bad) * (model.fixed + model.each) + bad * (model.refusal + late * (model.fixed + model.each))
    assert spent < 0.9 * alone


def test_strangers_run_without_the_sender_of_what_fails(model: Model) -> None:
    """Others' requests run as one batch while one connection's fail, until it has been quiet for a second."""
    made = Isolation(model)

    def mixed(*, bad: bool) -> list[Request]:
        return [Sent(i, bad=bad and i == 7, sender=i) for i in range(32)]

    for _ in range(20):
        model.seconds(made, mixed(bad=True))
    others = [i for i in range(32) if i != 7]
    model.runs.clear()
    model.seconds(made, mixed(bad=True))
    assert model.runs == [others, [7]]
    model.runs.clear()
    model.seconds(made, mixed(bad=False))
    assert model.runs == [others, [7]]
    model.now += 1.5
    model.runs.clear()
    model.seconds(made, mixed(bad=False))
    assert sum(map(len, model.runs)) == 32
    assert [7] not in model.runs


def test_a_connection_is_the_sender_of_all_its_requests() -> None:
    """What one connection sends is told apart from what others send, without keeping it in memory."""
    one, other = object(), object()
    turns = [_Turn(lane, b"", None) for lane in (one, one, other)]  # type: ignore[arg-type]
    assert turns[0].sender == turns[1].sender != turns[2].sender
    assert isinstance(turns[0].sender, int)


def _pace(fixed: float, each: float) -> Pace:
    made = Pace()
    for rows in (1, 8) * 100:
        made.learn(rows, fixed + each * rows)
    return made


@pytest.mark.parametrize(
    ("share", "passed", "failed", "least", "greatest"),
    [
        (0.1, (1e-5, 3e-4), (3e-4, 3e-4), 1, 1),
        (0.1, (1e-5, 3e-4), (4e-5, 0.0), 1, 1),
        (0.1, (1e-4, 1e-6), (4e-5, 0.0), 3, 6),
        (0.01, (1e-4, 1e-6), (4e-5, 0.0), 8, 16),
        (0.0001, (1e-5, 1e-6), (4e-5, 0.0), 32, 32),
        (0.9, (1e-4, 1e-6), (4e-5, 0.0), 1, 1),
    ],
)
def test_groups_are_as_large_as_their_costs_say(
    share: float, passed: tuple[float, float], failed: tuple[float, float], least: int, greatest: int
) -> None:
    """Rows that cost much and many that fail make single runs; the cost of a run, and few that fail, large groups."""
    assert least <= cheapest(32, share, 1.0, _pace(*passed), _pace(*failed)) <= greatest


def test_half_is_tried_while_nothing_is_known() -> None:
    """Before any cost is known a group that failed is halved."""
    assert cheapest(31, 0.03, 1.0, Pace(), Pace()) == 16
