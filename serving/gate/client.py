"""The gate as the coordinator asks it: kept verdicts, and examinations one after another in one process."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from serving.errors import ModelInvalid
from serving.gate import gate, prepared
from serving.gate.findings import Limits
from serving.gate.gate import Gate
from serving.gate.report import Report
from serving.repository.repository import ModelVersion, Repository
from serving.repository.state_directory import state_folder

_YOUNG_S = 3600


class GateClient:
    """Examines versions, unless the report on one is kept. Used by one thread, but for `close`."""

    def __init__(self, repository: Repository, *, state_dir: Path | None = None, limits: Limits | None = None) -> None:
        self._repository = repository
        self._state_dir = state_dir
        self._gate = Gate(limits)

    def known(self, found: ModelVersion) -> Report | None:
        """Return the report that was kept for this content and onnxruntime; None where it must be examined.

        That is so too where it has lost its prepared form.
        """
        state = self._state()
        report = None if state is None else gate.verdict(state, found.content)
        if state is None or report is None or (report.prepared and not prepared.place(state, found.content).exists()):
            return None
        return report

    def examine(self, found: ModelVersion, serving: ModelVersion | None) -> Report:
        """Examine a version beside the one that serves, and keep the verdict and the prepared form.

        Raises NotReady where nobody can say: that is no verdict.
        """
        if (kept := self.known(found)) is not None:  # others had the same content, and their turn before
            return kept
        state = self._state()
        try:
            declared = self._repository.manifest(found)
        except ModelInvalid as error:
            return gate.unreadable(error.message)
        with prepared.written(state, declared) if state else contextlib.nullcontext() as prepare_in:
            beside = serving.path.parent if serving else None
            report = self._gate.examine(found.path.parent, serving=beside, prepare_in=prepare_in)
        if state is not None:
            with contextlib.suppress(OSError):  # a verdict that is not kept is made once more
                gate.keep(state, report)
        return report

    def close(self) -> None:
        """End the gate's process, whatever it examines, for good. For any thread."""
        self._gate.close(for_good=True)

    def rest(self) -> None:
        """End the process until it is needed, and remove prepared forms of what has gone, and verdicts on it."""
        self._gate.close()
        contents = self._repository.contents()
        if contents and (state := self._state()) is not None:  # the folder may just be unmounted
            sweep(state / "reports", {gate.place(state, content).name for content in contents})
            sweep(state / "cache", {prepared.place(state, content).name for content in contents})

    def _state(self) -> Path | None:
        try:
            return state_folder(self._repository.root, self._state_dir)
        except OSError:
            return None


def sweep(folder: Path, names: Collection[str]) -> None:
    """Remove what has another name, and is older than an hour: the version of a younger one may be on its way."""
    with contextlib.suppress(OSError):
        for kept in folder.iterdir():
            if kept.name not in names and time.time() - kept.lstat().st_mtime > _YOUNG_S:
                shutil.rmtree(kept, ignore_errors=True) if kept.is_dir() else kept.unlink(missing_ok=True)
