"""Live quality: predictions are kept until their true outcomes come, by whatever worker, and both are compared."""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from serving.documented import Documented
from serving.engine.limits import Feedback as Settings
from serving.engine.signature import Signature
from serving.errors import Detail, InvalidRequest, NotReady, SignatureMismatch
from serving.metrics.definitions import Key, Version
from serving.monitoring import quality
from serving.monitoring.feedback_store import FeedbackStore, Judged, Kept
from serving.tensors import INTEGERS, Tensors

log = logging.getLogger("serving.feedback")

MOST_WAITING = 20_000
"""Rows that a worker holds until they are written down, once a second; further ones are not kept."""
LONGEST_KEY = 256
LONGEST_LABEL = 1024
MOST_OUTCOMES = 10_000
_GREATEST = 1e300
"""Of numbers: errors are still added up; JSON's whole numbers may be greater than any float."""

Outcome = str | bool | int | float


class VersionQuality(Documented):
    """The live quality of one version, by its last outcomes; null where it has none, or the task has no such figure."""

    version: str
    outcomes: int
    """From which the figures are."""
    accuracy: float | None = None
    auc: float | None = None
    """Area under the ROC curve; of more than two classes the mean of each against the others."""
    brier: float | None = None
    """0 is best. Of two classes that of the second, 1 at most; of more summed over classes, 2 at most."""
    mae: float | None = None
    """Mean absolute error of a regressor."""


class Quality(Documented):
    """The live quality of a model's versions."""

    model: str
    versions: list[VersionQuality]
    kept: int
    """Rows predicted that wait for their outcomes."""
    unmatched: int
    """Outcomes that wait for their predictions: those of another server, or that were not kept, never come."""


class Recorder:
    """Keeps what one version answers; `keep` belongs to the event loop."""

    def __init__(self, name: str, version: str, content: str, signature: Signature, settings: Settings) -> None:
        self.of = (name, version)
        self.content = content
        self.settings = settings
        names = [spec.name for spec in signature.outputs]
        self._label = names.index(signature.label) if signature.label else None
        self._scores = names.index(signature.scores) if signature.scores else None
        self.classes: tuple[str, ...] = tuple(_text(name) for name in signature.classes or ())
        self.probabilities = signature.scores_key == "probabilities"
        self._indexed = bool(
            self._label is not None
            and signature.outputs[self._label].datatype in INTEGERS
            and isinstance((signature.classes or (0,))[0], str)
        )
        self._waiting: list[tuple[str, Tensors]] = []
        self._rows = 0
        self._dropped = self._counted = 0

    @property
    def labels(self) -> bool:
        """Whether outcomes are labels, and not numbers."""
        return self._label is not None

    @property
    def judges(self) -> bool:
        """Whether it is said of each outcome how right the prediction was."""
        return self.labels or self.settings.largest_error is not None

    def keep(self, key: str, outputs: Tensors, rows: int) -> None:
        """Remember an answer by what its caller calls the request."""
        if len(key) > LONGEST_KEY or self._rows + rows > MOST_WAITING:
            self._dropped += rows
            return
        self._rows += rows
        self._waiting.append((key, outputs))

    def drain(self) -> list[Kept]:
        """Return the rows that are to be written down; on any thread."""
        number = len(self._waiting)
        taken = self._waiting[:number]
        del self._waiting[:number]
        self._rows = 0
        return [kept for key, outputs in taken for kept in self._kept(key, outputs)]

    def dropped(self) -> int:
        """Return how many rows were not kept, since this was asked the last time."""
        # Not set back, which the event loop could do something between: it alone adds to the one, this to the other.
        number = self._dropped - self._counted
        self._counted += number
        return number

    def _kept(self, key: str, outputs: Tensors) -> list[Kept]:
        answers: Iterable[tuple[str | None, bytes | None, float | None]]
        if self._label is None:
            answers = ((None, None, value) for value in outputs[0].ravel().astype(float).tolist())
        else:
            labels = (self._named(label) for label in outputs[self._label].ravel().tolist())
            scores = outputs[self._scores].astype(np.float32) if self._scores is not None else None
            answers = ((label, None if scores is None else scores[i].tobytes(), None) for i, label in enumerate(labels))
        model, version = self.of
        return [Kept(model, key, row, version, self.content, *answer) for row, answer in enumerate(answers)]

    def _named(self, label: Any) -> str:
        return self.classes[label] if self._indexed and 0 <= label < len(self.classes) else _text(label)

    def outcome(self, value: Outcome, at: str) -> str:
        """Read an outcome as it is compared. Raises SignatureMismatch."""
        if self.labels:
            text = _text(value)
            if self.classes and text not in self.classes:
                message = f"should be one of {', '.join(self.classes[:50])}"
                raise SignatureMismatch("an outcome is none of the model's classes", [Detail(at, message)])
            return text
        if isinstance(value, bool | str) or not abs(value) <= _GREATEST:
            raise SignatureMismatch("an outcome is no number", [Detail(at, "should be a number")])
        return repr(float(value))

    def quality(self, judged: Sequence[Judged]) -> VersionQuality:
        """Say how good the joined rows were."""
        found = VersionQuality(version=self.of[1], outcomes=len(judged))
        if not judged:
            return found
        if not self.labels:
            mean = math.fsum(quality.error(value, outcome) for _, _, value, outcome in judged) / len(judged)
            return found.model_copy(update={"mae": mean if math.isfinite(mean) else None})
        right = np.array([label == outcome for label, _, _, outcome in judged])
        figures: dict[str, float | None] = {"accuracy": float(right.mean())}
        blobs = [scores for _, scores, _, _ in judged if scores is not None]
        scores = np.frombuffer(b"".join(blobs), np.float32)
        # Of two classes there may be one score, or of none.
        if len(self.classes) > 1 and len(scores) == len(judged) * len(self.classes):
            known = {name: place for place, name in enumerate(self.classes)}
            table = scores.reshape(len(judged), -1).astype(float)
            # What was true may be a class of another version, which this one does not have.
            places = np.array([known.get(outcome, -1) for *_, outcome in judged])
            figures["auc"] = quality.auc(places, table)
            if self.probabilities:
                figures["brier"] = quality.brier(places, table)
        return found.model_copy(update=figures)


