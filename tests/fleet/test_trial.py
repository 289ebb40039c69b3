"""The judge: when a new version stays, when it is taken back, and what the history says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from serving.fleet import transitions as to
from serving.fleet.ledger import Ledger
from serving.fleet.traffic import Judge, Traffic
from serving.fleet.trial import Clerk, Trial, decide, trial_of
from tests.conftest import MODELS

HERE = ("1", "2", "3")


def did(ok: float = 0, failed: float = 0, seconds: float = 0.001, **more: float) -> dict[str, float]:
    """Make the totals of a version that answered `ok` predictions of one row, `seconds` each."""
    count = ok + failed
    return {
        "ok": ok,
        "failed": failed,
        "rows": ok,
        "prediction_count": count,
        "prediction_sum": count * seconds,
        "inference_count": count,
        "inference_sum": count * seconds,
        **more,
    }


@pytest.mark.parametrize(
    ("rules", "seen", "other", "elapsed", "decision", "reason"),
    [
        ({"after_s": 60}, did(5), did(500), 90, "wait", "5 predictions so far"),
        ({"after_s": 60}, did(500), did(500), 30, "wait", "30 s to go"),
        ({"after_s": 60}, did(500), did(500), 60, "keep", "500 predictions in 60 s, 0 % failed"),
        ({"rows": 600}, did(500), did(500), 9e9, "wait", "100 rows to go"),
        ({"rows": 500}, did(500), did(500), 1, "keep", "500 predictions"),
        ({"rows": 500, "after_s": 5}, did(500), did(500), 1, "wait", "4 s to go"),
        ({"after_s": 60}, did(480, 20), did(500), 1, "take back", "4 % of its predictions failed, and 1 % is the most"),
        ({"after_s": 60, "error_rate": 0.05}, did(480, 20), did(500), 60, "keep", "4 % failed"),
        # What callers got wrong, or left, is not the version's fault; refusing more than the other version is.
        ({"after_s": 60}, did(480, 40, invalid=20, gone=20), did(480, 20, invalid=20), 60, "keep", "0 % failed"),
        ({"after_s": 60}, did(0, 40, invalid=40), did(500), 1, "take back", "it refused 100 % of the requests"),
        (
            {"after_s": 60, "latency_ratio": 1.5},
            did(500, seconds=0.002),
            did(500),
            1,
            "take back",
            "2.00 times as long",
        ),
        ({"after_s": 60, "latency_ratio": 3}, did(500, seconds=0.002), did(500), 60, "keep", "2.00 times the latency"),
        ({"after_s": 60, "latency_ratio": 3}, did(500), did(0), 60, "keep", "no latency to compare with"),
        (
            {"after_s": 60, "agreement": 0.9},
            did(500, shadow_rows=100, shadow_agreeing_rows=80),
            did(500),
            1,
            "take back",
            "it agrees on 80 % of the rows, and 90 % is due",
        ),
        ({"after_s": 60, "agreement": 0.9}, did(500, shadow_rows=5), did(500), 90, "wait", "5 rows compared"),
    ],
)
def test_rules(  # noqa: PLR0917  a row of the table
    rules: dict[str, Any], seen: dict[str, float], other: dict[str, float], elapsed: float, decision: str, reason: str
) -> None:
    """Bounds that hold for the time or the rows make the version stay; a broken one ends it at once."""
    trial = Trial("canary", "2", "1", Judge(**rules))
    verdict = decide(trial, before=({}, {}), now=(seen, other), elapsed=elapsed)
    assert (verdict.decision, reason in verdict.reason) == (decision, True), verdict


def test_only_what_the_trial_saw_counts() -> None:
    """Failures from before the trial are not held against the version."""
    trial = Trial("canary", "2", "1", Judge(after_s=60))
    verdict = decide(trial, before=(did(0, 500), did(9)), now=(did(100, 500), did(99)), elapsed=60)
    assert verdict.decision == "keep"


def test_a_shadow_is_judged_by_its_copies() -> None:
    """What a version fails on, or can't take, as shadow counts as failed, and rows are those that were compared."""
    trial = Trial("shadow", "2", "1", Judge(rows=50, agreement=0.99))
    good = {"shadow_compared": 60.0, "shadow_rows": 60.0, "shadow_agreeing_rows": 60.0}
    assert decide(trial, before=({}, {}), now=(good, did(900)), elapsed=1).decision == "keep"
    bad = {**good, "shadow_incompatible": 30.0}
    assert decide(trial, before=({}, {}), now=(bad, did(900)), elapsed=1).decision == "take back"


