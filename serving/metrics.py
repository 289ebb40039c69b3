"""What the server counts, summed over its workers; the sole owner of prometheus_client.

Observing several histograms for each request would cost more than a small prediction, so a worker gathers in plain
lists and ints and folds them in on a tick. After each fold it leaves a snapshot in the shared folder, named by its
slot (never by pid, so the files stay bounded), and a scrape on any worker adds up all snapshots: the others' lag by a
tick at most. A slot's next worker goes on from the counters of the one before, so that none goes back.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from serving.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    ServingError,
    SignatureMismatch,
    UnsupportedMediaType,
)

log = logging.getLogger("serving.metrics")

SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0, 100.0)
MOST_SERIES = 512
"""Models, and routes, that get series of their own; further ones share the label value `other`."""

_MODEL = ("model", "version")
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "serving_predictions": ("Predictions by how they ended.", (*_MODEL, "protocol", "outcome")),
    "serving_rows": ("Rows predicted.", _MODEL),
    "serving_rejected": ("Predictions that were not run, by reason.", (*_MODEL, "reason")),
    "serving_invalid_features": ("Bad cells by feature.", (*_MODEL, "feature")),
    "serving_worker_restarts": ("Workers that were replaced, by why.", ("reason",)),
    "serving_log_lines_dropped": ("Lines of the log that nobody read.", ()),
    "serving_shadow_requests": ("Live requests in a shadow's share, by what became of the copy.", (*_MODEL, "outcome")),
    "serving_shadow_rows": ("Rows whose labels a shadow and the live version gave.", _MODEL),
    "serving_shadow_agreeing_rows": ("Rows for which both gave the same label.", _MODEL),
    "serving_connections_cut": ("Connections that the server ended for what their client did, by reason.", ("reason",)),
    "serving_http_requests": ("HTTP requests by status class.", ("route", "method", "status")),
}
_HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "serving_batch_rows": ("Rows that ran together.", _MODEL, ROWS),
    "serving_queue_seconds": ("Seconds from accepted to running, each request.", _MODEL, SECONDS),
    "serving_inference_seconds": ("Seconds in the model, each batch.", _MODEL, SECONDS),
    "serving_prediction_seconds": ("Seconds from body to answer, each prediction.", _MODEL, SECONDS),
    "serving_shadow_seconds": ("Seconds in the shadow's model, each copy.", _MODEL, SECONDS),
    "serving_shadow_score_difference": (
        "Greatest difference of a row's scores between a shadow and the live version.",
        _MODEL,
        DIFFERENCES,
    ),
    "serving_http_request_seconds": ("Seconds from request to answer.", ("route", "method"), SECONDS),
}
_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "serving_queued_rows": ("Rows that wait, over all workers.", _MODEL),
    "serving_http_in_flight": ("HTTP requests in progress, over all workers.", ("route", "method")),
    "serving_model_ready": ("1 where every worker serves the version.", _MODEL),
    "serving_shadow_agreement_ratio": ("Share of compared rows with the same label, 0 to 1.", _MODEL),
    "serving_last_prediction_timestamp_seconds": ("Unix time of the last answered prediction.", _MODEL),
    "serving_model_quarantined": ("1 where a version is held back because it ended workers.", _MODEL),
    "serving_model_generation": ("Generation of the traffic state that every worker serves.", ("model",)),
    "serving_model_asked_generation": ("Generation of the traffic state that the folder asks for.", ("model",)),
    "serving_gate_passed": ("1 where the gate let a version pass, 0 where it was refused.", _MODEL),
    **{
        f"serving_gate_{what}": (f"{text}, of `this` version or the one that was `serving` then.", (*_MODEL, "of"))
        for what, text in (
            ("load_seconds", "Seconds that the gate took to load and warm it"),
            ("row_seconds", "Seconds of one row in the gate, the median"),
            ("memory_bytes", "Growth of the gate's process that loaded it"),
        )
    },
    "serving_coordinator_failures": ("Unforeseen failures in bringing the workers to what the folder asks for.", ()),
    "serving_model_refused": ("1 where the state that the folder asks for can't be served.", ("model",)),
    "serving_model_info": ("1; the labels describe the version.", (*_MODEL, "task", "sha256")),
    "serving_worker_start_time_seconds": ("Unix time at which the worker in a slot started.", ("worker",)),
    "serving_worker_resident_bytes": ("Resident memory of the worker in a slot.", ("worker",)),
}
_LEAST = frozenset({"serving_model_ready", "serving_model_info", "serving_model_generation", "serving_gate_passed"})
_GREATEST = frozenset(
    {
        "serving_last_prediction_timestamp_seconds",
        "serving_model_asked_generation",
        "serving_model_refused",
        "serving_model_quarantined",
        "serving_coordinator_failures",
        "serving_gate_load_seconds",
        "serving_gate_row_seconds",
        "serving_gate_memory_bytes",
    }
)

# Outcome, and the reason where the prediction was not run; what is not here failed by a fault of ours or the model's.
_OUTCOMES: dict[type[ServingError], tuple[str, str]] = {
    InvalidRequest: ("invalid", ""),
    SignatureMismatch: ("invalid", ""),
    UnsupportedMediaType: ("invalid", ""),
    ModelNotFound: ("invalid", ""),
    PayloadTooLarge: ("invalid", ""),
    QueueFull: ("rejected", "queue_full"),
    NotReady: ("rejected", "not_ready"),
    DeadlineExceeded: ("expired", "deadline"),
}

Labels: TypeAlias = tuple[str, ...]
Version: TypeAlias = tuple[str, str]
"""Name and version of a model."""
Key: TypeAlias = tuple[str, Labels]


class _Store:
    """Counters, histograms and gauges of one worker, as they go into its snapshot."""

    def __init__(self) -> None:
        self.counters: dict[Key, float] = defaultdict(float)
        self.histograms: dict[Key, list[float]] = {}
        """For each: a count a bucket, one beyond the last, and the sum."""
        self.gauges: dict[Key, float] = {}

    def observe(self, name: str, labels: Labels, values: list[float]) -> None:
        bounds = _HISTOGRAMS[name][2]
        cells = self.histograms.get((name, labels))
        if cells is None:
            cells = self.histograms[name, labels] = [0.0] * (len(bounds) + 2)
        if values:
            places = np.searchsorted(bounds, values)
            for index, number in enumerate(np.bincount(places, minlength=len(bounds) + 1).tolist()):
                cells[index] += number
            cells[-1] += math.fsum(values)

    def dump(self) -> bytes:
        def rows(table: dict[Key, Any]) -> list[Any]:
            return [[name, labels, value] for (name, labels), value in table.items()]

        return orjson.dumps([rows(self.counters), rows(self.histograms), rows(self.gauges)])

    def add(self, text: bytes, *, gauges: bool) -> None:
        """Add a snapshot. Raises ValueError, and adds nothing, where it is not one."""
        try:
            counters, histograms, found = orjson.loads(text)
            counted = [((str(n), tuple(map(str, ls))), float(v)) for n, ls, v in counters]
            observed = [((str(n), tuple(map(str, ls))), [float(c) for c in v]) for n, ls, v in histograms]
            measured = [((str(n), tuple(map(str, ls))), float(v)) for n, ls, v in found]
        except (TypeError, ValueError) as error:
            raise ValueError("not a snapshot") from error
        for key, value in counted:
            if key[0] in _COUNTERS:
                self.counters[key] += value
        for key, cells in observed:
            if key[0] in _HISTOGRAMS and len(cells) == len(_HISTOGRAMS[key[0]][2]) + 2:
                mine = self.histograms.setdefault(key, [0.0] * len(cells))
                for index, cell in enumerate(cells):
                    mine[index] += cell
        for key, value in measured if gauges else ():
            if key[0] in _LEAST:
                self.gauges[key] = min(value, self.gauges.get(key, value))
            elif key[0] in _GREATEST:
                self.gauges[key] = max(value, self.gauges.get(key, value))
            elif key[0] in _GAUGES:
                self.gauges[key] = self.gauges.get(key, 0.0) + value


class ModelMetrics:
    """What is counted of one version. The methods only append; `fold` does the rest."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._outcomes: dict[tuple[str, str], int] = defaultdict(int)
        self._rows = 0
        self._answered: dict[str, list[float]] = defaultdict(list)
        self._seconds: list[float] = []
        self._batch_rows: list[float] = []
        self._queue: list[float] = []
        self._inference: list[float] = []
        self._rejected: dict[str, int] = defaultdict(int)
        self._invalid: dict[str, int] = defaultdict(int)
        self._queued = 0
        self._ready = False
        self._info: Labels | None = None

    def answered(self, protocol: str, rows: int, seconds: float) -> None:
        """Count a prediction that was answered: its rows, seconds from body to answer."""
        self._answered[protocol].append(seconds)
        self._rows += rows

    def failed(self, protocol: str, outcome: str, seconds: float) -> None:
        """Count a prediction that ended in another way."""
        self._outcomes[protocol, outcome] += 1
        self._seconds.append(seconds)

    def refused(self, protocol: str, error: ServingError, seconds: float) -> None:
        """Count a prediction that ended in an error, by who is to blame and, where it was not run, why."""
        outcome, reason = _OUTCOMES.get(type(error), ("failed", ""))
        self.failed(protocol, outcome, seconds)
        if reason:
            self._rejected[reason] += 1
        if isinstance(error, SignatureMismatch):
            for detail in error.details:
                if detail.feature:
                    self._invalid[detail.feature] += 1

    def ran(self, rows: int, queue_seconds: list[float], inference_seconds: float) -> None:
        """Count a batch that ran, and how long each of its requests had waited."""
        self._batch_rows.append(rows)
        self._queue += queue_seconds
        self._inference.append(inference_seconds)

    def queued(self, rows: int) -> None:
        """Say how many rows wait now."""
        self._queued = rows

    def ready(self, is_ready: bool) -> None:
        """Say whether this worker serves the version."""
        self._ready = is_ready

    def info(self, *, task: str, sha256: str) -> None:
        """Describe the version."""
        self._info = (task, sha256)

    def fold(self, store: _Store) -> None:
        """Move what was gathered into the store."""
        labels = self.labels
        for protocol, seconds in self._answered.items():
            self._outcomes[protocol, "ok"] += len(seconds)
            self._seconds += seconds
            seconds.clear()
        for (protocol, outcome), number in self._outcomes.items():
            store.counters["serving_predictions", (*labels, protocol, outcome)] += number
        self._outcomes.clear()
        store.counters["serving_rows", labels] += self._rows
        if self._rows:
            store.gauges["serving_last_prediction_timestamp_seconds", labels] = time.time()
        self._rows = 0
        for name, table in (
            ("serving_rejected", self._rejected),
            ("serving_invalid_features", self._invalid),
        ):
            for value, number in table.items():
                store.counters[name, (*labels, value)] += number
            table.clear()
        for name, values in (
            ("serving_prediction_seconds", self._seconds),
            ("serving_batch_rows", self._batch_rows),
            ("serving_queue_seconds", self._queue),
            ("serving_inference_seconds", self._inference),
        ):
            store.observe(name, labels, values)
            values.clear()
        store.gauges["serving_queued_rows", labels] = self._queued
        store.gauges["serving_model_ready", labels] = float(self._ready)
        if self._info is not None:
            store.gauges["serving_model_info", (*labels, *self._info)] = 1.0


