"""Decides whether a new version stays: pure rules over what was counted of it while it was tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Literal, TypeAlias

from serving.deploy.sequential_test import at_most, exceeds, within
from serving.metrics.totals import VersionTotals
from serving.repository.traffic import Canary, Judge, Shadow, Traffic

LEAST = 20
"""Predictions, and comparisons of latency, before they say that a version is good."""
LEAST_OUTCOMES = 100
"""True outcomes of each version before they say that the new one is as good."""
WINDOW = 5
"""Timed predictions of each version that make a comparison of their means."""
_REFUSED_MORE = 0.01
"""Share of requests that a version may refuse beyond what the other does, where no greater share may fail."""

Role: TypeAlias = Literal["canary", "shadow", "stable"]


@dataclass(frozen=True, slots=True)
class Analysis:
    """A version that is tried, as what, and the version that it is compared with, if there is one."""

    role: Role
    version: str
    against: str | None
    rules: Judge
    share: Canary | Shadow | None = None
    """Of which requests; another share is another analysis."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, and why, as a sentence for the history."""

    decision: Literal["wait", "keep", "take back"]
    reason: str


def analysis_of(traffic: Traffic) -> Analysis | None:
    """Return what a document asks to be tried."""
    if traffic.judge is None or traffic.unloaded or traffic.stable is None:
        return None
    if traffic.canary is not None:
        return Analysis("canary", traffic.canary.version, traffic.stable, traffic.judge, traffic.canary)
    if traffic.shadow is not None:
        return Analysis("shadow", traffic.shadow.version, traffic.stable, traffic.judge, traffic.shadow)
    return Analysis("stable", traffic.stable, traffic.previous, traffic.judge)


@dataclass(frozen=True, slots=True)
class Figures:
    """What was seen of a version while it was tried, and beside it of the other one; figures add up."""

    observed: float = 0.0
    """Seconds in which it was served and asked."""
    predictions: float = 0.0
    errors: float = 0.0
    refused: float = 0.0
    """Predictions that it called the caller's fault."""
    rows: float = 0.0
    seconds: float = 0.0
    """All timed predictions together."""
    timed: float = 0.0
    other_predictions: float = 0.0
    other_refused: float = 0.0
    other_seconds: float = 0.0
    other_timed: float = 0.0
    compared: float = 0.0
    """Answers whose labels were compared."""
    differing: float = 0.0
    """The same, by the share of their rows with another label: rows of one request are no separate witnesses."""
    outcomes: float = 0.0
    """Answers whose true outcomes are known."""
    wrong: float = 0.0
    other_outcomes: float = 0.0
    other_wrong: float = 0.0
    windows: float = 0.0
    """Short spans of time in each of which both versions were timed."""
    slower: float = 0.0
    """Those in which it took more than the allowed multiple of the other's mean."""

    def __add__(self, more: Figures) -> Figures:
        return Figures(*(one + two for one, two in zip(astuple(self), astuple(more), strict=True)))


NONE = Figures()


def live(did: VersionTotals) -> Figures:
    """Return what a version that answers did."""
    return Figures(
        predictions=did.ok + did.failed - did.gone,
        errors=max(0.0, did.failed - did.invalid - did.gone),
        refused=did.invalid,
        rows=did.rows,
        seconds=did.prediction_seconds,
        timed=did.predictions,
        outcomes=did.outcomes,
        wrong=did.outcomes - did.right,
    )


def _copied(did: VersionTotals) -> Figures:
    errors = did.shadow_failed + did.shadow_incompatible
    return Figures(
        predictions=did.shadow_compared + errors,
        errors=errors,
        rows=max(did.shadow_rows, did.differences),  # the former where there are labels
        seconds=did.shadow_seconds,
        timed=did.shadow_timed,
    )


def seen(analysis: Analysis, did: VersionTotals, other: VersionTotals) -> Figures:
    """Return what was seen of the version and of the other one, by what both did in the same time."""
    shadow = analysis.role == "shadow"
    others = live(other)
    rows, compared = did.shadow_rows, did.shadow_compared
    return replace(
        _copied(did) if shadow else live(did),
        other_predictions=others.predictions,
        other_refused=others.refused,
        other_outcomes=others.outcomes,
        other_wrong=others.wrong,
        # A copy is timed in the model alone.
        other_seconds=other.inference_seconds if shadow else others.seconds,
        other_timed=other.batches if shadow else others.timed,
        compared=compared if rows else 0.0,
        differing=compared * (1 - min(1.0, did.shadow_agreeing_rows / rows)) if rows else 0.0,
    )


def window(span: Figures, rules: Judge, usual: float | None) -> Figures | None:
    """Compare the mean seconds of both versions within a span of time; None where it saw too little to be one.

    usual: the other's mean where it answers nothing any more. Means of a span, and not of all: load that rises slows
    both, and one long pause counts once.
    """
    if rules.latency_ratio is None or span.timed < WINDOW:
        return None
    if usual is None:
        if span.other_timed < WINDOW:
            return None
        usual = span.other_seconds / span.other_timed
    return Figures(windows=1.0, slower=float(span.seconds / span.timed > rules.latency_ratio * usual))


