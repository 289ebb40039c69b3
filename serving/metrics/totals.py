"""What versions did, summed over all workers; and what the parent process adds to their metrics."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from serving.linux.files import write_whole
from serving.linux.process_usage import usage
from serving.metrics.counts import Counts
from serving.metrics.definitions import COUNTERS, DIFFERENCES, Key, Version
from serving.metrics.store import Store, read_snapshots


def _counted(name: str, *labels: str) -> Any:
    """Make a field that a counter of each version fills."""
    key = f"serving_{name}"
    return _field(lambda store, version: store.counters.get((key, (*version, *labels)), 0.0))


def _observed(name: str) -> Any:
    """Make a field for how often a histogram of each version observed something."""
    return _field(lambda store, version: sum(store.histograms.get((f"serving_{name}", version), [0.0])[:-1]))


def _summed(name: str) -> Any:
    """Make a field for the sum of all that a histogram of each version observed."""
    return _field(lambda store, version: store.histograms.get((f"serving_{name}", version), [0.0])[-1])


def _differences(store: Store, version: Version) -> dict[str, float]:
    cells = store.histograms.get(("serving_shadow_score_difference", version), [])
    bounds = [*(f"{bound:g}" for bound in DIFFERENCES), "+Inf"]
    return dict(zip(bounds, accumulate(cells), strict=False))  # the last cell is no count


def _field(read: Callable[[Store, Version], Any]) -> Any:
    return field(default=0.0, metadata={"read": read})


@dataclass(frozen=True, slots=True)
class VersionTotals:
    """What one version did since the server started. Times in seconds."""

    ok: float = 0.0
    failed: float = 0.0
    invalid: float = 0.0
    """Of those that failed, by the callers' fault."""
    gone: float = 0.0
    """Of those that failed, left by their callers."""
    failing_seconds: float = _counted("failed_prediction_seconds")
    rows: float = _counted("rows")
    last: float = _field(lambda store, of: store.gauges.get(("serving_last_prediction_timestamp_seconds", of), 0.0))
    """Unix time of the last answered prediction."""
    predictions: float = _observed("prediction_seconds")
    prediction_seconds: float = _summed("prediction_seconds")
    queued: float = _observed("queue_seconds")
    """Requests that ran, and so had waited."""
    queue_seconds: float = _summed("queue_seconds")
    batches: float = _observed("inference_seconds")
    inference_seconds: float = _summed("inference_seconds")
    decode_seconds: float = _summed("decode_seconds")
    encode_seconds: float = _summed("encode_seconds")
    outcomes: float = _counted("feedback_outcomes")
    """True outcomes that were joined with its predictions."""
    right: float = _counted("feedback_right")
    cache_hits: float = _counted("cache_requests", "hit")
    cache_joined: float = _counted("cache_requests", "joined")
    cache_misses: float = _counted("cache_requests", "miss")
    shadow_compared: float = _counted("shadow_requests", "compared")
    shadow_failed: float = _counted("shadow_requests", "failed")
    shadow_busy: float = _counted("shadow_requests", "busy")
    shadow_incompatible: float = _counted("shadow_requests", "incompatible")
    shadow_rows: float = _counted("shadow_rows")
    """Rows for which it and the live version gave labels."""
    shadow_agreeing_rows: float = _counted("shadow_agreeing_rows")
    shadow_timed: float = _observed("shadow_seconds")
    shadow_seconds: float = _summed("shadow_seconds")
    differences: float = _observed("shadow_score_difference")
    """Rows whose scores were compared with the live version's."""
    difference_sum: float = _summed("shadow_score_difference")
    differences_up_to: dict[str, float] = field(default_factory=dict, metadata={"read": _differences})
    """By upper bound, as text."""

    @property
    def request_inference_seconds(self) -> float:
        """Seconds in the model, added up over requests: each one of a batch takes as long as its batch."""
        return self.inference_seconds / self.batches * self.queued if self.batches else 0.0

    def since(self, before: VersionTotals) -> VersionTotals:
        """Return what was done since `before`; never below zero, for series that nobody asks for are forgotten."""
        names = [each.name for each in fields(self) if each.name != "differences_up_to"]
        return replace(self, **{name: max(0.0, getattr(self, name) - getattr(before, name)) for name in names})


def totals_of(store: Store, versions: Iterable[Version]) -> dict[Version, VersionTotals]:
    """Sum what versions, given as (name, version), did in a store."""
    ended: dict[Version, dict[str, Any]] = {version: defaultdict(float) for version in versions}
    for (name, labels), value in store.counters.items():
        if name == "serving_predictions" and (labels[0], labels[1]) in ended:
            mine, outcome = ended[labels[0], labels[1]], labels[-1]
            mine["ok" if outcome == "ok" else "failed"] += value
            if outcome in ("invalid", "gone"):
                mine[outcome] += value
    read = {each.name: each.metadata["read"] for each in fields(VersionTotals) if each.metadata}
    found = {}
    for version, outcomes in ended.items():
        values: dict[str, Any] = {name: of(store, version) for name, of in read.items()}
        found[version] = VersionTotals(**outcomes, **values)
    return found


# The parent process, in the folder that its workers share.


def read_totals(directory: Path, versions: Iterable[Version]) -> dict[Version, VersionTotals]:
    """Sum what versions, given as (name, version), did over all workers."""
    whole = Store()
    for snapshot in read_snapshots(directory.glob("worker-*.json")):
        whole.add(snapshot._replace(sizes=()))
    return totals_of(whole, versions)


def settle(directory: Path, slot: int, counts: Counts) -> None:
    """Close the account of a worker that ended: what it counted to the last, without its gauges, which went with it.

    To be called before another worker gets the slot, which begins with what stands here.
    """
    file = directory / f"worker-{slot}.json"
    whole = Store()
    for snapshot in read_snapshots([file]):  # or that of the worker before, which was settled, where it left none
        whole.add(snapshot._replace(gauges=(), live=()))
    for key, value in counts.read().items():
        whole.counters[key] += value
    with contextlib.suppress(OSError):
        write_whole(file, whole.dump())


def write_parent_snapshot(directory: Path, *, counters: dict[Key, float], gauges: dict[Key, float]) -> None:
    """Leave what only the parent process knows where scrapes add it up."""
    store = Store()
    store.counters.update(counters)
    store.gauges.update(gauges)
    with contextlib.suppress(OSError):
        for name, value in usage().items():
            (store.counters if name in COUNTERS else store.gauges)[name, ("parent",)] = value
    with contextlib.suppress(OSError):  # a full disk: the next one says it again
        write_whole(directory / "worker-parent.json", store.dump())