class Bench:
    """A ledger with a clerk, and totals that a test sets."""

    def __init__(self, root: Path) -> None:
        for version in HERE:
            shutil.copytree(MODELS / "iris" / "1", root / "iris" / version)
        self.ledger = Ledger(root)
        self.did: dict[tuple[str, str], dict[str, float]] = {}
        self.clerk = Clerk(self.ledger, lambda wanted: {w: self.did.get(w, did()) for w in wanted})

    def change(self, step: to.Transition) -> Traffic:
        return self.ledger.change("iris", step, who="ann", what="try")

    def tick(self, later: float = 0) -> bool:
        traffic = self.ledger.read("iris")
        return self.clerk.tick({"iris": traffic}, traffic.since + later) == ["iris"]

    def last(self) -> tuple[str, str, str]:
        (entry,) = self.ledger.history("iris", 1)
        return entry["who"], entry["what"], entry["why"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_good_canary_is_promoted(bench: Bench) -> None:
    """After its time within bounds the canary is stable, by the judge's hand, with the figures as the reason."""
    bench.change(to.promote("1", available=HERE))
    bench.change(to.canary("2", 10, available=HERE, judge=Judge(after_s=60)))
    assert not bench.tick()
    bench.did = {("iris", "2"): did(50), ("iris", "1"): did(450)}
    assert not bench.tick(59)
    assert bench.clerk.said["iris"] == [
        "canary 2: 50 predictions, 0 failed, 1 ms each",
        "stable 1: 450 predictions, 0 failed, 1 ms each",
        "judgement of version 2: 1 s to go; 50 predictions in 59 s, 0 % failed",
    ]
    assert bench.tick(61)
    after = bench.ledger.read("iris")
    assert (after.stable, after.previous, after.canary, after.judge) == ("2", "1", None, None)
    assert bench.last() == ("judge", "promote 2", "50 predictions in 61 s, 0 % failed")
    assert not bench.tick(99)


def test_a_bad_canary_is_ended(bench: Bench) -> None:
    """A canary that fails is ended before its time; stable answers all again, and the reason is in the history."""
    bench.change(to.promote("1", available=HERE))
    bench.change(to.canary("2", 10, available=HERE, judge=Judge(after_s=600)))
    bench.tick()
    bench.did = {("iris", "2"): did(40, 10)}
    assert bench.tick(3)
    after = bench.ledger.read("iris")
    assert (after.stable, after.canary, after.judge) == ("1", None, None)
    assert bench.last() == ("judge", "end the canary of 2", "20 % of its predictions failed, and 1 % is the most")


def test_a_bad_promotion_is_rolled_back(bench: Bench) -> None:
    """A promoted version is compared with what the one before it did; where it is too slow, that one is back."""
    bench.change(to.promote("1", available=HERE))
    bench.did = {("iris", "1"): did(5000)}
    bench.change(to.promote("2", available=HERE, judge=Judge(rows=10_000, latency_ratio=2)))
    bench.tick()
    bench.did["iris", "2"] = did(100, seconds=0.005)
    assert bench.tick(3)
    assert bench.ledger.read("iris").stable == "1"
    assert bench.last() == ("judge", "rollback from 2", "it takes 5.00 times as long, and 2 times is the most")


def test_a_good_promotion_stays(bench: Bench) -> None:
    """What held its bounds is stable for good: nothing is judged any more."""
    bench.change(to.promote("2", available=HERE, judge=Judge(rows=50)))
    bench.tick()
    bench.did = {("iris", "2"): did(100)}
    assert bench.tick(1)
    after = bench.ledger.read("iris")
    assert (after.stable, trial_of(after)) == ("2", None)
    assert bench.last()[1] == "keep 2"


def test_a_person_overrules_the_judge(bench: Bench) -> None:
    """A decision about a document that somebody has changed meanwhile is dropped."""
    bench.change(to.promote("1", available=HERE))
    old = bench.change(to.canary("2", 10, available=HERE, judge=Judge(after_s=1)))
    bench.tick()
    bench.did = {("iris", "2"): did(500)}
    bench.change(to.withdraw)
    assert bench.clerk.tick({"iris": old}, old.since + 5) == []
    assert bench.ledger.read("iris").stable == "1"
    assert bench.last()[0] == "ann"
