"""What is gathered of a version, a shadow and a route until the next fold; the methods only append."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict

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
    by_kind,
)
from serving.metrics.families import Labels, Version
from serving.metrics.store import Store

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


class ModelMetrics:
    """What is counted of one version. The methods only append; `fold` does the rest."""

    def __init__(self, labels: Version) -> None:
        self.labels = labels
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._outcomes: dict[tuple[str, str], int] = defaultdict(int)
        self._rows = 0
        self._answered: dict[str, list[float]] = defaultdict(list)
        self._seconds: list[float] = []
        self._failing = 0.0
        self._batch_rows: list[int] = []
        self._queue: list[float] = []
        self._inference: list[float] = []
        self._rejected: dict[str, int] = defaultdict(int)
        self._invalid: dict[str, int] = defaultdict(int)
        self._queued = 0
        self._ready = False
        self._info: Labels | None = None

    def used_by(self, model: object) -> None:
        """Keep the version's series for as long as this lives, which counts here."""
        self._users.add(model)

    @property
    def in_use(self) -> bool:
        """Whether there is something that counts here."""
        return bool(self._users)

    def answered(self, protocol: str, rows: int, seconds: float) -> None:
        """Count a prediction that was answered: its rows, seconds from body to answer."""
        self._answered[protocol].append(seconds)
        self._rows += rows

    def failed(self, protocol: str, outcome: str, seconds: float) -> None:
        """Count a prediction that ended in another way."""
        self._outcomes[protocol, outcome] += 1
        self._seconds.append(seconds)
        self._failing += seconds

    def refused(self, protocol: str, error: ServingError, seconds: float) -> None:
        """Count a prediction that ended in an error, by who is to blame and, where it was not run, why."""
        outcome, reason = by_kind(_OUTCOMES, error, ("failed", ""))
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

    def fold(self, store: Store) -> None:
        """Move what was gathered into the store."""
        labels = self.labels
        for protocol, seconds in self._answered.items():
            self._outcomes[protocol, "ok"] += len(seconds)
            self._seconds += seconds
            seconds.clear()
        for (protocol, outcome), number in self._outcomes.items():
            store.counters["serving_predictions", (*labels, protocol, outcome)] += number
        self._outcomes.clear()
        store.counters["serving_failed_prediction_seconds", labels] += self._failing
        self._failing = 0.0
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
        store.ran(labels, self._batch_rows, self._inference)
        histograms: tuple[tuple[str, list[int] | list[float]], ...] = (
            ("serving_prediction_seconds", self._seconds),
            ("serving_batch_rows", self._batch_rows),
            ("serving_queue_seconds", self._queue),
            ("serving_inference_seconds", self._inference),
        )
        for name, values in histograms:
            store.observe(name, labels, values)
            values.clear()
        store.gauges["serving_queued_rows", labels] = self._queued
        store.gauges["serving_model_ready", labels] = float(self._ready)
        if self._info is not None:
            store.gauges["serving_model_info", (*labels, *self._info)] = 1.0


class ShadowMetrics:
    """What is counted of a version in the shadow of another."""

    def __init__(self, labels: Version) -> None:
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

    def fold(self, store: Store) -> None:
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
        """Requests in progress on the short path, which adds and takes away."""
        self.in_flight_by_asgi = 0
        self._statuses = [0] * 6
        self._seconds: list[float] = []

    def finished(self, status: int, seconds: float) -> None:
        """Count its answer; a client that left before it counts as 499."""
        self._statuses[status // 100] += 1
        self._seconds.append(seconds)

    def fold(self, store: Store) -> None:
        """Move what was gathered into the store."""
        for index, number in enumerate(self._statuses):
            if number:
                store.counters["serving_http_requests", (*self.labels, f"{index}xx")] += number
                self._statuses[index] = 0
        store.gauges["serving_http_in_flight", self.labels] = self.in_flight + self.in_flight_by_asgi
        store.observe("serving_http_request_seconds", self.labels, self._seconds)
        self._seconds.clear()
