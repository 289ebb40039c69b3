"""What is gathered of a version, a shadow and a route: counters at once, the rest until the next flush.

The methods are called on the event loop and only add and append; `flush` may run on another thread meanwhile.
"""

from __future__ import annotations

import re
import time
import weakref
from typing import TypeVar

from serving.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    RateLimited,
    ServingError,
    SignatureMismatch,
    UnsupportedMediaType,
    by_kind,
)
from serving.metrics.counts import Cells, Counts
from serving.metrics.definitions import Cell, Labels, Version
from serving.metrics.store import Store

# Outcome, and the reason where the prediction was not run; what is not here failed by a fault of ours or the model's.
_OUTCOMES: dict[type[ServingError], tuple[str, str]] = {
    InvalidRequest: ("invalid", ""),
    SignatureMismatch: ("invalid", ""),
    UnsupportedMediaType: ("invalid", ""),
    ModelNotFound: ("invalid", ""),
    PayloadTooLarge: ("invalid", ""),
    QueueFull: ("rejected", "queue_full"),
    RateLimited: ("rejected", "rate_limited"),
    NotReady: ("rejected", "not_ready"),
    DeadlineExceeded: ("expired", "deadline"),
}

_SAMPLED = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f][13579bdf](?:-.*)?")

_MOST_TRACES = 64
"""That are looked at in a flush: there is room for one a bucket, whoever traces every prediction."""

T = TypeVar("T")


def outcome_of(error: ServingError) -> tuple[str, str]:
    """Return what a prediction that ended in an error counts as, and the reason where it was not run."""
    return by_kind(_OUTCOMES, error, ("failed", ""))


def taken(values: list[T]) -> list[T]:
    """Take what a list has; what is appended meanwhile stays for the next time."""
    number = len(values)
    taken = values[:number]
    del values[:number]
    return taken


class ModelMetrics:
    """What is counted of one version."""

    def __init__(self, labels: Version, counts: Counts) -> None:
        def cell(name: str, *more: str) -> Cell:
            return counts.cell(name, (*labels, *more))

        self.labels = labels
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._ok: Cells[str] = Cells(lambda protocol: cell("serving_predictions", protocol, "ok"))
        self._seldom: Cells[tuple[str, ...]] = Cells(lambda of: cell(*of))
        self._rows = cell("serving_rows")
        self._bad_rows = cell("serving_bad_rows")
        self._failing = cell("serving_failed_prediction_seconds")
        self._rows_before = 0.0
        self._seconds: list[float] = []
        self._decode: list[float] = []
        self._encode: list[float] = []
        self.slowest = 0.0
        """Seconds of the slowest prediction since the last flush whose trace was asked for."""
        self._traced: list[tuple[float, str]] = []
        self._batches: list[tuple[int, float]] = []
        self._queue: list[float] = []
        self._queued = 0
        self._ready = False
        self._info: Labels | None = None
        self._threads = 0
        self._load_seconds = 0.0

    def used_by(self, model: object) -> None:
        """Keep the version's series for as long as this lives, which counts here."""
        self._users.add(model)

    @property
    def in_use(self) -> bool:
        """Whether there is something that counts here."""
        return bool(self._users)

    def answered(self, protocol: str, rows: int, seconds: float) -> None:
        """Count a prediction that was answered: its rows, seconds from body to answer."""
        self._ok[protocol][0] += 1
        self._rows[0] += rows
        self._seconds.append(seconds)

    def stages(self, decode: float, encode: float) -> None:
        """Count the seconds of a prediction before it was queued, and after its batch ended."""
        self._decode.append(decode)
        self._encode.append(encode)

    def slow(self, seconds: float, traceparent: bytes | None) -> None:
        """Take the trace of the slowest prediction so far, if its caller records one (W3C, Trace Context)."""
        self.slowest = seconds
        if traceparent is not None and (found := _SAMPLED.fullmatch(traceparent)) is not None:
            self.traced(seconds, found[1].decode())

    def traced(self, seconds: float, trace: str) -> None:
        """Take the trace of a prediction."""
        self._traced.append((seconds, trace))

    def failed(self, protocol: str, outcome: str, seconds: float) -> None:
        """Count a prediction that ended in another way."""
        self.add("serving_predictions", 1, protocol, outcome)
        self._failing[0] += seconds
        self._seconds.append(seconds)

    def refused(self, protocol: str, error: ServingError, seconds: float) -> None:
        """Count a prediction that ended in an error, by who is to blame and, where it was not run, why."""
        outcome, reason = outcome_of(error)
        self.failed(protocol, outcome, seconds)
        if reason:
            self.add("serving_rejected", 1, reason)
        if isinstance(error, SignatureMismatch):
            for detail in error.details:
                if detail.feature:
                    self.add("serving_invalid_features", 1, detail.feature)

    def bulk_rows(self, good: int, bad: int) -> None:
        """Count rows that came in bulk."""
        self._rows[0] += good
        self._bad_rows[0] += bad

    def bulk_ended(self, protocol: str, outcome: str) -> None:
        """Count how rows in bulk ended, all of them as one prediction, whose seconds say nothing of others."""
        self.add("serving_predictions", 1, protocol, outcome)

    def cached(self, outcome: str) -> None:
        """Count what a response cache made of a request."""
        self.add("serving_cache_requests", 1, outcome)

    def ran(self, rows: int, queue_seconds: list[float], inference_seconds: float) -> None:
        """Count a batch that ran, and how long each of its requests had waited."""
        self._batches.append((rows, inference_seconds))
        self._queue += queue_seconds

    def add(self, name: str, number: float, *labels: str) -> None:
        """Count what seldom comes, into a counter of the version with these labels behind its own."""
        self._seldom[name, *labels][0] += number

    def queued(self, rows: int) -> None:
        """Say how many rows wait now."""
        self._queued = rows

    def ready(self, is_ready: bool) -> None:
        """Say whether this worker serves the version."""
        self._ready = is_ready

    def info(self, *, task: str, sha256: str, threads: int, load_seconds: float | None) -> None:
        """Describe the version. threads: that run it here. load_seconds: None where it was loaded before."""
        self._info = (task, sha256)
        self._threads = threads
        self._load_seconds = self._load_seconds if load_seconds is None else load_seconds

    def flush(self, store: Store) -> None:
        """Move what was gathered into the store."""
        labels = self.labels
        if self._rows[0] != self._rows_before:
            self._rows_before = self._rows[0]
            store.gauges["serving_last_prediction_timestamp_seconds", labels] = time.time()
        batches = taken(self._batches)
        rows, seconds = [rows for rows, _ in batches], [seconds for _, seconds in batches]
        store.ran(labels, rows, seconds)
        store.observe("serving_prediction_seconds", labels, taken(self._seconds))
        store.observe("serving_decode_seconds", labels, taken(self._decode))
        store.observe("serving_encode_seconds", labels, taken(self._encode))
        self.slowest = 0.0
        for slow, trace in taken(self._traced)[-_MOST_TRACES:]:
            store.exemplify("serving_prediction_seconds", labels, slow, trace)
        store.observe("serving_batch_rows", labels, rows)
        store.observe("serving_queue_seconds", labels, taken(self._queue))
        store.observe("serving_inference_seconds", labels, seconds)
        if self._queued or ("serving_queue_seconds", labels) in store.histograms:
            store.gauges["serving_queued_rows", labels] = self._queued
        store.gauges["serving_model_ready", labels] = float(self._ready)
        if self._info is not None:
            store.gauges["serving_model_info", (*labels, *self._info)] = 1.0
            store.gauges["serving_model_load_seconds", labels] = self._load_seconds
            store.gauges["serving_model_threads", labels] = self._threads if self._ready else 0.0


