"""Decides by itself whether a new version stays: pure rules over what was counted, and the clerk who applies them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from serving.errors import GenerationConflict, ServingError
from serving.fleet import transitions
from serving.fleet.ledger import Ledger
from serving.fleet.orders import Rollback, Step
from serving.fleet.traffic import Judge, Traffic

log = logging.getLogger("serving.trial")

LEAST = 20
"""Predictions of a version before its rates say anything."""

Totals: TypeAlias = Mapping[str, float]
"""What one version did since the server started, as `serving.metrics.totals` gives it."""
Role: TypeAlias = Literal["canary", "shadow", "stable"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A version that is judged, as what, and the version that it is compared with, if there is one."""

    role: Role
    version: str
    against: str | None
    rules: Judge


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, and why, as a sentence for the history."""

    decision: Literal["wait", "keep", "take back"]
    reason: str


def trial_of(traffic: Traffic) -> Trial | None:
    """Return what a document asks to be judged."""
    if traffic.judge is None or traffic.unloaded or traffic.stable is None:
        return None
    if traffic.canary is not None:
        return Trial("canary", traffic.canary.version, traffic.stable, traffic.judge)
    if traffic.shadow is not None:
        return Trial("shadow", traffic.shadow.version, traffic.stable, traffic.judge)
    return Trial("stable", traffic.stable, traffic.previous, traffic.judge)


@dataclass(frozen=True, slots=True)
class _Figures:
    """What was seen of one version in a trial. seconds: all predictions together."""

    predictions: float
    errors: float
    refused: float
    rows: float
    seconds: float
    timed: float

    @property
    def mean(self) -> float | None:
        return self.seconds / self.timed if self.timed >= LEAST else None


def _live(now: Totals, before: Totals) -> _Figures:
    def grown(key: str) -> float:
        return max(0.0, now.get(key, 0.0) - before.get(key, 0.0))

    refused = grown("invalid")
    predictions = grown("ok") + grown("failed") - grown("gone")
    errors = grown("failed") - refused - grown("gone")
    return _Figures(predictions, errors, refused, grown("rows"), grown("prediction_sum"), grown("prediction_count"))


def _shadow(now: Totals, before: Totals) -> _Figures:
    def grown(key: str) -> float:
        return max(0.0, now.get(f"shadow_{key}", 0.0) - before.get(f"shadow_{key}", 0.0))

    errors = grown("failed") + grown("incompatible")
    rows = max(grown("rows"), grown("difference_count"))  # the former where there are labels
    return _Figures(grown("compared") + errors, errors, 0.0, rows, grown("sum"), grown("count"))


def _inference(now: Totals, before: Totals) -> float | None:
    count = now.get("inference_count", 0.0) - before.get("inference_count", 0.0)
    return (now["inference_sum"] - before.get("inference_sum", 0.0)) / count if count >= LEAST else None


def decide(
    trial: Trial,
    *,
    before: tuple[Totals, Totals],
    now: tuple[Totals, Totals],
    elapsed: float,
) -> Verdict:
    """Judge a trial by what was counted of the version, and of what it is compared with, since it began.

    before, now: totals of both, in this order. elapsed: seconds since it began. A broken bound ends a trial at once,
    but not before LEAST predictions; a trial that saw fewer goes on, for it has shown nothing.
    """
    rules = trial.rules
    seen = (_shadow if trial.role == "shadow" else _live)(now[0], before[0])
    other = _live(now[1], before[1])
    if seen.predictions < LEAST:
        return Verdict("wait", f"{seen.predictions:.0f} predictions so far, and {LEAST} say the least")
    if seen.errors / seen.predictions > rules.error_rate:
        return _broken(
            f"{_percent(seen.errors / seen.predictions)} of its predictions failed", _percent(rules.error_rate)
        )
    elsewhere = other.refused / other.predictions if other.predictions else 0.0
    if seen.refused / seen.predictions - elsewhere > max(rules.error_rate, 0.01):
        return _broken(
            f"it refused {_percent(seen.refused / seen.predictions)} of the requests, and the other version "
            f"{_percent(elsewhere)}",
            _percent(max(rules.error_rate, 0.01)) + " more",
        )
    said = [
        f"{seen.predictions:,.0f} predictions in {elapsed:.0f} s",
        f"{_percent(seen.errors / seen.predictions)} failed",
    ]
    mean, usual = seen.mean, _inference(now[1], before[1]) if trial.role == "shadow" else other.mean
    if rules.latency_ratio is not None:
        if mean is None or not usual:
            said.append("no latency to compare with")
        elif mean / usual > rules.latency_ratio:
            return _broken(f"it takes {mean / usual:.2f} times as long", f"{rules.latency_ratio:g} times")
        else:
            said.append(f"{mean / usual:.2f} times the latency")
    if rules.agreement is not None:
        compared = now[0].get("shadow_rows", 0.0) - before[0].get("shadow_rows", 0.0)
        agreeing = now[0].get("shadow_agreeing_rows", 0.0) - before[0].get("shadow_agreeing_rows", 0.0)
        if compared < LEAST:
            return Verdict("wait", f"{compared:.0f} rows compared so far, and {LEAST} say the least")
        if agreeing / compared < rules.agreement:
            return Verdict(
                "take back",
                f"it agrees on {_percent(agreeing / compared)} of the rows, and {_percent(rules.agreement)} is due",
            )
        said.append(f"{_percent(agreeing / compared)} of the rows agree")
    if rules.after_s is not None and elapsed < rules.after_s:
        return Verdict("wait", f"{rules.after_s - elapsed:.0f} s to go; " + ", ".join(said))
    if rules.rows is not None and seen.rows < rules.rows:
        return Verdict("wait", f"{rules.rows - seen.rows:,.0f} rows to go; " + ", ".join(said))
    return Verdict("keep", ", ".join(said))


def _broken(fact: str, bound: str) -> Verdict:
    return Verdict("take back", f"{fact}, and {bound} is the most")


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"


class Clerk:
    """Follows the trials of all models and writes what comes of them; `tick` about once a second.

    totals: sums what versions, given as (name, version), did.
    """

    def __init__(
        self,
        ledger: Ledger,
        totals: Callable[[Iterable[tuple[str, str]]], Mapping[tuple[str, str], Totals]],
    ) -> None:
        self._ledger = ledger
        self._totals = totals
        self._running: dict[str, tuple[Trial, float, tuple[Totals, Totals]]] = {}
        self.said: dict[str, list[str]] = {}
        """By model, what can be said of its canary, its shadow and its judgement now."""

    def tick(self, documents: Mapping[str, Traffic], now: float) -> list[str]:
        """Look at the trials once; return the names of the models whose document was changed.

        documents: those that are served, by model. now: Unix time.
        """
        trials = {name: trial for name, traffic in documents.items() if (trial := trial_of(traffic)) is not None}
        watched = {name: tuple(_beside(documents[name], trials.get(name))) for name in documents}
        watched = {name: versions for name, versions in watched.items() if versions}
        for name in self._running.keys() - trials.keys():
            del self._running[name]
        if not watched:
            self.said = {}
            return []
        found = self._totals({(name, version) for name, versions in watched.items() for version in versions})
        said, changed = {}, []
        for name in watched:
            said[name] = told(documents[name], {v: found[name, v] for v in watched[name]})
            if name in trials:
                verdict = self._verdict(name, trials[name], found, documents[name].since, now)
                said[name].append(f"judgement of version {trials[name].version}: {verdict.reason}")
                if verdict.decision != "wait" and self._apply(name, documents[name].generation, trials[name], verdict):
                    changed.append(name)
        self.said = said
        return changed

    def _verdict(
        self, name: str, trial: Trial, found: Mapping[tuple[str, str], Totals], since: float, now: float
    ) -> Verdict:
        totals = found[name, trial.version], found[name, trial.against] if trial.against is not None else {}
        if name not in self._running or self._running[name][0] != trial:
            # What is promoted has no other beside it: it is compared with all that the one before did.
            self._running[name] = trial, since, (totals[0], totals[1] if trial.role != "stable" else {})
        _, began, before = self._running[name]
        return decide(trial, before=before, now=totals, elapsed=max(0.0, now - began))

    def _apply(self, name: str, generation: int, trial: Trial, verdict: Verdict) -> bool:
        if verdict.decision == "keep":
            what = f"promote {trial.version}" if trial.role != "stable" else f"keep {trial.version}"
        else:
            what = (
                f"rollback from {trial.version}"
                if trial.role == "stable"
                else f"end the {trial.role} of {trial.version}"
            )
        try:
            step = self._step(name, trial, verdict)
            self._ledger.change(name, step.transition, who="judge", what=what, why=step.why, if_generation=generation)
        except GenerationConflict:
            return False  # somebody has decided already
        except ServingError as error:
            log.error("%s: the judge's decision (%s: %s) is not written: %s", name, what, verdict.reason, error.message)
            return False
        log.info("%s: %s, because %s", name, what, step.why)
        return True

    def _step(self, name: str, trial: Trial, verdict: Verdict) -> Step:
        if verdict.decision == "keep" and trial.role == "stable":
            return Step(transitions.settle, verdict.reason)
        if verdict.decision == "keep":
            return Step(transitions.promote(trial.version, available=self._ledger.usable(name)), verdict.reason)
        if trial.role == "stable":
            return Rollback(why=verdict.reason).step(self._ledger, name)
        return Step(transitions.withdraw, verdict.reason)


def _beside(traffic: Traffic, trial: Trial | None) -> Iterable[str]:
    """Return the versions whose figures say how a trial goes; none where nothing is tried."""
    if traffic.unloaded or (trial is None and traffic.canary is None and traffic.shadow is None):
        return ()
    named = [role.version for role in (traffic.canary, traffic.shadow) if role is not None]
    named += [v for v in (traffic.stable, trial.against if trial is not None else None) if v is not None]
    return dict.fromkeys(named)


def told(traffic: Traffic, totals: Mapping[str, Totals]) -> list[str]:
    """Say in a line each how canary and shadow go, since the server started."""
    said = []
    if traffic.canary is not None:
        for role, version in (("canary", traffic.canary.version), ("stable", traffic.stable or "")):
            if version in totals:
                live = _live(totals[version], {})
                mean = f", {live.seconds / live.timed * 1e3:.3g} ms each" if live.timed else ""
                said.append(f"{role} {version}: {live.predictions:,.0f} predictions, {live.errors:,.0f} failed{mean}")
    for copy in (traffic.shadow, traffic.canary):
        if copy is None or copy.version not in totals:
            continue
        seen = figures(totals[copy.version]).get("shadow")
        if seen is None:
            continue
        line = f"shadow {copy.version}: {seen['compared']:,} answers compared, {seen['failed']:,} failed"
        if seen["agreement"] is not None:
            line += f", {_percent(seen['agreement'])} of the rows agree"
        if seen["score_difference"]["mean"] is not None:
            line += f", scores differ by {seen['score_difference']['mean']:.3g} on average"
        if seen["mean_seconds"] is not None:
            line += f", {seen['mean_seconds'] * 1e3:.3g} ms each"
        said.append(f"{line}; not copied: {seen['busy']:,} while busy, {seen['incompatible']:,} incompatible")
    return said


def figures(totals: Totals) -> dict[str, Any]:
    """Put what one version did since the server started in words and units that a person reads."""
    live = _live(totals, {})
    found: dict[str, Any] = {
        "predictions": round(live.predictions),
        "rows": round(live.rows),
        "errors": round(live.errors),
        "error_rate": _ratio(live.errors, live.predictions),
        "mean_seconds": _ratio(live.seconds, live.timed),
    }
    if any(totals.get(f"shadow_{outcome}") for outcome in ("compared", "failed", "busy", "incompatible")):
        edges = [
            (key.rsplit("_", 1)[1], count) for key, count in totals.items() if key.startswith("shadow_difference_le")
        ]
        found["shadow"] = {
            **{o: round(totals[f"shadow_{o}"]) for o in ("compared", "failed", "busy", "incompatible")},
            "agreement": _ratio(totals["shadow_agreeing_rows"], totals["shadow_rows"]),
            "score_difference": {
                "mean": _ratio(totals["shadow_difference_sum"], totals["shadow_difference_count"]),
                "rows_up_to": {edge: round(count) for edge, count in edges},
            },
            "mean_seconds": _ratio(totals["shadow_sum"], totals["shadow_count"]),
        }
    return found


def _ratio(part: float, whole: float) -> float | None:
    return round(part / whole, 6) if whole else None
