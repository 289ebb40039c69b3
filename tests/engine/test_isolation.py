"""Who runs with whom where some requests make the model fail."""

from __future__ import annotations

from collections.abc import Hashable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine import isolation
from serving.engine.isolation import Isolation
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed
from serving.http_api.fast_path.prediction import FastPathPrediction


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
    """Answers each request with its number, unless one of them is bad.

    now: monotonic seconds. most: requests in one run beyond which it fails, whoever they are.
    """

    def __init__(self) -> None:
        self.most = 1000
        self.now = 100.0
        self.runs: list[list[int]] = []

    def __call__(self, requests: list[Request]) -> list[Outcome]:
        sent = [request for request in requests if isinstance(request, Sent)]
        self.runs.append([request.number for request in sent])
        if len(sent) > self.most or any(request.bad for request in sent):
            raise InferenceFailed("no")
        return [(np.array([request.number]),) for request in sent]

    def check(self, made: Isolation, batch: list[Request]) -> None:
        """Run a batch, and check every answer."""
        for request, outcome in zip(batch, made.outcomes(batch), strict=True):
            assert isinstance(request, Sent)
            if request.bad:
                assert isinstance(outcome, InferenceFailed)
                assert [request.number] in self.runs  # it failed alone
            else:
                assert not isinstance(outcome, InferenceFailed)
                assert outcome[0].tolist() == [request.number]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model()
    monkeypatch.setattr(isolation, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def batch(size: int = 32, *bad: int, start: int = 0) -> list[Request]:
    return [Sent(start + i, bad=i in bad) for i in range(size)]


def poisoned(batches: int, share: float, size: int = 32) -> list[list[Request]]:
    """Make batches of which a share is bad, at random."""
    rng = np.random.default_rng(5)
    return [[Sent(i, bad=bool(bad)) for i, bad in enumerate(rng.random(size) < share)] for _ in range(batches)]


@settings(deadline=None)
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
        model.check(made, sent)


def test_whole_batches_run_while_none_fails_and_again_soon_after(model: Model) -> None:
    """A batch of healthy requests is one run, and is so again a second after the last that failed."""
    made = Isolation(model)
    model.check(made, batch())
    assert model.runs == [list(range(32))]
    for some in poisoned(50, 0.1):
        model.check(made, some)
    model.now += 1.5
    model.runs.clear()
    model.check(made, batch())
    assert model.runs == [list(range(32))]


def test_requests_that_only_fail_together_are_all_answered(model: Model) -> None:
    """Where a batch is too large for the model, and no request is at fault, none is refused."""
    made = Isolation(model)
    model.most = 5
    for _ in range(30):
        model.check(made, batch())


def test_a_single_culprit_is_found_in_few_runs(model: Model) -> None:
    """The first time that anything fails, one bad request of 32 takes two runs a halving."""
    for bad in range(32):
        model.runs.clear()
        model.check(Isolation(model), batch(32, bad))
        assert len(model.runs) <= 11


def test_where_many_fail_hardly_any_runs_twice(model: Model) -> None:
    """Where one request in ten fails, whoever sends it, a healthy request runs hardly more than once."""
    made = Isolation(model)
    batches = poisoned(100, 0.1)
    for some in batches:
        for request in some:
            assert isinstance(request, Sent)
            request._sender = request.number
        model.check(made, some)
    assert sum(map(len, model.runs)) < 1.3 * 3200


def test_strangers_run_without_the_sender_of_what_fails(model: Model) -> None:
    """Others' requests run as one batch while one connection's fail, until it has been quiet for a second."""
    made = Isolation(model)

    def mixed(*, bad: bool) -> list[Request]:
        return [Sent(i, bad=bad and i == 7, sender=i) for i in range(32)]

    for _ in range(20):
        model.check(made, mixed(bad=True))
    others = [i for i in range(32) if i != 7]
    model.runs.clear()
    model.check(made, mixed(bad=True))
    assert model.runs == [others, [7]]
    model.runs.clear()
    model.check(made, mixed(bad=False))
    assert model.runs == [others, [7]]
    model.now += 1.5
    model.runs.clear()
    model.check(made, mixed(bad=False))
    assert sum(map(len, model.runs)) == 32
    assert [7] not in model.runs


def test_a_connection_is_the_sender_of_all_its_requests() -> None:
    """What one connection sends is told apart from what others send, without keeping it in memory."""
    one, other = object(), object()
    turns = [FastPathPrediction(fast_path, b"", None) for fast_path in (one, one, other)]  # type: ignore[arg-type]
    assert turns[0].sender == turns[1].sender != turns[2].sender
    assert isinstance(turns[0].sender, int)
