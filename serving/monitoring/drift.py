"""Compares the rows that versions get with their references: each worker counts, and one of them closes the windows.

A worker's counts only grow, and lie in the folder that the workers share; a slot's next worker goes on from them. A
window is what all of them together have counted since the one before. All of it goes when the server ends; a reference
that was learned stays.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from pydantic import TypeAdapter

from serving.engine.limits import Drift as Settings
from serving.engine.reference import Column, columns_of, reference_of
from serving.engine.signature import Reference, Signature
from serving.linux.files import write_whole
from serving.metrics.definitions import Key, Version
from serving.monitoring.report import Drift, Window, window
from serving.monitoring.shared import SharedDocuments
from serving.monitoring.tally import Tally
from serving.monitoring.tracker import Tracker
from serving.tensors import Array

log = logging.getLogger("serving.drift")

MOST_SERIES = 600
"""Columns of all versions together that get series of their own, the first ones of each version first."""
MOST_LEARNED_CELLS = 4_000_000
_WINDOWS = "windows"
_REFERENCES = TypeAdapter(tuple[Reference, ...])


class _Followed(Tracker):
    """One live version in this worker: its rows, and what they are counted against."""

    def __init__(  # noqa: PLR0917
        self, name: str, version: str, sha256: str, signature: Signature, settings: Settings, columns: list[Column]
    ) -> None:
        super().__init__(columns)
        self.of = (name, version)
        self.sha256 = sha256
        self.signature = signature
        self.settings = settings
        self.tallies: list[Tally] = []
        self.key = ""
        """Of its counts: by what they are counted against, too."""
        self.learned: list[list[Array]] = []
        self.learned_rows = 0

    def compare_with(self, references: tuple[Reference, ...]) -> None:
        """Count rows against references from now on."""
        by_name = {reference.name: reference for reference in references}
        self.tallies = [Tally(column, by_name[column.name]) for column in self.columns if column.name in by_name]
        content = orjson.dumps([tally.reference.model_dump() for tally in self.tallies])
        self.key = f"{'/'.join(self.of)}/{hashlib.sha256(content).hexdigest()[:16]}"


class DriftMonitor:
    """Follows the versions that one worker serves.

    shared: between the workers. state: makes the folder in which learned references are kept; raises OSError.
    `tick` takes as long as its rows, and `report` reads files: both may be called on any thread.
    """

    def __init__(self, shared: SharedDocuments, state: Callable[[], Path]) -> None:
        self._shared = shared
        self._state = state
        self._lock = threading.Lock()
        self._followed: weakref.WeakValueDictionary[Version, _Followed] = weakref.WeakValueDictionary()
        inherited = shared.read(shared.mine)
        self._counts: dict[str, Array] = {key: np.array(counts, np.int64) for key, counts in inherited.items()}
        self.gauges: dict[Key, float] = {}
        """What is found of each version's last window, where this worker leads; replaced and never changed."""

    def follow(  # noqa: PLR0917
        self,
        name: str,
        version: str,
        sha256: str,
        signature: Signature,
        settings: Settings,
        sensitive: frozenset[str] = frozenset(),
    ) -> Tracker | None:
        """Return what is to be offered a version's rows, for as long as it lives; None: nothing is to be compared.

        sensitive: features of which no reference is learned, beside those that the signature marks.
        """
        columns = columns_of(signature)
        if settings.learn_rows:
            # A reference has values of single callers, and is kept and shown.
            hidden = sensitive | {feature.name for feature in signature.features if feature.sensitive}
            misspelt = hidden - {feature.name for feature in signature.features}  # which is in the log
            columns = [] if misspelt else [column for column in columns if column.name not in hidden]
        else:
            known = {reference.name for reference in signature.reference}
            columns = [column for column in columns if column.name in known]
        if not columns or not settings.enabled:
            return None
        followed = _Followed(name, version, sha256, signature, settings, columns)
        if not settings.learn_rows:
            followed.compare_with(signature.reference)
        with self._lock:
            self._followed[followed.of] = followed
        return followed

    def tick(self, *, leads: bool) -> dict[Key, float]:
        """Count what was taken since the last time; who leads also closes the windows that are full.

        Returns by how much the counters of rows and windows have grown.
        """
        counted: dict[Key, float] = {}
        with self._lock:
            live = list(self._followed.copy().values())
            for one in live:
                if one.settings.learn_rows and not one.tallies:
                    try:
                        self._learn(one)
                    except OSError as error:
                        log.error("%s %s: its reference can't be kept: %s", *one.of, error.strerror)
                    continue
                rows, columns = one.drain()
                if not rows:
                    continue
                counted["serving_drift_rows", one.of] = rows
                seen = np.concatenate([tally.of(c) for tally, c in zip(one.tallies, columns, strict=True)])
                self._counts[one.key] = seen + self._counts.get(one.key, 0)
            keys = {one.key for one in live}
            self._counts = {key: counts for key, counts in self._counts.items() if key in keys}
            if counted:
                self._shared.write(self._shared.mine, self._counts)
            if leads:
                counted |= self._close_windows([one for one in live if one.tallies])
            else:
                self.gauges = {}
        return counted

    def _learn(self, one: _Followed) -> None:
        """Gather rows for a reference, until there are enough of them here, or another worker has had them."""
        path = self._learned(one)
        try:
            references = _REFERENCES.validate_json(path.read_bytes())
        except (OSError, ValueError):
            rows, columns = one.drain()
            if rows:
                one.learned.append(columns)
                one.learned_rows += rows
            most = max(100, MOST_LEARNED_CELLS // len(one.columns))
            if one.learned_rows < min(one.settings.learn_rows or 0, most):
                return
            values = [np.concatenate(parts) for parts in zip(*one.learned, strict=True)]
            made = [reference_of(column, value) for column, value in zip(one.columns, values, strict=True)]
            references = tuple(reference for reference in made if reference is not None)
            one.learned.clear()
            one.learned_rows = 0
            write_whole(path, _REFERENCES.dump_json(references))
            log.info("%s %s: the reference is learned", *one.of)
            return  # the next tick reads what stands there: two workers may have written one
        one.learned.clear()
        one.compare_with(references)
        one.follow([tally.column for tally in one.tallies])

    def _learned(self, one: _Followed) -> Path:
        folder = self._state() / "drift"
        folder.mkdir(exist_ok=True)
        return folder / f"{'@'.join(one.of)}@{one.sha256}-{one.settings.learn_rows}.json"

    def keep_only(self, known: set[Version]) -> None:
        """Remove the references that were learned for other versions. Raises OSError."""
        for path in (self._state() / "drift").glob("*@*@*.json"):
            name, version, _ = path.name.split("@")
            if (name, version) not in known:
                path.unlink(missing_ok=True)

    def _close_windows(self, live: list[_Followed]) -> dict[Key, float]:
        """Close what is full, by what all workers have counted, and count it."""
        documents = self._shared.everybodys()
        known, windows = self._shared.read(_WINDOWS), {}
        closed: dict[Key, float] = {}
        now, changed = time.time(), False
        for one in live:
            total = _total(documents, one)
            its = known.get(one.key)
            if its is None or (total < np.array(its["start"])).any():  # what was counted has gone with who counted it
                its = {
                    "start": np.zeros_like(total) if its is None else total,
                    "opened": now,
                    "closed": 0,
                    "drifted": 0,
                }
                changed = True
            rows = _rows(one, total - np.array(its["start"]))
            if rows >= one.settings.window_rows:
                last = {"counts": total - np.array(its["start"]), "opened": its["opened"], "ended": now}
                shifted = _window(one, last).drifted
                closed["serving_drift_windows", (*one.of, "drifted" if shifted else "quiet")] = 1
                its = {
                    "start": total,
                    "opened": now,
                    "closed": its["closed"] + 1,
                    "drifted": its["drifted"] + shifted,
                    "last": last,
                }
                changed = True
            windows[one.key] = its
        changed = changed or windows.keys() != known.keys()
        if changed:
            self._shared.write(_WINDOWS, windows)
        if changed or not self.gauges:
            self.gauges = _gauges(
                [(one, _window(one, its["last"])) for one in live if "last" in (its := windows[one.key])]
            )

        return closed

    def report(self, name: str, version: str, settings: Settings) -> Drift:
        """Say how a version's rows fare, over all workers."""
        told: dict[str, Any] = {"model": name, "version": version, "window_rows": settings.window_rows}
        with self._lock:
            one = self._followed.get((name, version))
            if one is None or not settings.enabled:
                return Drift(**told, status="no reference" if settings.enabled else "off")
            if not one.tallies:
                return Drift(**told, status="learning", learned_rows=one.learned_rows)
            its = self._shared.read(_WINDOWS).get(one.key)
            if its is None:
                return Drift(**told, status="comparing")
            last = its.get("last")
            if last is None:
                counts = _total(self._shared.everybodys(), one) - np.array(its["start"])
                last = {"counts": np.maximum(counts, 0), "opened": its["opened"], "ended": None}
            return Drift(
                **told,
                status="comparing",
                windows=its["closed"],
                drifted_windows=its["drifted"],
                window=_shown(one, _window(one, last)),
            )


def _total(documents: list[Any], one: _Followed) -> Array:
    """Add up what workers have counted of a version."""
    size = sum(tally.size for tally in one.tallies)
    total = np.zeros(size, np.int64)
    for document in documents:
        counts = document.get(one.key, ())
        if len(counts) == size:
            total += np.array(counts, np.int64)
    return total


def _rows(one: _Followed, counts: Array) -> int:
    return int(counts[: one.tallies[0].size].sum())


def _shown(one: _Followed, its: Window) -> Window:
    """Leave sensitive features out while a window fills: who asks twice would see where one caller's value lies."""
    if its.ended is not None:
        return its
    hidden = {feature.name for feature in one.signature.features if feature.sensitive}
    return its.model_copy(update={"columns": [column for column in its.columns if column.name not in hidden]})


def _window(one: _Followed, last: dict[str, Any]) -> Window:
    return window(one.tallies, np.array(last["counts"], np.int64), last["opened"], last["ended"], one.signature)


def _gauges(seen: list[tuple[_Followed, Window]]) -> dict[Key, float]:
    """Say as metrics what was found of the last windows."""
    gauges: dict[Key, float] = {}
    most = MOST_SERIES // max(1, len(seen))
    for one, its in seen:
        labels = one.of
        gauges["serving_drift_alarm", labels] = float(its.drifted)
        gauges["serving_drift_window_timestamp_seconds", labels] = its.ended or 0.0
        # What has drifted is there in any case, as far as there is room.
        for column in sorted(its.columns, key=lambda column: not column.drifted)[:most]:
            of = *labels, column.name
            gauges["serving_drift_psi", of] = column.psi
            gauges["serving_drift_jensen_shannon_distance", of] = column.jensen_shannon
            for kind in ("missing", "unseen", "out_of_range"):
                if share := getattr(column, kind):
                    gauges["serving_drift_ratio", (*of, kind)] = share
    return gauges
