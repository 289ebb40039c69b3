"""All that one worker sees of whether its models are still right, and the tick that gathers it."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.metrics.definitions import Key, Version
from serving.monitoring.drift import DriftMonitor
from serving.monitoring.feedback import FeedbackMonitor, Told
from serving.monitoring.shared import SharedDocuments

log = logging.getLogger("serving.monitoring")

SWEEP_S = 3600.0
"""Seconds between two looks at what is kept of versions that have gone."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """What a second has brought, for the metrics.

    rows: taken to be compared, by version. windows: that were closed, and whether they had drifted. outcomes: joined
    with their predictions. unmatched: outcomes that were given up, by model. gauges: of last windows.
    """

    rows: Mapping[Version, int]
    windows: list[tuple[Version, bool]]
    outcomes: list[Told]
    unmatched: Mapping[str, int]
    gauges: Mapping[Key, float]


class Monitoring:
    """Drift and feedback of one worker. documents: between workers; state: see `DriftMonitor`; models: the folder."""

    def __init__(self, documents: SharedDocuments, state: Callable[[], Path], models: Path) -> None:
        self._documents = documents
        self._models = models
        self._sweep_at = time.monotonic() + SWEEP_S
        self._gone: set[Version] = set()
        self.drift = DriftMonitor(documents, state)
        self.feedback = FeedbackMonitor(state)

    def tick(self) -> Ticked:
        """Gather what came since the last time; on a thread, once a second."""
        leads = self._documents.leads()
        rows, windows = self.drift.tick(leads=leads)
        outcomes: list[Told] = []
        unmatched: dict[str, int] = {}
        try:
            outcomes, unmatched = self.feedback.tick(leads=leads)
        except (OSError, sqlite3.Error) as error:  # predictions go on
            log.error("predictions and outcomes can't be kept: %s", error)
        if leads and time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_S
            self.sweep()
        return Ticked(rows, windows, outcomes, unmatched, self.drift.gauges | self.feedback.gauges)

    def sweep(self) -> None:
        """Remove what is kept of versions, and of models, whose folders are gone now and were at the last look too.

        Once is not enough: a folder may be replaced just now, or all of them be unmounted.
        """
        try:
            kept = self.drift.kept() | self.feedback.kept()
            there = {(path.parent.name, path.name) for path in self._models.glob("*/*")}
            gone = kept - there - {(name, "") for name, _ in there} if there else set()
            for name, version in gone & self._gone:
                self.drift.forget(name, version)
                self.feedback.forget(name, version)
            self._gone = gone
        except (OSError, sqlite3.Error) as error:
            log.error("what is kept of versions that have gone can't be removed: %s", error)

    def close(self) -> None:
        """Write down what is left, and leave it to another worker to lead."""
        self.feedback.close()
        self._documents.close()
