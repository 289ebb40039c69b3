"""The live models: loads what the repository holds and answers which version a request gets."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from serving.black_box import BlackBox, unrecorded
from serving.engine.batcher import Observer, Unobserved
from serving.engine.model import Limits, Model, load
from serving.engine.session import OnnxSession
from serving.errors import ModelInvalid, ModelNotFound, NotReady
from serving.fleet.quarantine import Quarantine
from serving.fleet.repository import Contents, Found, Problem, scan, shown
from serving.metrics import Metrics

log = logging.getLogger("serving.fleet")

REPOSITORY_IS_FIXED = "models are loaded at start and stay: this server changes none while it runs"


@dataclass(frozen=True, slots=True)
class Served:
    """One name: its live versions, the one that unversioned requests get, and its labels."""

    name: str
    versions: dict[str, Model]
    default: Model
    labels: dict[str, Model]


class Fleet:
    """All live models of one worker. Loaded by `start`, off the event loop."""

    def __init__(
        self,
        root: Path,
        *,
        limits: Limits,
        metrics: Metrics | None,
        box: BlackBox | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._root = root
        self._box = box
        self._quarantine = quarantine
        self.limits = limits
        self._metrics = metrics
        self._tick: asyncio.TimerHandle | None = None
        self.models: dict[str, Served] = {}
        self.problems: tuple[Problem, ...] = ()
        self.started = False
        self.draining = False

    async def start(self, *, strict: bool = False) -> None:
        """Load all that can be loaded. Raises ModelInvalid where `strict` and something can't."""
        began = time.monotonic()
        contents = await asyncio.to_thread(scan, self._root)
        if self._quarantine is not None:
            contents = self._quarantine.withhold(contents)
        problems = list(contents.problems)
        live: list[Model] = []
        for item in contents.found:
            try:
                live.append(await self._load(item))
            except ModelInvalid as error:
                if self._metrics is not None:
                    self._metrics.model(item.name, item.version).ready(False)
                problems.append(Problem(item.name, item.version, error.message))
        self.problems = tuple(problems)
        for problem in problems:
            log.error("not served: %s %s: %s", problem.name, problem.version, problem.reason)
        if strict and problems:
            first = problems[0]
            raise ModelInvalid(f"{' '.join(filter(None, (first.name, first.version)))}: {first.reason}")
        self.models = _serve(live, contents)
        self.started = True
        log.info("%d models, %d versions in %.2f s", len(self.models), len(live), time.monotonic() - began)
        self._expire()

    async def _load(self, item: Found) -> Model:
        session, sha256 = await asyncio.to_thread(self._read, item)
        observer: Observer = Unobserved()
        if self._metrics is not None:
            observer = metrics = self._metrics.model(item.name, item.version)
            metrics.info(task=session.signature.task, sha256=sha256)
            metrics.ready(True)
        return Model(
            item.name,
            item.version,
            session,
            sha256=sha256,
            limits=self.limits,
            loop=asyncio.get_running_loop(),
            observer=observer,
            box=self._box,
        )

    def _read(self, item: Found) -> tuple[OnnxSession, str]:
        """Load a file, and note that: a file that kills whoever loads it is found out so."""
        record = self._box.open(item.name, item.version) if self._box is not None else unrecorded()
        record.since[0] = -time.monotonic()
        try:
            return load(item.path, limits=self.limits)
        finally:
            record.close()

    def refuse(self) -> None:
        """Answer all that waits or runs with NotReady: the server ends now."""
        self.draining = True
        for served in self.models.values():
            for model in served.versions.values():
                model.batcher.refuse(NotReady("the server is ending: ask another one"))

    async def close(self) -> None:
        """Finish what was accepted and stop the models' threads."""
        if self._tick:
            self._tick.cancel()
        versions = [model for served in self.models.values() for model in served.versions.values()]
        await asyncio.gather(*(model.batcher.close() for model in versions))

    async def load_model(self, name: str) -> None:
        """Load a model's versions from the folder, in place of those that serve. Raises NotReady."""
        raise NotReady(REPOSITORY_IS_FIXED)

    async def unload_model(self, name: str) -> None:
        """Stop serving a model after its last request. Raises NotReady."""
        raise NotReady(REPOSITORY_IS_FIXED)

    @property
    def ready(self) -> bool:
        """Whether this worker should get requests: loaded, something to serve, not draining."""
        return self.started and bool(self.models) and not self.draining

    def get(self, name: str, version: str | None = None, label: str | None = None) -> Model:
        """Return the model that a request for this name, version or label gets.

        Raises ModelNotFound where there is none, NotReady where it is in the repository and can't be served.
        """
        served = self.models.get(name)
        if served is None:
            self._why_not(name, version)
            known = ", ".join(sorted(self.models)) or "none"
            raise ModelNotFound(f"no model is called {shown(name)!r}; models: {known[:500]}")
        if version is not None:
            if version in served.versions:
                return served.versions[version]
            self._why_not(name, version)
            known = ", ".join(served.versions)
            raise ModelNotFound(f"model {name!r} has no version {shown(version)!r}; versions: {known[:500]}")
        if label is not None:
            if label in served.labels:
                return served.labels[label]
            known = ", ".join(served.labels)
            raise ModelNotFound(f"model {name!r} has no label {shown(label)!r}; labels: {known[:500]}")
        return served.default

    def _why_not(self, name: str, version: str | None) -> None:
        for problem in self.problems:
            if problem.name == name and version in (None, problem.version):
                of = f" version {problem.version}" if problem.version else ""
                raise NotReady(f"model {name!r}{of} is not served: {problem.reason}")

    def _expire(self) -> None:
        now = time.monotonic()
        for served in self.models.values():
            for model in served.versions.values():
                model.batcher.expire(now)
        self._tick = asyncio.get_running_loop().call_later(0.1, self._expire)


def _serve(live: list[Model], contents: Contents) -> dict[str, Served]:
    names: dict[str, dict[str, Model]] = {}
    for model in sorted(live, key=lambda m: int(m.version)):
        names.setdefault(model.name, {})[model.version] = model
    served = {}
    for name, versions in names.items():
        newest = list(versions.values())[-1]
        labels = {
            label: versions[version] for label, version in contents.labels.get(name, {}).items() if version in versions
        }
        labels.setdefault("latest", newest)
        served[name] = Served(name, versions, labels.get("stable", newest), labels)
    return served