class ShadowMetrics:
    """What is counted of a version in the shadow of another."""

    def __init__(self, labels: Version, counts: Counts) -> None:
        self.labels = labels
        self._outcomes: Cells[str] = Cells(lambda outcome: counts.cell("serving_shadow_requests", (*labels, outcome)))
        self._rows = counts.cell("serving_shadow_rows", labels)
        self._agreeing = counts.cell("serving_shadow_agreeing_rows", labels)
        self._differences: list[float] = []
        self._seconds: list[float] = []

    def compared(self, rows: int, agreeing: int | None, differences: list[float], seconds: float) -> None:
        """Count a copy whose answer was compared. agreeing: rows with the same label; None where there are none."""
        self._outcomes["compared"][0] += 1
        if agreeing is not None:
            self._rows[0] += rows
            self._agreeing[0] += agreeing
        self._differences += differences
        self._seconds.append(seconds)

    def broke(self) -> None:
        """Count a copy that the version could not answer."""
        self._outcomes["failed"][0] += 1

    def skipped(self, reason: str) -> None:
        """Count a request that was not copied: `busy`, or `incompatible` inputs."""
        self._outcomes[reason][0] += 1

    def flush(self, store: Store) -> None:
        """Move what was gathered into the store."""
        store.observe("serving_shadow_score_difference", self.labels, taken(self._differences))
        store.observe("serving_shadow_seconds", self.labels, taken(self._seconds))


class RouteMetrics:
    """What is counted of one route and method."""

    def __init__(self, labels: Labels, counts: Counts) -> None:
        self.labels = labels
        self.in_flight = 0
        """Requests in progress on the short path, which adds and takes away."""
        self.in_flight_by_asgi = 0
        self._statuses: Cells[int] = Cells(lambda kind: counts.cell("serving_http_requests", (*labels, f"{kind}xx")))
        self._seconds: list[float] = []

    def finished(self, status: int, seconds: float) -> None:
        """Count its answer; a client that left before it counts as 499."""
        self._statuses[status // 100][0] += 1
        self._seconds.append(seconds)

    def flush(self, store: Store) -> None:
        """Move what was gathered into the store."""
        store.gauges["serving_http_in_flight", self.labels] = self.in_flight + self.in_flight_by_asgi
        store.observe("serving_http_request_seconds", self.labels, taken(self._seconds))
