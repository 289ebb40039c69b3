"""The live models of one worker: which version a request gets, and how they are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from serving.deploy.canary_selection import CanarySelection
from serving.deploy.memory_reclaim import MemoryReclaim
from serving.deploy.plan import Plan
from serving.deploy.shadow import Shadow
from serving.deploy.traffic_changes import Changes
from serving.deploy.unservable_reason import content_of
from serving.deploy.worker_agent import PlanFailed, WorkerAgent
from serving.engine.batcher import Unobserved
from serving.engine.batching import Batching
from serving.engine.limits import Limits
from serving.engine.model import Model, load
from serving.engine.sensitive import veiled
from serving.engine.session import OnnxSession
from serving.errors import InvalidRequest, ModelInvalid, ModelNotFound, NotReady, ServingError, shown
from serving.gate.prepared import locate
from serving.heartbeat import Heartbeat, Phase, unrecorded
from serving.linux.thread_scheduling import give_way
from serving.metrics.metrics import Metrics
from serving.monitoring.monitoring import Monitoring
from serving.repository.model_settings import SETTINGS_FILE
from serving.repository.repository import ModelVersion, Problem
from serving.repository.state_directory import state_folder
from serving.repository.traffic import Traffic
from serving.repository.traffic_store import TrafficStore

log = logging.getLogger("serving.fleet")

SCANNED_S = 1.0
"""Seconds within which the coordinator says whether the folder is gone, where it is asked to look."""
RELOADED_S = 30.0
"""Seconds that a worker gives its models to load when the folder is back, before it serves those that have."""
SILENT_S = 10.0
"""Seconds after which a coordinator that says nothing is silent: it says something every 2 s."""


@dataclass(frozen=True, slots=True)
class Served:
    """One name: its live versions in ascending order, the one that unversioned requests get, and its labels.

    canary: decides which unversioned requests another version gets. shadow: gets copies of those that `default`
    answers.
    """

    name: str
    versions: dict[str, Model]
    default: Model
    labels: dict[str, Model]
    traffic: Traffic
    found: dict[ModelVersion, Model]
    unloaded: tuple[str, ...]
    """Versions that are in the folder, and not loaded."""
    canary: CanarySelection | None = None
    shadow: Shadow | None = None


class Fleet:
    """All live models of one worker, kept as the coordinator at the other end of `link` says.

    store: of the models folder. heartbeat: where to note which model runs. monitoring: is shown what they are asked.
    `prepare` are called with each new model, on a thread, before it can get requests; `changed` on the event loop,
    right after `models` was replaced.
    """

    def __init__(
        self,
        link: socket.socket,
        *,
        store: TrafficStore,
        limits: Limits,
        metrics: Metrics | None,
        heartbeat: Heartbeat | None,
        monitoring: Monitoring,
    ) -> None:
        self._store = store
        self._limits = limits
        self._heartbeat = heartbeat
        self._monitoring = monitoring
        self._metrics = metrics
        self._tick: asyncio.TimerHandle | None = None
        self.models: dict[str, Served] = {}
        self.swaps = 0
        """How often `models` was replaced."""
        self.unloaded: dict[str, tuple[str, ...]] = {}
        """Versions of the models that were unloaded on purpose."""
        self.problems: tuple[Problem, ...] = ()
        self.coordinator_silent_s = 0.0
        """Seconds for which nothing was heard of the coordinator, where that is longer than it should be."""
        self.folder_gone = ""
        """Why the models folder can't be followed now; empty where it is."""
        self.started = False
        self.draining = False
        self.prepare: list[Callable[[Model], None]] = []
        self.changed: list[Callable[[], None]] = []
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load", initializer=give_way)
        self._memory = MemoryReclaim(self._loader)
        self.agent = WorkerAgent(link, load=self._load, swap=self._swap, on_status=self._on_status)
        self.changes = Changes(store, self.agent, gone=lambda: self.folder_gone)

    async def start(self, *, strict: bool = False) -> None:
        """Load all that is to be served. Raises ModelInvalid where `strict` and something can't be."""
        began = time.monotonic()
        await self.agent.start()
        failed = await self.agent.joined()
        if failed and not self.models:
            await self._await_folder({problem.name for problem in failed})
        self.problems = tuple({*self.problems, *failed})
        if strict and self.problems:
            for problem in self.problems:
                log.error("not served: %s %s: %s", problem.name, problem.version, problem.reason)
            first = self.problems[0]
            raise ModelInvalid(f"{' '.join(filter(None, (first.name, first.version)))}: {first.reason}")
        self.started = True
        if self._heartbeat is not None:
            self._heartbeat.enter(Phase.LOADED)
        log.info("%d models, %d versions in %.2f s", len(self.models), len(self.live()), time.monotonic() - began)
        self._expire()

    async def _await_folder(self, missing: set[str]) -> None:
        """Take no requests while the folder is gone: this worker came too late to load what others may serve."""
        self.agent.rescan()
        until = time.monotonic() + SCANNED_S
        while missing - self.models.keys() and not self.draining and time.monotonic() < until:
            if self.folder_gone:
                until = time.monotonic() + RELOADED_S
            await asyncio.sleep(0.05)

    async def _load(self, plan: Plan) -> dict[ModelVersion, Model]:
        """Load and warm what a plan asks for and is not there yet, beside what serves. Raises PlanFailed."""
        live = self.models[plan.name].found if plan.name in self.models else {}
        models: dict[ModelVersion, Model] = {}
        for item in plan.versions:
            batching, there = plan.batching[item.version], live.get(item)
            try:
                if there is None or there.batching != batching:
                    there = await self._made(item, batching, there)
                models[item] = there
            except ModelInvalid as error:
                raise PlanFailed(item.version, error.message) from None
            except InvalidRequest as error:  # its settings are at fault
                raise PlanFailed("", f"{SETTINGS_FILE}: {error.message}") from None
            except Exception:
                log.exception("%s %s could not be loaded", item.name, item.version)
                raise PlanFailed(item.version, "it could not be loaded: the server's log has the reason") from None
        try:
            _check(plan, models)
        except ServingError as error:
            raise PlanFailed("", error.message) from None
        return models

    async def _made(self, item: ModelVersion, batching: Batching, there: Model | None) -> Model:
        """Make a version that can serve; `there` is the same one as it serves now, whose session does."""
        loop = asyncio.get_running_loop()
        limits = self._limits.of(batching.own)
        began, seconds = time.monotonic(), None
        if there is not None and there.limits.same_session(limits):
            session = there.session
        else:
            session = await loop.run_in_executor(self._loader, self._read, item, limits)
            seconds = time.monotonic() - began
        metrics = self._metrics.model(item.name, item.version) if self._metrics is not None else None
        its = item.name, item.version, item.sha256, veiled(session.signature, limits.sensitive)
        follow = partial(self._monitoring.drift.follow, *its, limits.drift, limits.sensitive)
        tracker = await loop.run_in_executor(self._loader, follow)
        recorder = self._monitoring.feedback.follow(*its, limits.feedback)
        model = Model(
            item.name,
            item.version,
            session,
            sha256=item.sha256,
            limits=self._limits,
            batching=batching,
            loop=loop,
            observer=metrics or Unobserved(),
            heartbeat=self._heartbeat,
            seen_by=tracker,
            recorder=recorder,
        )
        if metrics is not None:
            threads = model.limits.instances
            metrics.info(task=session.signature.task, sha256=item.sha256, threads=threads, load_seconds=seconds)
            metrics.used_by(model)
        self._memory.follow(model)
        for hook in self.prepare:
            await loop.run_in_executor(self._loader, hook, model)
        return model

    def _read(self, item: ModelVersion, limits: Limits) -> OnnxSession:
        """Load a file, and note that: a file that kills whoever loads it is found out so."""
        record = self._heartbeat.open(item.name, item.version) if self._heartbeat is not None else unrecorded()
        record.since[0] = -time.monotonic()
        prepared = None
        try:
            with contextlib.suppress(OSError):
                prepared = locate(state_folder(self._store.root, self._store.state_dir), item.content)
            if prepared is None and content_of(item.path.parent) != item.content:
                raise ModelInvalid("its files are not those that were examined")
            return load(item.path, limits=limits, prepared=prepared, quiet=self.started)
        finally:
            record.close()

    def _swap(self, plan: Plan, found: dict[ModelVersion, Model]) -> None:
        """Serve what a plan says from the next request on. What was there goes when its last request is answered."""
        was = self.models.get(plan.name)
        before, shadow = (was.found, was.shadow) if was is not None else ({}, None)
        models = {name: served for name, served in self.models.items() if name != plan.name}
        self.unloaded = {name: versions for name, versions in self.unloaded.items() if name != plan.name}
        roles = plan.roles
        if roles.stable is not None:
            versions = {item.version: model for item, model in found.items()}
            labels = {label: versions[version] for label, version in roles.labels.items()}
            stable, copied = versions[roles.stable], None
            if roles.shadow is not None:
                model, percent = versions[roles.shadow.version], roles.shadow.percent
                same = shadow is not None and shadow.same(stable, model, percent)
                copied = shadow if same else Shadow(stable, model, percent, self._metrics)
            models[plan.name] = Served(
                plan.name, versions, stable, labels, plan.traffic, found, plan.unloaded, _split(plan, found), copied
            )
        elif plan.traffic.unloaded and plan.unloaded:
            self.unloaded[plan.name] = plan.unloaded
        if shadow is not None and (plan.name not in models or models[plan.name].shadow is not shadow):
            shadow.close()
        # In one assignment: a request sees all of the old or all of the new, and keeps the model that it got alive.
        self.models = dict(sorted(models.items()))
        self.swaps += 1
        for hook in self.changed:
            hook()
        if self._metrics is not None:
            for item in before.keys() | found.keys():
                self._metrics.model(item.name, item.version).ready(item in found)
            self._metrics.serving(plan.name, plan.traffic.generation)

    def _on_status(self, status: dict[str, Any]) -> None:
        self.problems = tuple(Problem(*given) for given in status["problems"])
        self.folder_gone = next((problem.reason for problem in self.problems if not problem.name), "")
        if self._metrics is not None:
            self._metrics.status(
                asked={name: (its.asked, bool(its.error)) for name, its in self.agent.standings.items()},
                folder_gone=bool(self.folder_gone),
                passed=status["passed"],
                figures=status["figures"],
                errors=status["errors"],
            )

    def refuse(self) -> None:
        """Answer all that waits or runs with NotReady: the server ends now."""
        self.draining = True
        for model in self.live():
            model.batcher.refuse(NotReady("the server is ending: ask another one"))

    async def close(self) -> None:
        """Finish what was accepted and stop the models' threads."""
        if self._tick is not None:
            self._tick.cancel()
        # Before the models: a commit that still came would put others in their place, which nobody ends.
        self.agent.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        for served in self.models.values():
            if served.shadow is not None:
                served.shadow.close()
        await asyncio.gather(*(model.batcher.close() for model in self.live()))

    def live(self) -> list[Model]:
        """Return every version of every model that serves."""
        return [model for served in self.models.values() for model in served.versions.values()]

    @property
    def ready(self) -> bool:
        """Whether this worker should get requests: loaded, something to serve, not draining."""
        return self.started and bool(self.models) and not self.draining

    @property
    def lag(self) -> float:
        """Seconds for which this worker has left unacknowledged what it was told, as its parent measures it."""
        return self._heartbeat.lag if self._heartbeat is not None else 0.0

    def _check_silence(self) -> None:
        """Note whether the coordinator is heard of: while it is not, what is served stays, whatever is asked for."""
        silent_s = round(self.agent.silent_s, 1)
        was, self.coordinator_silent_s = self.coordinator_silent_s, silent_s if silent_s > SILENT_S else 0.0
        if self.coordinator_silent_s and not was:
            log.error("nothing was heard of the coordinator for %.0f s: what is served stays as it is", silent_s)
        elif was and not self.coordinator_silent_s:
            log.warning("the coordinator is heard of again")
        if self._metrics is not None:
            self._metrics.silent(self.coordinator_silent_s)

    def generations(self) -> dict[str, dict[str, int | None]]:
        """Say by model which generation of its traffic state is served here, which is asked for, and the lag."""
        found: dict[str, dict[str, int | None]] = {}
        for name, standing in self.agent.standings.items():
            served = self.models.get(name)
            here = standing.serving if served is None else served.traffic.generation
            found[name] = {"serving": here, "asked": standing.asked, "lag": max(0, standing.asked - (here or 0))}
        return found

    def get(self, name: str, version: str | None = None, label: str | None = None) -> Model:
        """Return the model that a request for this name, version or label gets.

        Raises ModelNotFound where there is none, NotReady where it is in the repository and can't be served.
        """
        served = self.models.get(name)
        if served is None:
            self._why_not(name, version)
            known = ", ".join(sorted(self.models)) or "none"
            raise ModelNotFound(f"no model is called '{shown(name)}'; models: {known[:500]}")
        if version is not None:
            if version in served.versions:
                return served.versions[version]
            self._why_not(name, version)
            known = ", ".join(served.versions)
            raise ModelNotFound(f"model {name!r} has no version '{shown(version)}'; versions: {known[:500]}")
        if label is not None:
            if label in served.labels:
                return served.labels[label]
            known = ", ".join(served.labels)
            raise ModelNotFound(f"model {name!r} has no label '{shown(label)}'; labels: {known[:500]}")
        return served.default

    def _why_not(self, name: str, version: str | None) -> None:
        for problem in self.problems:
            if problem.name == name and version in (None, problem.version):
                of = f" version {problem.version}" if problem.version else ""
                raise NotReady(f"model {name!r}{of} is not served: {problem.reason}")
        if name in self.unloaded and (version is None or version in self.unloaded[name]):
            raise NotReady(f"model {name!r} is unloaded")
        if name in self.models and version in self.models[name].unloaded:
            raise NotReady(f"model {name!r} version {version} is not loaded")

    def _expire(self) -> None:
        now = time.monotonic()
        for model in self.live():
            model.expire(now)
        self._check_silence()
        self._memory.tick([model.session for model in self.live()])
        self._tick = asyncio.get_running_loop().call_later(0.1, self._expire)


