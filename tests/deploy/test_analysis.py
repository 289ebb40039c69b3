"""The rules by which a version that is tried stays or goes: pure, from figures to a verdict."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.deploy.analysis import Analysis, Figures, analyse, seen, window
from serving.deploy.sequential_test import LEVEL, exceeds, within
from serving.metrics.totals import VersionTotals
from serving.repository.traffic import Judge

FULL = Figures(observed=60, predictions=500, rows=500, seconds=0.5, timed=500, other_predictions=5000)
AFTER = {"after_s": 60}


def judged(found: Figures, *, usual: float | None = None, role: Any = "canary", **rules: Any) -> str:
    verdict = analyse(Analysis(role, "2", "1", Judge(**rules)), found, usual=usual)
    return f"{verdict.decision}: {verdict.reason}"


@pytest.mark.parametrize(
    ("rules", "more", "said"),
    [
        (AFTER, {}, "keep: 500 predictions in 60 s, 0 of 500 failed"),
        (AFTER, {"observed": 30}, "wait: 30 s to go; 500 predictions"),
        ({"rows": 600}, {}, "wait: 100 rows to go"),
        ({"rows": 500, **AFTER}, {"observed": 56}, "wait: 4 s to go"),
        (AFTER, {"predictions": 5}, "wait: 5 predictions so far, and 20 say the least"),
        # One failure proves nothing; whether no more than one in a hundred fails is open until more are seen.
        (AFTER, {"predictions": 99, "errors": 1}, "wait: too few predictions to tell that no more than 1 % fail; 99"),
        (AFTER, {"predictions": 60}, "wait: too few predictions"),
        (AFTER, {"errors": 2}, "keep: 500 predictions in 60 s, 2 of 500 failed"),
        (AFTER, {"errors": 6}, "wait: too few predictions"),
        (AFTER, {"predictions": 20, "errors": 4}, "take back: 4 of 20 (20 %) predictions failed, and 1 % is the most"),
        (AFTER, {"errors": 20}, "take back: 20 of 500 (4 %) predictions failed"),
        ({"error_rate": 0.05, **AFTER}, {"errors": 20}, "keep: "),
        ({"error_rate": 0.0, **AFTER}, {"predictions": 9, "errors": 1}, "take back: 1 of 9"),
        ({"error_rate": 1.0, **AFTER}, {"errors": 500}, "keep: "),
        # Refusing requests is the callers' fault as far as the other version refuses them too.
        (AFTER, {"refused": 100, "other_refused": 1000}, "keep: "),
        (AFTER, {"refused": 100}, "take back: it refused 100 of 500 (20 %) requests, the other version 0 of 5,000"),
        (AFTER, {"refused": 500, "other_predictions": 0}, "keep: "),
        ({"latency_ratio": 2, **AFTER}, {"windows": 30, "slower": 9}, "keep: "),
        ({"latency_ratio": 2, **AFTER}, {"windows": 8}, "wait: latency compared 8 times, and 20 say the least"),
        ({"latency_ratio": 2, **AFTER}, {"windows": 40, "slower": 22}, "wait: more than 2 times the latency in 22 of"),
        (
            {"latency_ratio": 2, **AFTER},
            {"windows": 20, "slower": 19},
            "take back: it took more than 2 times as long as the other version in 19 of 20 comparisons",
        ),
        (
            {"accuracy_loss": 0.05, **AFTER},
            {"outcomes": 300, "wrong": 20, "other_outcomes": 900, "other_wrong": 45},
            "keep: 500 predictions in 60 s, 0 of 500 failed, 20 of 300 outcomes were missed",
        ),
        ({"accuracy_loss": 0.05, **AFTER}, {"outcomes": 99, "other_outcomes": 900}, "wait: 99 true outcomes so far"),
        (
            {"accuracy_loss": 0.05, **AFTER},
            {"outcomes": 300, "wrong": 33, "other_outcomes": 900, "other_wrong": 45},
            "wait: it missed 33 of 300 (11 %) outcomes, the other version 45 of 900 (5 %)",
        ),
        (
            {"accuracy_loss": 0.05, **AFTER},
            {"outcomes": 300, "wrong": 90, "other_outcomes": 900, "other_wrong": 45},
            "take back: it missed 90 of 300 (30 %) outcomes",
        ),
        ({"accuracy_loss": 0.05, **AFTER}, {"outcomes": 300, "wrong": 90}, "wait: 300 true outcomes so far"),
        ({"agreement": 0.9, **AFTER}, {"compared": 100, "differing": 5}, "keep: 500 predictions in 60 s, 0 of 500"),
        ({"agreement": 0.9, **AFTER}, {"compared": 5}, "wait: too few comparisons to tell that labels agree in 90 %"),
        (
            {"agreement": 0.9, **AFTER},
            {"compared": 100, "differing": 40},
            "take back: its labels differ in 40 of 100 (40 %) answers, and 10 % is the most",
        ),
    ],
)
def test_rules(rules: dict[str, Any], more: dict[str, float], said: str) -> None:
    """A bound that is proved to be broken ends it, one that is proved to hold lets it stay, and doubt waits."""
    found = Figures(**{name: more.get(name, getattr(FULL, name)) for name in Figures.__dataclass_fields__})
    assert judged(found, **rules).startswith(said), judged(found, **rules)


def test_a_promotion_without_a_past_to_compare_with() -> None:
    """Where nothing is known of the version before, no wait would bring it: latency is passed over."""
    assert judged(FULL, role="stable", latency_ratio=2, **AFTER).startswith("keep")
    assert judged(FULL, role="stable", usual=0.01, latency_ratio=2, **AFTER).startswith("wait: latency compared 0")


def share(rate: float, lives: int, most: int, ask: Any) -> float:
    """Return in which share of `lives` asking after each prediction ever says yes, where `rate` of them fail."""
    source, hits = random.Random(5), 0
    for _ in range(lives):
        failed = 0
        for number in range(1, most + 1):
            failed += source.random() < rate
            if ask(failed, number):
                hits += 1
                break
    return hits / lives


@pytest.mark.parametrize("bound", [0.01, 0.1])
def test_chance_takes_no_version_back(bound: float) -> None:
    """Looked at after every prediction, a version that keeps its bound is taken back in one life of a hundred at most,
    at half of the bound practically never, and at five times as much always, before it could be kept.
    """
    assert share(bound / 2, 100, 800, lambda failed, of: exceeds(failed, of, bound)) <= LEVEL / 2
    assert share(bound, 150, 800, lambda failed, of: exceeds(failed, of, bound)) <= 2 * LEVEL
    assert share(5 * bound, 100, 1500, lambda failed, of: exceeds(failed, of, bound)) == 1
    assert share(5 * bound, 150, 400, lambda failed, of: within(failed, of, bound)) <= 2 * LEVEL
    assert share(bound / 2, 50, 2000, lambda failed, of: within(failed, of, bound)) == 1


def test_a_bound_for_one_look_would_not_do() -> None:
    """Control: taken back at the first share above the bound, as who looks once would, many good versions go."""
    assert share(0.005, 100, 500, lambda failed, of: of >= 20 and failed / of > 0.01) > 0.2


@given(st.integers(0, 3000), st.integers(0, 300), st.floats(0.001, 0.999))
def test_evidence_is_consistent(of: int, failed: int, rate: float) -> None:
    """Nothing proves both, one more failure never speaks for a version, and one more success never against it."""
    failed = min(failed, of)
    assert not (exceeds(failed, of, rate) and within(failed, of, rate))
    if exceeds(failed, of, rate):
        assert exceeds(failed + 1, of + 1, rate)
    else:
        assert not exceeds(failed, of + 1, rate)
    if within(failed, of, rate):
        assert within(failed, of + 1, rate)


def did(ok: float = 0, failed: float = 0, seconds: float = 0.001, **more: float) -> VersionTotals:
    count = ok + failed
    return VersionTotals(ok=ok, failed=failed, rows=ok, predictions=count, prediction_seconds=count * seconds, **more)


def test_only_what_is_seen_counts() -> None:
    """Figures are of the time between two looks, and a caller's fault, or leaving, is no failure."""
    analysis = Analysis("canary", "2", "1", Judge(rows=1))
    its, other = did(480, 540, invalid=20, gone=20).since(did(0, 500)), did(99).since(did(9))
    found = seen(analysis, its, other)
    assert (found.predictions, found.errors, found.refused, found.rows) == (500, 0, 20, 480)
    assert (found.other_predictions, found.other_timed) == (90, 90)
    assert seen(analysis, did(2).since(did(500)), other).predictions == 0


def test_a_shadow_is_seen_by_its_copies() -> None:
    """What a version fails on, or can't take, as shadow failed; rows are those compared, by answer and not by row."""
    analysis = Analysis("shadow", "2", "1", Judge(rows=50, agreement=0.99))
    its = did(shadow_compared=60, shadow_rows=6000, shadow_agreeing_rows=3000, shadow_incompatible=3)
    found = seen(analysis, its, did(900))
    assert (found.predictions, found.errors, found.rows, found.compared, found.differing) == (63, 3, 6000, 60, 30)


def test_latency_is_compared_in_spans() -> None:
    """A span in which both were timed is one comparison, however long one of its predictions took."""
    rules = Judge(rows=1, latency_ratio=2)
    span = Figures(seconds=30.0, timed=10, other_seconds=0.01, other_timed=10)
    assert window(span, rules, None) == Figures(windows=1, slower=1)
    assert window(span, rules, 2.0) == Figures(windows=1)
    assert window(Figures(seconds=30.0, timed=10, other_timed=4), rules, None) is None
    assert window(Figures(seconds=30.0, timed=4, other_timed=10), rules, None) is None