class FeedbackMonitor:
    """Follows the versions of one worker whose models ask for it. `state`: makes the state folder; raises OSError.

    `tick`, `take` and `report` wait for the disk, and may be called on any thread.
    """

    def __init__(self, state: Callable[[], Path]) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._opened: FeedbackStore | None = None
        self._recorders: weakref.WeakValueDictionary[Version, Recorder] = weakref.WeakValueDictionary()
        self._counted: dict[Key, float] = defaultdict(float)
        """By how much counters have grown since the last tick."""
        self.gauges: dict[Key, float] = {}
        """Replaced and never changed."""

    def follow(
        self, name: str, version: str, sha256: str, signature: Signature, settings: Settings | None
    ) -> Recorder | None:
        """Return what is to keep a version's answers, for as long as it lives; None where nobody asks for that."""
        if settings is None:
            return None
        number = signature.outputs[0].datatype not in ("BYTES", "BOOL") and signature.outputs[0].shape[1:] in ((), (1,))
        if signature.batch == "none" or (signature.label is None and not (len(signature.outputs) == 1 and number)):
            log.warning("%s %s: [feedback] is for models that answer a row with a label or one number", name, version)
            return None
        recorder = Recorder(name, version, sha256[:16], signature, settings)
        self._recorders[name, version] = recorder
        return recorder

    def _store(self) -> FeedbackStore:
        if self._opened is None:
            self._opened = FeedbackStore(self._state() / "feedback.sqlite")
        return self._opened

    def keep_only(self, known: set[Version]) -> None:
        """Remove what is kept of other versions; of what waits, that of models that are not there with version "".

        Raises OSError and sqlite3.Error.
        """
        with self._lock:
            if self._opened is not None or (self._state() / "feedback.sqlite").exists():
                store = self._store()
                for model, version in store.kept() - known:
                    store.forget(model, version)

    def _live(self) -> list[Recorder]:
        """Return the recorders of live versions. In one step, since versions are loaded and go on other threads."""
        return [one for reference in self._recorders.valuerefs() if (one := reference()) is not None]

    def _of(self, model: str) -> list[Recorder]:
        """Return the recorders of a model's versions, in ascending order. Raises InvalidRequest where it has none."""
        found = [one for one in self._live() if one.of[0] == model]
        if not found:
            raise InvalidRequest(f"model {model!r} keeps no predictions: its model.toml has no [feedback]")
        return sorted(found, key=lambda one: (len(one.of[1]), one.of[1]))  # numbers, as texts

    @contextlib.contextmanager
    def _asked(self, refusal: str) -> Iterator[FeedbackStore]:
        """Have the file for a caller. Raises NotReady where it can't be had or used."""
        try:
            with self._lock:
                yield self._store()
        except (OSError, sqlite3.Error):
            log.exception("predictions and outcomes can't be had")
            raise NotReady(refusal) from None

    def tick(self, *, leads: bool) -> dict[Key, float]:
        """Write down what was answered, and join it with outcomes, where this worker does that for all.

        Returns by how much the counters of predictions and outcomes have grown.
        """
        live = self._live()
        if not live:
            return {}
        with self._lock:
            store = self._store()
            kept = [(one, one.drain()) for one in live]
            try:
                if any(rows for _, rows in kept):
                    store.keep(chain(*(rows for _, rows in kept)), {one.of[0]: one.settings.keep for one in live})
            except sqlite3.Error:
                for one, rows in kept:
                    self._counted["serving_feedback_dropped_rows", one.of] += len(rows)
                raise
            for one in live:
                self._counted["serving_feedback_dropped_rows", one.of] += one.dropped()
            if leads:
                joined = store.join({one.of[0]: one.settings for one in live})
                for model, version, number, right in joined:
                    self._counted["serving_feedback_outcomes", (model, version)] += number
                    self._counted["serving_feedback_right", (model, version)] += right
                if joined or not self.gauges:
                    self.gauges = _gauges([(one.of, one.quality(store.judged(*one.of, one.content))) for one in live])
            else:
                self.gauges = {}
            counted, self._counted = self._counted, defaultdict(float)
        return counted

    def take(self, model: str, outcomes: Sequence[tuple[str, Sequence[Outcome], str]]) -> int:
        """Take true outcomes: of each request its key, its rows' outcomes, and where it stands in what was sent.

        Returns how many there were. Raises InvalidRequest where the model keeps nothing, SignatureMismatch for an
        outcome that can't be, NotReady where they can't be kept.
        """
        known = self._of(model)
        rows = [
            (key, row, _outcome(known, value, f"{at}/{row}"))
            for key, values, at in outcomes
            for row, value in enumerate(values)
        ]
        with self._asked("outcomes can't be kept now: send them again later") as store:
            dropped = store.take(model, rows, known[0].settings.keep)
            self._counted["serving_feedback_unmatched", (model,)] += dropped
        return len(rows)

    def report(self, model: str) -> Quality:
        """Say how good a model's versions are. Raises InvalidRequest where it keeps nothing, NotReady."""
        known = self._of(model)
        with self._asked("outcomes can't be read now: ask again later") as store:
            kept, unmatched = store.waiting(model)
            versions = [one.quality(store.judged(*one.of, one.content)) for one in known]
        return Quality(model=model, versions=versions, kept=kept, unmatched=unmatched)

    def close(self) -> None:
        """Write down what was answered."""
        with self._lock:
            try:
                kept = [row for one in self._live() for row in one.drain()]
                if kept:
                    self._store().keep(kept, {})
            except (OSError, sqlite3.Error):
                log.exception("the last predictions can't be kept")
            if self._opened is not None:
                self._opened.close()
                self._opened = None


def _outcome(versions: list[Recorder], value: Outcome, at: str) -> str:
    """Read an outcome as any version has it. Raises SignatureMismatch, as the last one says it."""
    for one in versions[:-1]:
        with contextlib.suppress(SignatureMismatch):
            return one.outcome(value, at)
    return versions[-1].outcome(value, at)


def _text(value: Outcome) -> str:
    """Write a label so that equal ones are equal texts, whatever type JSON or the model has for them."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _gauges(seen: list[tuple[Version, VersionQuality]]) -> dict[Key, float]:
    gauges: dict[Key, float] = {}
    for of, found in seen:
        figures = {
            "window_outcomes": float(found.outcomes),
            "accuracy_ratio": found.accuracy,
            "auc": found.auc,
            "brier": found.brier,
            "mae": found.mae,
        }
        gauges |= {(f"serving_feedback_{name}", of): value for name, value in figures.items() if value is not None}
    return gauges