class ShadowMetrics:
    """What is counted of a version in the shadow of another."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._outcomes: dict[str, int] = defaultdict(int)
        self._rows = 0
        self._agreeing = 0
        self._differences: list[float] = []
        self._seconds: list[float] = []

    def compared(self, rows: int, agreeing: int | None, differences: list[float], seconds: float) -> None:
        """Count a copy whose answer was compared. agreeing: rows with the same label; None where there are none."""
        self._outcomes["compared"] += 1
        if agreeing is not None:
            self._rows += rows
            self._agreeing += agreeing
        self._differences += differences
        self._seconds.append(seconds)

    def broke(self) -> None:
        """Count a copy that the version could not answer."""
        self._outcomes["failed"] += 1

    def skipped(self, reason: str) -> None:
        """Count a request that was not copied: `busy`, or `incompatible` inputs."""
        self._outcomes[reason] += 1

    def fold(self, store: _Store) -> None:
        """Move what was gathered into the store."""
        for outcome, number in self._outcomes.items():
            store.counters["serving_shadow_requests", (*self.labels, outcome)] += number
        self._outcomes.clear()
        store.counters["serving_shadow_rows", self.labels] += self._rows
        store.counters["serving_shadow_agreeing_rows", self.labels] += self._agreeing
        self._rows = self._agreeing = 0
        store.observe("serving_shadow_score_difference", self.labels, self._differences)
        store.observe("serving_shadow_seconds", self.labels, self._seconds)
        self._differences.clear()
        self._seconds.clear()


class RouteMetrics:
    """What is counted of one route and method."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.in_flight = 0
        """Requests in progress; the doors add and take away."""
        self._statuses = [0] * 6
        self._seconds: list[float] = []

    def finished(self, status: int, seconds: float) -> None:
        """Count its answer; a client that left before it counts as 499."""
        self._statuses[status // 100] += 1
        self._seconds.append(seconds)

    def fold(self, store: _Store) -> None:
        """Move what was gathered into the store."""
        for index, number in enumerate(self._statuses):
            if number:
                store.counters["serving_http_requests", (*self.labels, f"{index}xx")] += number
                self._statuses[index] = 0
        store.gauges["serving_http_in_flight", self.labels] = self.in_flight
        store.observe("serving_http_request_seconds", self.labels, self._seconds)
        self._seconds.clear()


class Metrics:
    """All counters of one worker, and the view over all workers that share `directory`.

    directory: where the workers' snapshots lie; None keeps to this process. slot: this worker's number.
    dropped_lines: says how many lines of the log this process dropped. All methods are called on one thread, the event
    loop's.
    """

    def __init__(self, *, directory: Path | None = None, slot: int = 0, dropped_lines: Callable[[], int] = int) -> None:
        self._directory = directory
        self._dropped_lines = dropped_lines
        self._dropped = 0
        self._slot = slot
        self._store = _Store()
        self._models: dict[Labels, ModelMetrics] = {}
        self._routes: dict[Labels, RouteMetrics] = {}
        self._shadows: dict[Labels, ShadowMetrics] = {}
        self.cut: Counter[str] = Counter()
        """Connections that were ended, by reason; who ends them adds."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._store.gauges["serving_worker_start_time_seconds", (str(slot),)] = time.time()
        if directory is not None:
            with contextlib.suppress(OSError):
                _add(self._store, self._file(), gauges=False)

    def _file(self) -> Path:
        assert self._directory is not None  # noqa: S101  asked for only with a folder
        return self._directory / f"worker-{self._slot}.json"

    def model(self, name: str, version: str) -> ModelMetrics:
        """Return the counters of one version."""
        labels = (name, version)
        if labels not in self._models and len(self._models) >= MOST_SERIES:
            labels = ("other", "")
        return self._models.setdefault(labels, ModelMetrics(labels))

    def serving(self, model: str, generation: int) -> None:
        """Say which generation of a model's traffic state this worker serves."""
        self._store.gauges["serving_model_generation", (model,)] = generation

    def passed(self, versions: list[tuple[str, str, bool]]) -> None:
        """Say which versions, by name and version, the gate let pass, and which not."""
        for key in [key for key in self._store.gauges if key[0] == "serving_gate_passed"]:
            del self._store.gauges[key]
        for name, version, let in versions[:MOST_SERIES]:
            self._store.gauges["serving_gate_passed", (name, version)] = float(let)

    def examined(self, figures: list[tuple[str, str, str, str, float]], stumbles: int) -> None:
        """Take what the gate measured (name, version, of which, what, value), and how often the coordinator failed."""
        for key in [key for key in self._store.gauges if key[0].startswith("serving_gate_") and len(key[1]) == 3]:
            del self._store.gauges[key]
        for name, version, of, what, value in figures[: 6 * MOST_SERIES]:
            self._store.gauges[f"serving_gate_{what}", (name, version, of)] = value
        self._store.gauges["serving_coordinator_failures", ()] = stumbles

    def asked(self, model: str, generation: int, *, refused: bool) -> None:
        """Say which generation the folder asks for, and whether it can't be served."""
        self._store.gauges["serving_model_asked_generation", (model,)] = generation
        self._store.gauges["serving_model_refused", (model,)] = float(refused)

    def shadow(self, name: str, version: str) -> ShadowMetrics:
        """Return the counters of a version that runs as shadow."""
        labels = self.model(name, version).labels
        return self._shadows.setdefault(labels, ShadowMetrics(labels))

    def route(self, template: str, method: str) -> RouteMetrics:
        """Return the counters of one route template and method."""
        labels = (template, method)
        if labels not in self._routes and len(self._routes) >= MOST_SERIES:
            labels = ("other", "other")
        return self._routes.setdefault(labels, RouteMetrics(labels))

    def fold(self) -> None:
        """Fold what was gathered since the last time, and leave a snapshot for the other workers."""
        for model in self._models.values():
            model.fold(self._store)
        for shadow in self._shadows.values():
            shadow.fold(self._store)
        for route in self._routes.values():
            route.fold(self._store)
        for reason, number in self.cut.items():
            self._store.counters["serving_connections_cut", (reason,)] += number
        self.cut.clear()
        self._store.gauges["serving_worker_resident_bytes", (str(self._slot),)] = _resident_bytes()
        dropped = self._dropped_lines()
        self._store.counters["serving_log_lines_dropped", ()] += dropped - self._dropped
        self._dropped = dropped
        if self._directory is None:
            return
        file = self._file()
        fresh = file.with_suffix(".new")
        try:
            fresh.write_bytes(self._store.dump())
            fresh.replace(file)  # a reader sees the old snapshot or the new one, never half of one
        except OSError as error:
            log.error("metrics of this worker are not shared: %s", error.strerror)

    def totals(self, models: Iterable[Version]) -> dict[Version, dict[str, float]]:
        """Sum what versions, given as (name, version), did over all workers; see `totals`."""
        self.fold()
        return _totals(self._whole(), models)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition of all workers together, and its content type."""
        self.fold()
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Yield metric families (prometheus_client's collector interface)."""
        yield from _families(self._whole())

    def _whole(self) -> _Store:
        """Add up the snapshots of all workers."""
        whole = _Store()
        whole.add(self._store.dump(), gauges=True)
        if self._directory is not None:
            mine = self._file()
            for file in sorted(self._directory.glob("worker-*.json")):
                if file != mine:
                    _add(whole, file, gauges=True)
        return whole


def totals(directory: Path, models: Iterable[Version]) -> dict[Version, dict[str, float]]:
    """Sum what versions, given as (name, version), did over the workers that share `directory`. For the parent process.

    Times in seconds, `last` in Unix time. `ok` and `failed` are predictions; of the latter `invalid` were the callers'
    fault and `gone` were left by them. `shadow_*` is what a version did as shadow.
    """
    whole = _Store()
    for file in sorted(directory.glob("worker-*.json")):
        _add(whole, file, gauges=True)
    return _totals(whole, models)


def _add(store: _Store, file: Path, *, gauges: bool) -> None:
    try:
        store.add(file.read_bytes(), gauges=gauges)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        log.error("%s can't be read and is left out", file.name)


def _totals(whole: _Store, models: Iterable[Version]) -> dict[Version, dict[str, float]]:
    found: dict[Version, dict[str, float]] = {}
    for labels in models:
        total = found[labels] = dict.fromkeys(("ok", "failed", "invalid", "gone"), 0.0)
        total["rows"] = whole.counters.get(("serving_rows", labels), 0.0)
        for short in ("queue", "inference", "prediction", "shadow"):
            cells = whole.histograms.get((f"serving_{short}_seconds", labels), [0.0])
            total[f"{short}_count"], total[f"{short}_sum"] = sum(cells[:-1]), cells[-1]
        total["last"] = whole.gauges.get(("serving_last_prediction_timestamp_seconds", labels), 0.0)
        for short in ("rows", "agreeing_rows"):
            total[f"shadow_{short}"] = whole.counters.get((f"serving_shadow_{short}", labels), 0.0)
        for outcome in ("compared", "failed", "busy", "incompatible"):
            key = ("serving_shadow_requests", (*labels, outcome))
            total[f"shadow_{outcome}"] = whole.counters.get(key, 0.0)
        cells = whole.histograms.get(("serving_shadow_score_difference", labels), [0.0])
        total["shadow_difference_count"], total["shadow_difference_sum"] = sum(cells[:-1]), cells[-1]
        for bound, count in _cumulative(DIFFERENCES, cells) if len(cells) > 1 else ():
            total[f"shadow_difference_le_{bound}"] = count
    for (name, of), value in whole.counters.items():
        if name == "serving_predictions" and (of[0], of[1]) in found:
            total, outcome = found[of[0], of[1]], of[-1]
            total["ok" if outcome == "ok" else "failed"] += value
            if outcome in ("invalid", "gone"):
                total[outcome] += value
    return found


def forget_gauges(directory: Path, slot: int) -> None:
    """Drop the gauges of a worker that died: its queue and its requests went with it. For the parent process."""
    file = directory / f"worker-{slot}.json"
    store = _Store()
    with contextlib.suppress(OSError, ValueError):
        store.add(file.read_bytes(), gauges=False)
        fresh = file.with_suffix(".dead")
        fresh.write_bytes(store.dump())
        fresh.replace(file)


def leave_word(directory: Path, *, counters: dict[Key, float], gauges: dict[Key, float]) -> None:
    """Leave what only the parent process knows where scrapes add it up."""
    store = _Store()
    store.counters.update(counters)
    store.gauges.update(gauges)
    with contextlib.suppress(OSError):  # a full disk: the next word says it again
        fresh = directory / "worker-parent.new"
        fresh.write_bytes(store.dump())
        fresh.replace(directory / "worker-parent.json")


def _families(store: _Store) -> Iterator[Metric]:
    for name, (text, label_names) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=label_names)
        for (key, labels), value in store.counters.items():
            if key == name:
                counter.add_metric(labels, value)
        yield counter
    for name, (text, label_names, bounds) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=label_names)
        for (key, labels), cells in store.histograms.items():
            if key == name:
                histogram.add_metric(labels, list(_cumulative(bounds, cells)), cells[-1])
        yield histogram
    for (key, labels), rows in list(store.counters.items()):
        if key == "serving_shadow_rows" and rows:
            agreeing = store.counters["serving_shadow_agreeing_rows", labels]
            store.gauges["serving_shadow_agreement_ratio", labels] = agreeing / rows
    for name, (text, label_names) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=label_names)
        for (key, labels), value in store.gauges.items():
            if key == name:
                gauge.add_metric(labels, value)
        yield gauge


def _cumulative(bounds: tuple[float, ...], cells: list[float]) -> Iterator[tuple[str, float]]:
    total = 0.0
    for bound, cell in zip(bounds, cells, strict=False):
        total += cell
        yield f"{bound:g}", total
    yield "+Inf", total + cells[len(bounds)]


def _resident_bytes() -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0.0
