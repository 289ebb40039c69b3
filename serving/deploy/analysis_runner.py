"""Follows the versions that are tried, once a second, and writes what comes of it: one runner for each server.

Every server decides by what it has seen itself since it started, and the first one whose decision is written wins: each
is made for one generation of the document. What is seen counts for the contents that were served and for the generation
that began the analysis; where either changes, it begins again with nothing. Only deaths outlive a server: they stand in
the history, and each server says in its file what it tries (`tried`), so that whoever finds the file of a server that
died knows over what.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeAlias

from serving.deploy.analysis import LEAST, NONE, Analysis, Figures, Verdict, analyse, analysis_of, seen, window
from serving.deploy.commands import Rollback, Step
from serving.deploy.plan import Plan
from serving.deploy.rollout_figures import lines_of
from serving.deploy.unservable_reason import content_of
from serving.errors import GenerationConflict, ModelInvalid, ServingError
from serving.metrics.totals import VersionTotals
from serving.repository import copy_stability, transitions
from serving.repository.history import traffic_of
from serving.repository.traffic_store import TrafficStore

log = logging.getLogger("serving.analysis")

QUIET_S = 60.0
"""Seconds without a prediction after which time does not count any more: a quiet night proves nothing."""
MOST_STEP_S = 5.0
"""Seconds at most that count between two observations: if more passed, this process was stopped meanwhile."""
DEATHS = 2
"""Unclean deaths of workers or servers that end an analysis; fewer begin it again."""
AGAIN = "begin again with version"
"""How the history calls it where an analysis begins again by itself."""
JUDGE = "judge"
"""Who the history says it was."""
_DIED = "died"

NOTHING = VersionTotals()

Versions: TypeAlias = Iterable[tuple[str, str]]
"""Names and versions."""
Totalled: TypeAlias = Callable[[Versions], Mapping[tuple[str, str], VersionTotals]]


class Beginning(NamedTuple):
    """When an analysis began, as generations: the first one, and the last one, since when the figures count.

    deaths: how many have made it begin again in between.
    """

    first: int
    last: int
    deaths: int


@dataclass(frozen=True, slots=True)
class Subject:
    """What figures are about: the generation that began the analysis, and the contents of both versions."""

    began: int
    content: str
    against: str

    def of(self, other: Subject, *, since: int) -> bool:
        """Tell whether both are the same contents, and this was begun no earlier than that."""
        return (self.content, self.against) == (other.content, other.against) and self.began >= since


@dataclass(slots=True)
class _Running:
    """One analysis that is followed, and what this server has seen of it."""

    analysis: Analysis
    generation: int
    """Of the document that is served."""
    subject: Subject
    began: Beginning
    before: tuple[VersionTotals, VersionTotals]
    figures: Figures = NONE
    usual: float | None = None
    span: Figures = NONE
    """Seen since the last comparison of latency."""
    observed_at: float | None = None
    """When it was last observed; None while it is not served."""
    predicted_at: float = float("-inf")
    """When it was last seen to have answered."""
    unrecorded: list[str] = field(default_factory=list)
    """Deaths that the history has yet to hold."""
    files: copy_stability.Files | None = None
    """On disk, when their content was last known to be what is tried."""


class AnalysisRunner:
    """Call `tick` about once a second, and at each change of what is served, always on one thread; `died` on any.

    totals: sums what versions, given as (name, version), did; None where nothing is counted.
    """

    def __init__(self, store: TrafficStore, totals: Totalled | None) -> None:
        self._store = store
        self._totals = totals
        self._running: dict[str, _Running] = {}
        self._deaths: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._died_over: defaultdict[str, list[Subject]] = defaultdict(list)
        """By model, what servers tried that died, until it is known whether that is what is tried here."""
        self._logged: set[tuple[str, str]] = set()
        self.lines: dict[str, list[str]] = {}
        """By model, what can be said of its canary, its shadow and its analysis now."""
        self.tried: dict[str, Subject] = {}
        """By model, what is tried; replaced and never changed, for other threads."""

    def died(self, versions: Versions) -> None:
        """Take note that a worker died while it ran these."""
        for version in versions:
            self._deaths.put(version)

    def server_died(self, tried: Mapping[str, Mapping[str, Any]]) -> None:
        """Take note that a server died while this was its `tried`, as its file has it."""
        for name, subject in tried.items():
            self._died_over[name].append(Subject(**subject))

    def tick(self, plans: Mapping[str, Plan], now: float) -> list[str]:
        """Judge once; return the names of the models whose document was changed.

        plans: what is served, by model. now: monotonic seconds.
        """
        if self._totals is None:
            text = "nothing is judged here: metrics are off"
            self.lines = {name: [text] for name, plan in plans.items() if plan.traffic.judge is not None}
            return []
        changed = self._record_deaths()
        analyses = {name: a for name, plan in plans.items() if (a := analysis_of(plan.traffic)) is not None}
        for name in self._running.keys() - analyses.keys():
            del self._running[name]
            self._logged = {logged for logged in self._logged if logged[0] != name}
        beside = {name: versions for name, plan in plans.items() if (versions := _beside(plan, analyses.get(name)))}
        found = self._totals({(name, v) for name, versions in beside.items() for v in versions}) if beside else {}
        lines = {}
        for name, versions in beside.items():
            lines[name] = lines_of(plans[name].traffic, {v: found[name, v] for v in versions})
            if (analysis := analyses.get(name)) is None:
                continue
            verdict = self._observe(name, plans[name], analysis, found, now)
            lines[name].append(f"judgement of version {analysis.version}: {verdict.reason}")
            if verdict.decision != "wait" and self._apply(name, self._running[name], verdict):
                changed.append(name)
        self.lines = lines
        self.tried = {name: running.subject for name, running in self._running.items()}
        return changed

    def close(self) -> None:
        """Try nothing any more: this server ends as it should, and that speaks against no version."""
        self.tried = {}

    def _record_deaths(self) -> list[str]:
        """Hold deaths against the versions that are tried: the first begins again, the next one ends it.

        Before anything else, for a version that is put in quarantine meanwhile is served no more.
        """
        while not self._deaths.empty():
            name, version = self._deaths.get()
            running = self._running.get(name)
            if running is not None and running.analysis.version == version:
                running.unrecorded.append(f"a worker {_DIED} while it ran version {version}")
        return [
            name
            for name, running in self._running.items()
            if running.unrecorded and self._restart_or_end(name, running)
        ]

    def _restart_or_end(self, name: str, running: _Running) -> bool:
        deaths = running.began.deaths + len(running.unrecorded)
        if deaths >= DEATHS:
            verdict = Verdict("take back", f"{deaths} workers or servers died while it was tried")
            done = self._apply(name, running, verdict)
        else:
            done = self._note(name, running, running.unrecorded[0])
        if done:
            running.unrecorded.clear()
        return done

    def _observe(
        self, name: str, plan: Plan, analysis: Analysis, found: Mapping[tuple[str, str], VersionTotals], now: float
    ) -> Verdict:
        """Add what was done since the last time, and judge by all that was seen."""
        contents = {item.version: item.content for item in plan.versions}
        running = self._running.get(name)
        if analysis.version not in contents:
            if running is not None:
                running.observed_at, running.span = None, NONE
            return Verdict("wait", "it is not served now, and nothing counts until it is")
        totals = (
            found[name, analysis.version],
            found[name, analysis.against] if analysis.against is not None else NOTHING,
        )
        generation = plan.traffic.generation
        if running is not None and (running.generation, running.analysis) == (generation, analysis):
            began = running.began
        else:
            began = beginning(self._history(name), generation, analysis)
        # What was stable before a promotion need not be loaded, and its figures are those of before.
        against = contents.get(analysis.against or "", "") if analysis.role != "stable" else ""
        subject = Subject(began.last, contents[analysis.version], against)
        replaced = running is not None and running.subject.began == subject.began and running.subject != subject
        if running is None or running.subject != subject:
            self._running[name] = running = _Running(
                analysis,
                generation,
                subject,
                began,
                # What is promoted has no other beside it: it is compared with all that the one before did.
                (totals[0], totals[1] if analysis.role != "stable" else NOTHING),
                usual=_usual(totals[1]) if analysis.role == "stable" else None,
            )
            log.info("%s: version %s is tried, and what is seen counts from now on", name, analysis.version)
        running.generation, running.began = generation, began
        self._count(running, totals, now)
        for over in self._died_over.pop(name, ()):
            # It may have died right after the analysis began again, and have known nothing of it yet.
            if over.of(subject, since=began.first):
                running.unrecorded.append(f"a server {_DIED} while it tried version {analysis.version}")
        if replaced:
            self._note(name, running, "the files of one of its versions were replaced")
        if running.unrecorded:
            return Verdict("wait", running.unrecorded[0])
        verdict = analyse(analysis, running.figures, usual=running.usual)
        if verdict.decision == "keep" and not self._unchanged(name, running):
            return Verdict("wait", "its files on disk are not those that were tried")
        return verdict

    @staticmethod
    def _count(running: _Running, totals: tuple[VersionTotals, VersionTotals], now: float) -> None:
        did, other = (after.since(before) for after, before in zip(totals, running.before, strict=True))
        step = seen(running.analysis, did, other)
        if step.predictions:
            running.predicted_at = now
        if running.observed_at is not None and now - running.predicted_at < QUIET_S:
            step = replace(step, observed=min(now - running.observed_at, MOST_STEP_S))
        running.before, running.observed_at = totals, now
        running.span += step
        compared = window(running.span, running.analysis.rules, running.usual)
        if compared is not None:
            step, running.span = step + compared, NONE
        running.figures += step

    def _unchanged(self, name: str, running: _Running) -> bool:
        """Tell whether the version on disk is the one that was tried: the coordinator may not have scanned it since."""
        folder = self._store.root / name / running.analysis.version
        files = copy_stability.snapshot(folder)
        try:
            if files != running.files and content_of(folder) != running.subject.content:
                return False
        except ModelInvalid:
            return False
        running.files = files
        return True

    def _history(self, name: str) -> list[dict[str, Any]]:
        try:
            return self._store.history(name, 1000)
        except ServingError:
            return []

    def _note(self, name: str, running: _Running, why: str) -> bool:
        """Begin an analysis again, as a new generation that changes nothing else."""
        return self._change(name, running, Step(lambda traffic: traffic, why), f"{AGAIN} {running.analysis.version}")

    def _apply(self, name: str, running: _Running, verdict: Verdict) -> bool:
        role, version = running.analysis.role, running.analysis.version
        try:
            if verdict.decision == "keep" and role == "stable":
                what, step = f"keep {version}", Step(transitions.settle, verdict.reason)
            elif verdict.decision == "keep":
                promotion = transitions.promote(version, available=self._store.usable(name))
                what, step = f"promote {version}", Step(promotion, verdict.reason)
            elif role == "stable":
                what, step = f"rollback from {version}", Rollback(why=verdict.reason).step(self._store, name)
            else:
                what, step = f"end the {role} of {version}", Step(transitions.withdraw, verdict.reason)
        except ServingError as error:
            self._log_once(
                name,
                f"to {verdict.decision} version {version}, because {verdict.reason}, is not possible",
                error.message,
            )
            return False
        return self._change(name, running, step, what)

    def _change(self, name: str, running: _Running, step: Step, what: str) -> bool:
        try:
            self._store.change(
                name, step.transition, who=JUDGE, what=what, why=step.why, if_generation=running.generation
            )
        except GenerationConflict:
            return False  # somebody has decided already
        except ServingError as error:
            self._log_once(name, f"the judge's decision ({what}, because {step.why}) is not written", error.message)
            return False
        log.info("%s: %s, because %s", name, what, step.why)
        return True

    def _log_once(self, name: str, what: str, reason: str) -> None:
        """Log what goes wrong once, though it is tried again each second."""
        if (name, reason) not in self._logged:
            self._logged.add((name, reason))
            log.error("%s: %s: %s", name, what, reason)


def beginning(history: Sequence[Mapping[str, Any]], generation: int, analysis: Analysis) -> Beginning:
    """Return when an analysis began.

    history: oldest first. generation: of the document that asks for it. Changes of something else leave it alone; where
    the history does not have that generation, it began with it.
    """
    entries = [entry for entry in reversed(history) if entry["generation"] <= generation]
    if not entries or entries[0]["generation"] != generation:
        return Beginning(generation, generation, 0)
    began, deaths, replaced = None, 0, False
    for entry in entries:
        if analysis_of(traffic_of(entry["after"])) != analysis:
            break
        generation = entry["generation"]
        if entry["who"] == JUDGE and entry["what"].startswith(AGAIN):
            began = began or generation
            replaced = replaced or _DIED not in entry["why"]
            deaths += not replaced  # of what other files did before, nothing is said of these
    return Beginning(generation, began or generation, deaths)


def _usual(did: VersionTotals) -> float | None:
    return did.prediction_seconds / did.predictions if did.predictions >= LEAST else None


def _beside(plan: Plan, analysis: Analysis | None) -> tuple[str, ...]:
    """Return the versions whose figures say how it goes; none where nothing is tried."""
    traffic = plan.traffic
    if traffic.unloaded or (analysis is None and traffic.canary is None and traffic.shadow is None):
        return ()
    named = [role.version for role in (traffic.canary, traffic.shadow) if role is not None]
    named += [v for v in (traffic.stable, analysis.against if analysis is not None else None) if v is not None]
    return tuple(dict.fromkeys(named))