def _split(plan: Plan, found: dict[ModelVersion, Model]) -> CanarySelection | None:
    """Make what decides between stable and canary. Raises InvalidRequest where it asks for a feature that is not."""
    roles = plan.roles
    if roles.canary is None:
        return None
    versions = {item.version: model for item, model in found.items()}
    return CanarySelection(
        versions[roles.stable or ""], versions[roles.canary.version], roles.canary.percent, roles.canary.sticky
    )


def _check(plan: Plan, found: dict[ModelVersion, Model]) -> None:
    """Raise InvalidRequest where a plan asks for what its versions do not have: a feature, or labels to compare."""
    _split(plan, found)
    roles, judge = plan.roles, plan.traffic.judge
    if judge is not None and judge.accuracy_loss is not None:
        for item, model in found.items():
            if item.version in (roles.stable, roles.canary and roles.canary.version) and (
                model.recorder is None or not model.recorder.judges
            ):
                raise InvalidRequest(
                    f"judge.accuracy_loss: version {item.version} keeps nothing that true outcomes can be compared "
                    "with: the model's model.toml needs [feedback], with largest_error where it answers numbers"
                )
    if judge is None or judge.agreement is None or roles.shadow is None:
        return
    for item, model in found.items():
        if item.version in (roles.stable, roles.shadow.version) and model.signature.label is None:
            raise InvalidRequest(
                f"judge.agreement: version {item.version} gives no labels to compare: leave it out, and see how far "
                "scores differ in serving status"
            )
