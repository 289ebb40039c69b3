"""The counts by the names that Triton gives them, which dashboards and autoscalers made for it read.

Source: Triton's user guide, Metrics. Durations are microseconds, added up over requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from serving.metrics.definitions import Labels
from serving.metrics.store import Store
from serving.metrics.totals import VersionTotals, totals_of

Family: TypeAlias = tuple[str, Labels, list[tuple[Labels, float]]]
"""Help, names of the labels, and of each sample their values and its own."""

_OF_TOTALS: dict[str, tuple[str, Callable[[VersionTotals], float]]] = {
    "nv_inference_request_success": ("Requests that were answered", lambda t: t.ok),
    "nv_inference_count": ("Rows that were predicted", lambda t: t.rows),
    "nv_inference_exec_count": ("Batches that ran", lambda t: t.batches),
    "nv_inference_request_duration_us": (
        "Time of answered requests",
        lambda t: 1e6 * (t.prediction_seconds - t.failing_seconds),
    ),
    "nv_inference_queue_duration_us": ("Time in the queue", lambda t: 1e6 * t.queue_seconds),
    "nv_inference_compute_input_duration_us": ("Time before the queue", lambda t: 1e6 * t.decode_seconds),
    "nv_inference_compute_infer_duration_us": ("Time in the model", lambda t: 1e6 * t.request_inference_seconds),
    "nv_inference_compute_output_duration_us": ("Time after the model", lambda t: 1e6 * t.encode_seconds),
    "nv_cache_num_hits_per_model": ("Requests that a response cache answered", lambda t: t.cache_hits + t.cache_joined),
    "nv_cache_num_misses_per_model": ("Requests that a response cache had no answer to", lambda t: t.cache_misses),
}
_VERSION = ("model", "version")
_REASONS = {"rejected": "REJECTED", "gone": "CANCELED", "failed": "BACKEND"}


def triton_samples(store: Store) -> dict[str, Family]:
    """Return the families by name."""
    totals = totals_of(store, store.versions())
    found: dict[str, Family] = {
        name: (text, _VERSION, [(version, read(total)) for version, total in totals.items()])
        for name, (text, read) in _OF_TOTALS.items()
    }
    failures: dict[Labels, float] = {}
    for (name, labels), value in store.counters.items():
        if name == "serving_predictions" and labels[-1] != "ok":
            at = (*labels[:2], _REASONS.get(labels[-1], "OTHER"))
            failures[at] = failures.get(at, 0.0) + value
    found["nv_inference_request_failure"] = (
        "Requests that were not answered, by reason",
        (*_VERSION, "reason"),
        list(failures.items()),
    )
    for name, text, ours in (
        ("nv_inference_pending_request_count", "Rows that wait", "serving_queued_rows"),
        ("nv_model_load_duration_secs", "Time to load the version", "serving_model_load_seconds"),
    ):
        found[name] = text, _VERSION, [(of, value) for (key, of), value in store.gauges.items() if key == ours]
    return found