def analyse(analysis: Analysis, found: Figures, *, usual: float | None = None) -> Verdict:
    """Judge a version by what was seen of it.

    It is taken back as soon as the figures prove that it breaks a bound, whenever that is; while they leave it open it
    is neither taken back nor kept. usual: see `window`.
    """
    rules = analysis.rules
    broken = _broken(analysis, found)
    if broken:
        return Verdict("take back", broken)
    said = [
        f"{_count(found.predictions)} predictions in {found.observed:.0f} s",
        f"{_count(found.errors)} of {_count(found.predictions)} failed",
    ]
    if rules.latency_ratio is not None and found.windows:
        said.append(f"{_ratio(found, usual)} the latency")
    if found.compared:
        said.append(f"labels differ in {_count(found.differing)} of {_count(found.compared)} answers")
    if found.outcomes:
        said.append(f"{_count(found.wrong)} of {_count(found.outcomes)} outcomes were missed")
    missing = list(_missing(analysis, found, usual))
    if missing:
        return Verdict("wait", f"{missing[0]}; {', '.join(said)}")
    return Verdict("keep", ", ".join(said))


def _broken(analysis: Analysis, found: Figures) -> str:
    """Say which bound is proved to be broken; '' where none is."""
    rules = analysis.rules
    if exceeds(found.errors, found.predictions, rules.error_rate):
        return f"{_of(found.errors, found.predictions)} predictions failed, and {percent(rules.error_rate)} is the most"
    more = max(rules.error_rate, _REFUSED_MORE)
    if exceeds(
        found.refused, found.predictions, min(1.0, at_most(found.other_refused, found.other_predictions) + more)
    ):
        return (
            f"it refused {_of(found.refused, found.predictions)} requests, the other version "
            f"{_of(found.other_refused, found.other_predictions)}, and {percent(more)} more is the most"
        )
    if exceeds(found.slower, found.windows, 0.5):
        return (
            f"it took more than {rules.latency_ratio:g} times as long as the other version in "
            f"{_count(found.slower)} of {_count(found.windows)} comparisons"
        )
    if rules.agreement is not None and exceeds(found.differing, found.compared, 1 - rules.agreement):
        return (
            f"its labels differ in {_of(found.differing, found.compared)} answers, and "
            f"{percent(1 - rules.agreement)} is the most"
        )
    if rules.accuracy_loss is not None and exceeds(
        found.wrong, found.outcomes, min(1.0, at_most(found.other_wrong, found.other_outcomes) + rules.accuracy_loss)
    ):
        return (
            f"it missed {_of(found.wrong, found.outcomes)} outcomes, the other version "
            f"{_of(found.other_wrong, found.other_outcomes)}, and {percent(rules.accuracy_loss)} more is the most"
        )
    return ""


def _missing(analysis: Analysis, found: Figures, usual: float | None) -> Iterator[str]:
    """Say what has yet to be seen before the version can be kept."""
    rules = analysis.rules
    if found.predictions < LEAST:
        yield f"{_count(found.predictions)} predictions so far, and {LEAST} say the least"
    if not within(found.errors, found.predictions, rules.error_rate):
        yield f"too few predictions to tell that no more than {percent(rules.error_rate)} fail"
    # What is promoted can't be compared where nothing is known of the version before it, however long one waits.
    comparable = analysis.role != "stable" or usual is not None
    if rules.latency_ratio is not None and comparable:
        if found.windows < LEAST:
            yield f"latency compared {_count(found.windows)} times, and {LEAST} say the least"
        elif found.slower > found.windows / 2:
            yield (
                f"more than {rules.latency_ratio:g} times the latency in {_count(found.slower)} of "
                f"{_count(found.windows)} comparisons"
            )
    if rules.agreement is not None and not (
        found.compared >= LEAST and within(found.differing, found.compared, 1 - rules.agreement)
    ):
        yield f"too few comparisons to tell that labels agree in {percent(rules.agreement)}"
    if rules.accuracy_loss is not None:
        if min(found.outcomes, found.other_outcomes) < LEAST_OUTCOMES:
            yield f"{_count(found.outcomes)} true outcomes so far, and {LEAST_OUTCOMES} of each version say the least"
        elif found.wrong / found.outcomes > found.other_wrong / found.other_outcomes + rules.accuracy_loss:
            yield (
                f"it missed {_of(found.wrong, found.outcomes)} outcomes, the other version "
                f"{_of(found.other_wrong, found.other_outcomes)}"
            )
    if rules.after_s is not None and found.observed < rules.after_s:
        yield f"{rules.after_s - found.observed:.0f} s to go"
    if rules.rows is not None and found.rows < rules.rows:
        yield f"{_count(rules.rows - found.rows)} rows to go"


def _ratio(found: Figures, usual: float | None) -> str:
    other = usual or (found.other_seconds / found.other_timed if found.other_timed else 0.0)
    return f"{found.seconds / found.timed / other:.2f} times" if found.timed and other else "unknown times"


def _of(part: float, whole: float) -> str:
    return f"{_count(part)} of {_count(whole)} ({percent(part / whole if whole else 0.0)})"


def _count(number: float) -> str:
    return f"{number:,.3g}" if number < 10 and number % 1 else f"{number:,.0f}"


def percent(share: float) -> str:
    """Say a share, 0 to 1, in words."""
    return f"{share * 100:.3g} %"
