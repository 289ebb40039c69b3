"""What the parent process reads of its workers' metrics, and adds to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from serving.metrics.counts import Counts
from serving.metrics.definitions import DIFFERENCES, Key, Version
from serving.metrics.store import Store, add_file, cumulative


def totals(directory: Path, models: Iterable[Version]) -> dict[Version, dict[str, float]]:
    """Sum what versions, given as (name, version), did over the workers that share `directory`. For the parent process.

    Times in seconds, `last` in Unix time. `ok` and `failed` are predictions; of the latter `invalid` were the callers'
    fault and `gone` were left by them; `failing` is the time of all that failed. `shadow_*` is what a version
    did as shadow.
    """
    whole = Store()
    for file in sorted(directory.glob("worker-*.json")):
        add_file(whole, file, gauges=True, sizes=False)
    return totals_of(whole, models)


def totals_of(whole: Store, models: Iterable[Version]) -> dict[Version, dict[str, float]]:
    """Sum what versions did in a store; see `totals`."""
    found: dict[Version, dict[str, float]] = {}
    for labels in models:
        total = found[labels] = dict.fromkeys(("ok", "failed", "invalid", "gone"), 0.0)
        total["rows"] = whole.counters.get(("serving_rows", labels), 0.0)
        for short in ("queue", "inference", "prediction", "shadow"):
            cells = whole.histograms.get((f"serving_{short}_seconds", labels), [0.0])
            total[f"{short}_count"], total[f"{short}_sum"] = sum(cells[:-1]), cells[-1]
        total["last"] = whole.gauges.get(("serving_last_prediction_timestamp_seconds", labels), 0.0)
        total["failing"] = whole.counters.get(("serving_failed_prediction_seconds", labels), 0.0)
        for short in ("rows", "agreeing_rows"):
            total[f"shadow_{short}"] = whole.counters.get((f"serving_shadow_{short}", labels), 0.0)
        for outcome in ("compared", "failed", "busy", "incompatible"):
            key = ("serving_shadow_requests", (*labels, outcome))
            total[f"shadow_{outcome}"] = whole.counters.get(key, 0.0)
        cells = whole.histograms.get(("serving_shadow_score_difference", labels), [0.0])
        total["shadow_difference_count"], total["shadow_difference_sum"] = sum(cells[:-1]), cells[-1]
        for bound, count in cumulative(DIFFERENCES, cells) if len(cells) > 1 else ():
            total[f"shadow_difference_le_{bound}"] = count
    for (name, of), value in whole.counters.items():
        if name == "serving_predictions" and (of[0], of[1]) in found:
            total, outcome = found[of[0], of[1]], of[-1]
            total["ok" if outcome == "ok" else "failed"] += value
            if outcome in ("invalid", "gone"):
                total[outcome] += value
    return found


def settle(directory: Path, slot: int, counts: Counts) -> None:
    """Close the account of a worker that ended: what it counted to the last, without its gauges, which went with it.

    For the parent process.
    """
    file = directory / f"worker-{slot}.json"
    whole, snapshot = Store(), Store()
    with contextlib.suppress(OSError, ValueError):
        text = file.read_bytes()
        whole.add(text, gauges=False)
        snapshot.read_live(text)
    # A worker that ended before its first snapshot finds that of the one before, which has been settled.
    before = snapshot.live if snapshot.identity == counts.identity else {}
    for key, value in counts.read().items():
        whole.counters[key] += value - before.get(key, 0.0)
    with contextlib.suppress(OSError):
        fresh = file.with_suffix(".dead")
        fresh.write_bytes(whole.dump())
        fresh.replace(file)


def leave_word(directory: Path, *, counters: dict[Key, float], gauges: dict[Key, float]) -> None:
    """Leave what only the parent process knows where scrapes add it up."""
    store = Store()
    store.counters.update(counters)
    store.gauges.update(gauges)
    with contextlib.suppress(OSError):  # a full disk: the next word says it again
        fresh = directory / "worker-parent.new"
        fresh.write_bytes(store.dump())
        fresh.replace(directory / "worker-parent.json")
