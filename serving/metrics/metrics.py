"""What the server counts, summed over its workers.

Observing several histograms for each request would cost more than a small prediction, so a worker gathers in plain
lists and flushes them into histograms on a tick. After each flush it leaves a snapshot in the shared folder, named by
its slot (never by pid, so the files stay bounded), and a scrape on any worker adds up all snapshots: the others' lag by
a tick at most. A slot's next worker goes on from the counters of the one before, so that none goes back. Counters are
exact whatever becomes of a worker (see `counts`); of histograms a kill loses what the last tick has not seen.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from serving.linux.files import write_whole
from serving.linux.process_usage import usage
from serving.metrics.counts import Counts
from serving.metrics.definitions import COUNTERS, VERSIONED, Cell, Key, Labels, Sizes, Version
from serving.metrics.exposition import exposition
from serving.metrics.recorders import ModelMetrics, RouteMetrics, ShadowMetrics, taken
from serving.metrics.store import Store, read_snapshot, read_snapshots
from serving.metrics.totals import VersionTotals, totals_of

log = logging.getLogger("serving.metrics")

MOST_SERIES = 512
"""Versions, and routes, that get series of their own; further ones share the label value `other`.

Versions that are not loaded any more make room for new ones, the oldest first: who serves is never in `other` as long
as no more than these are loaded at a time."""
_OTHER = ("other", "")


class Metrics:
    """All counters of one worker, and the view over all workers that share `directory`.

    directory: where the workers' snapshots lie; None keeps to this process. slot: this worker's number.
    counts: has this worker's counters where the parent reads them. triton: whether a scrape has Triton's names too.
    `flush`, `render`, `totals` and `statistics` take long where there are many models, and may be called on any thread;
    all else belongs to the event loop's.
    """

    def __init__(
        self,
        *,
        directory: Path | None = None,
        slot: int = 0,
        counts: Counts | None = None,
        triton: bool = False,
    ) -> None:
        self._directory = directory
        self._counts = counts or Counts()
        self._triton = triton
        self._lock = threading.Lock()
        self._slot = slot
        self._store = Store()
        self._status: dict[Key, float] = {}
        """Gauges of what the coordinator says of all models; replaced and never changed, for other threads."""
        self.last_window: Mapping[Key, float] = {}
        """Gauges of what was found of rows and outcomes; replaced and never changed."""
        self._generations: dict[Key, float] = {}
        self._models: dict[Version, ModelMetrics] = {}
        self._routes: dict[Labels, RouteMetrics] = {}
        self._shadows: dict[Version, ShadowMetrics] = {}
        self.cut: Counter[str] = Counter()
        """Connections that were ended, by reason; who ends them adds."""
        self.in_progress: Callable[[], Iterable[Labels]] = tuple
        """Says route and method of each request that ASGI answers now; asked on any thread."""
        self._followed: dict[Key, Callable[[], float]] = {}
        self._told: dict[Key, float] = {}
        self._loop_lags: list[float] = []
        if directory is not None:
            for snapshot in read_snapshots([self._file()]):
                self._store.add(snapshot._replace(gauges=()))
        self._inherited = dict.fromkeys(self._store.versions())
        """What the worker before has counted, and this one has not loaded (yet), the oldest first."""

    def _file(self) -> Path:
        assert self._directory is not None  # noqa: S101  asked for only with a folder
        return self._directory / f"worker-{self._slot}.json"

    def model(self, name: str, version: str) -> ModelMetrics:
        """Return the counters of one version."""
        labels = (name, version)
        if labels in self._models:
            return self._models[labels]
        with self._lock:
            return self._counted(labels)

    def _counted(self, labels: Version) -> ModelMetrics:
        if len(self._models) >= MOST_SERIES:
            resting = next((of for of, model in self._models.items() if not model.in_use and of != _OTHER), None)
            if resting is None:
                labels = _OTHER
            else:
                self._forget(resting)
        self._inherited.pop(labels, None)
        if labels not in self._models:
            self._models[labels] = ModelMetrics(labels, self._counts)
        return self._models[labels]

    def _forget(self, version: Version) -> None:
        self._models.pop(version, None)
        self._shadows.pop(version, None)
        self._inherited.pop(version, None)
        self._counts.forget(version)
        self._store.forget(version)

    def serving(self, model: str, generation: int) -> None:
        """Say which generation of a model's traffic state this worker serves."""
        self._generations["serving_model_generation", (model,)] = generation

    def status(
        self,
        *,
        asked: Mapping[str, tuple[int, bool]],
        folder_gone: bool,
        passed: list[tuple[str, str, bool]],
        figures: list[tuple[str, str, str, str, float]],
        errors: int,
    ) -> None:
        """Take what the coordinator says of all models, in place of what it said before.

        asked: by model, the generation that the folder asks for, and whether it is refused. passed: name, version, and
        whether the gate let it pass. figures: what the gate measured: name, version, of which, what, value. errors: how
        often the coordinator failed.
        """
        gauges: dict[Key, float] = {("serving_models_folder_gone", ()): float(folder_gone)}
        gauges["serving_coordinator_failures", ()] = errors
        for model, (generation, refused) in asked.items():
            gauges["serving_model_asked_generation", (model,)] = generation
            gauges["serving_model_refused", (model,)] = float(refused)
        # Of a long list the last ones are kept: those that are loaded here.
        for name, version, let in sorted(passed, key=self._loaded)[-MOST_SERIES:]:
            gauges["serving_gate_passed", (name, version)] = float(let)
        for name, version, of, what, value in sorted(figures, key=self._loaded)[-6 * MOST_SERIES :]:
            gauges[f"serving_gate_{what}", (name, version, of)] = value
        self._status = gauges

    def _loaded(self, row: tuple[Any, ...]) -> bool:
        model = self._models.get((row[0], row[1]))
        return model is not None and model.in_use

    def call(self, method: str, code: str) -> Cell:
        """Return the counter of gRPC calls that end so; whoever asks bounds the methods."""
        return self._counts.cell("serving_grpc_calls", (method, code))

    def follow(self, name: str, read: Callable[[], float], *labels: str) -> None:
        """Have a gauge say what `read` returns, or a counter how much that has grown; asked on any thread."""
        self._followed[name, labels] = read

    def describe(self, build: Labels, settings: Mapping[str, object]) -> None:
        """Say what runs (see `serving_build_info`), and with which settings: of these, those that are numbers."""
        self._store.gauges["serving_build_info", build] = 1.0
        for name, value in settings.items():
            if isinstance(value, int | float):
                self._store.gauges["serving_setting", (name,)] = float(value)

    def loop_lag(self, seconds: float) -> None:
        """Count by how much the event loop came late to a timer."""
        self._loop_lags.append(max(0.0, seconds))

    def silent(self, seconds: float) -> None:
        """Say for how long this worker has heard nothing of the coordinator, where that is too long."""
        self._store.gauges["serving_coordinator_silent_seconds", ()] = seconds

    def shadow(self, name: str, version: str) -> ShadowMetrics:
        """Return the counters of a version that runs as shadow."""
        labels = self.model(name, version).labels
        if labels not in self._shadows:
            self._shadows[labels] = ShadowMetrics(labels, self._counts)
        return self._shadows[labels]

    def count(self, counted: Mapping[Key, float]) -> None:
        """Add to counters what is counted elsewhere."""
        for (name, labels), number in counted.items():
            if name in VERSIONED:
                self.model(labels[0], labels[1]).add(name, number, *labels[2:])
            else:
                self._counts.cell(name, labels)[0] += number

    def route(self, template: str, method: str) -> RouteMetrics:
        """Return the counters of one route template and method."""
        labels = (template, method)
        if labels not in self._routes and len(self._routes) >= MOST_SERIES:
            labels = ("other", "other")
        found = self._routes.get(labels)
        return found if found is not None else self._routes.setdefault(labels, RouteMetrics(labels, self._counts))

    def flush(self) -> None:
        """Move what was gathered since the last time into the store, and leave a snapshot for the other workers."""
        self._shared()

    def _shared(self) -> bytes:
        """Flush, and return the snapshot that is left."""
        # One at a time: the tick and a scrape would both take what was gathered, and the later file may be the older.
        with self._lock:
            self._flush()
            snapshot = self._snapshot()
            if self._directory is not None:
                try:
                    write_whole(self._file(), snapshot)
                except OSError as error:
                    log.error("metrics of this worker are not shared: %s", error.strerror)
            return snapshot

    def _flush(self) -> None:
        while self._inherited and len(self._models) + len(self._inherited) > MOST_SERIES:
            self._forget(next(iter(self._inherited)))
        # Copies, since the event loop's thread adds to these meanwhile.
        for model in self._models.copy().values():
            model.flush(self._store)
        for shadow in self._shadows.copy().values():
            shadow.flush(self._store)
        in_progress = Counter([self.route(*labels).labels for labels in self.in_progress()])
        for labels, route in self._routes.copy().items():
            route.in_flight_by_asgi = in_progress[labels]
            route.flush(self._store)
        for reason, number in self.cut.copy().items():
            self._tell(("serving_connections_cut", (reason,)), number)
        self._store.observe("serving_event_loop_lag_seconds", (), taken(self._loop_lags))
        for key, read in self._followed.items():
            self._tell(key, read())
        with contextlib.suppress(OSError):
            for name, value in usage().items():
                self._tell((name, (str(self._slot),)), value)

    def _tell(self, key: Key, value: float) -> None:
        if key[0] in COUNTERS:
            self._store.counters[key] += value - self._told.get(key, 0.0)
            self._told[key] = value
        else:
            self._store.gauges[key] = value

    def _snapshot(self) -> bytes:
        """Write down all that this worker knows, with what its cells have counted so far."""
        whole = Store()
        whole.counters.update(self._store.counters)
        for key, value in self._counts.unkept().items():
            whole.counters[key] += value
        whole.histograms, whole.sizes = self._store.histograms, self._store.sizes
        whole.exemplars = self._store.exemplars
        whole.gauges = self._store.gauges | self._status | self._generations.copy() | dict(self.last_window)
        return whole.dump(self._counts.kept())

    def totals(self, versions: Iterable[Version]) -> dict[Version, VersionTotals]:
        """Sum what versions, given as (name, version), did over all workers."""
        return totals_of(self._whole(), versions)

    def statistics(self, versions: Iterable[Version]) -> dict[Version, tuple[VersionTotals, Sizes]]:
        """Return the sums of versions as `totals` does, and what their batches of each size did."""
        whole = self._whole(sizes=True)
        return {version: (total, whole.sizes.get(version, {})) for version, total in totals_of(whole, versions).items()}

    def render(self, *, openmetrics: bool = False) -> tuple[bytes, str]:
        """Return the exposition of all workers together, and its content type."""
        return exposition(self._whole(), openmetrics=openmetrics, triton=self._triton)

    def _whole(self, *, sizes: bool = False) -> Store:
        """Flush, and add up the snapshots of all workers. sizes: with those of batches, which may be most of them."""
        # What the others read, and no later one: where the next scrape is theirs, counters would go back.
        snapshots = [read_snapshot(self._shared())]
        if self._directory is not None:
            files = sorted(self._directory.glob("worker-*.json"))
            snapshots += read_snapshots(file for file in files if file != self._file())
        whole = Store()
        for snapshot in snapshots:
            whole.add(snapshot if sizes else snapshot._replace(sizes=()))
        return whole
