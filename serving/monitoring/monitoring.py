"""All that one worker sees of whether its models are still right, and the tick that gathers it."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from serving.metrics.definitions import Key, Version
from serving.monitoring.drift import DriftMonitor
from serving.monitoring.feedback import FeedbackMonitor
from serving.monitoring.shared import SharedDocuments

log = logging.getLogger("serving.monitoring")

SWEEP_S = 3600.0
"""Seconds between two looks at what is kept of versions that have gone."""


class Monitoring:
    """Drift and feedback of one worker. documents: between workers; state: see `DriftMonitor`; models: the folder."""

    def __init__(self, documents: SharedDocuments, state: Callable[[], Path], models: Path) -> None:
        self._documents = documents
        self._models = models
        self._sweep_at = time.monotonic() + SWEEP_S
        self._there: set[Version] = set()
        self.drift = DriftMonitor(documents, state)
        self.feedback = FeedbackMonitor(state)

    @property
    def gauges(self) -> dict[Key, float]:
        """What was found of the last windows, where this worker leads; by metric."""
        return self.drift.gauges | self.feedback.gauges

    def tick(self) -> dict[Key, float]:
        """Gather what came since the last time, and return what is to be counted; on a thread, once a second."""
        leads = self._documents.leads()
        counted = self.drift.tick(leads=leads)
        try:
            counted |= self.feedback.tick(leads=leads)
        except (OSError, sqlite3.Error) as error:  # predictions go on
            log.error("predictions and outcomes can't be kept: %s", error)
        if leads and time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_S
            self.sweep()
        return counted

    def sweep(self) -> None:
        """Remove what is kept of versions, and of models, whose folders are gone now and were at the last look too.

        Once is not enough: a folder may be replaced just now, or all of them be unmounted.
        """
        try:
            there = {(path.parent.name, path.name) for path in self._models.glob("*/*")}
            there |= {(name, "") for name, _ in there}
            if there and self._there:
                self.drift.keep_only(there | self._there)
                self.feedback.keep_only(there | self._there)
            self._there = there
        except (OSError, sqlite3.Error) as error:
            log.error("what is kept of versions that have gone can't be removed: %s", error)

    def close(self) -> None:
        """Write down what is left, and leave it to another worker to lead."""
        self.feedback.close()
        self._documents.close()
