"""The gate as the coordinator asks it: kept verdicts, and examinations one after another in one process."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from serving.errors import ModelInvalid
from serving.gate import gate, prepared
from serving.gate.findings import PREPARED
from serving.gate.gate import Gate, Limits
from serving.gate.report import Report
from serving.repository.repository import ModelVersion, Repository
from serving.repository.state_directory import state_folder

IDLE_S = 10.0
"""Seconds after which the gate's process ends when nothing is examined: at a start many versions come at once."""


class GateClient:
    """Examines versions, unless the report on one is kept."""

    def __init__(self, repository: Repository, *, state_dir: Path | None = None, limits: Limits | None = None) -> None:
        self._repository = repository
        self._state_dir = state_dir
        self._limits = limits
        self._lock = threading.Lock()
        self._gate: Gate | None = None
        self._idle: threading.Timer | None = None
        self._verified: set[str] = set()
        """Contents whose prepared form was hashed since the start, or that have none."""

    def known(self, found: ModelVersion, serving: ModelVersion | None) -> Report | None:
        """Return the report that was kept for this content and onnxruntime; None where it must be examined.

        That is so too until the prepared form of a large version was hashed, which takes a second for some hundred MB.
        """
        state = self._state()
        report = None if state is None else gate.verdict(state, found.content)
        if report is None or (_may_be_prepared(report) and found.content not in self._verified):
            return None
        return report

    def examine(self, found: ModelVersion, serving: ModelVersion | None) -> Report:
        """Examine a version beside the one that serves, and keep the verdict and the prepared form.

        Where the verdict is known, and the prepared form is as it was written, that is all.
        """
        state = self._state()
        kept = None if state is None else gate.verdict(state, found.content)
        self._verified.add(found.content)  # or made anew below
        if state is not None and kept is not None and not self._damaged(state, found, kept):
            return kept
        try:
            declared = self._repository.manifest(found)
        except ModelInvalid as error:
            return gate.unreadable(error.message)
        with self._lock, contextlib.ExitStack() as stack:
            prepare_in = stack.enter_context(prepared.written(state, declared)) if state else None
            report = self._open().examine(
                found.path.parent, serving=serving.path.parent if serving else None, prepare_in=prepare_in
            )
        if state is not None:
            with contextlib.suppress(OSError):  # a verdict that is not kept is made once more
                gate.keep(state, report)
        return report

    @staticmethod
    def _damaged(state: Path, found: ModelVersion, report: Report) -> bool:
        """Tell whether a version should have a prepared form and has none that is as it was written."""
        if not _may_be_prepared(report) or prepared.verify(state, found.content):
            return False
        return any(check.name == PREPARED and check.outcome == "passed" for check in report.checks)

    def close(self) -> None:
        """End the gate's process."""
        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            if self._gate is not None:
                self._gate.close()

    def _rest(self) -> None:
        """End the process until it is needed, and remove prepared forms of what has gone, and verdicts on it."""
        self.close()
        contents = self._repository.contents()
        if contents and (state := self._state()) is not None:  # the folder may just be unmounted
            prepared.sweep(state, contents)
            gate.sweep(state, contents)

    def _open(self) -> Gate:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = threading.Timer(IDLE_S, self._rest)
        self._idle.daemon = True
        self._idle.start()
        self._gate = self._gate or Gate(self._limits)
        return self._gate

    def _state(self) -> Path | None:
        try:
            return state_folder(self._repository.root, self._state_dir)
        except OSError:
            return None


def _may_be_prepared(report: Report) -> bool:
    return report.ok and report.size_bytes >= prepared.FROM_BYTES
