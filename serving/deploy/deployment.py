"""Puts the parts together that keep a server at what its folder says: repository, watch, gate and coordinator."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from serving.deploy.analysis_runner import AnalysisRunner, Totalled
from serving.deploy.coordinator import Coordinator
from serving.deploy.deployment_log import DeploymentLog
from serving.deploy.mirror import Mirror
from serving.deploy.watch import watch
from serving.gate.client import GateClient
from serving.gate.findings import Limits
from serving.repository.repository import Repository
from serving.repository.servers import ServerFile, ServerMonitor
from serving.repository.traffic_store import TrafficStore

log = logging.getLogger("serving.deployment")

SWEEP_S = 10.0
"""Seconds after which the files of servers that were killed are removed again."""


class Deployment:
    """Runs beside the workers of one server, from `start` to `stop`.

    root: the models folder. totals: sums what versions, given as (name, version), did in all workers; called on a
    thread of this object's own; None where nothing is counted. state_dir: see `state_folder`. loads_at_once: see
    `Coordinator`. extension_ops: operators of onnxruntime-extensions are allowed.
    """

    def __init__(
        self,
        root: Path,
        totals: Totalled | None,
        *,
        state_dir: Path | None = None,
        loads_at_once: int = 1,
        extension_ops: bool = False,
    ) -> None:
        self._root = root
        self._file = ServerFile(root, state_dir)
        self._others = ServerMonitor(root, state_dir)
        self._ended = threading.Event()
        self._concluded = threading.Event()
        store = TrafficStore(root, state_dir)
        self._analyses = AnalysisRunner(store, totals)
        self._moved = threading.Event()
        self._last_error = ""
        self._summary: dict[str, Any] | None = None
        self._saying = threading.Lock()
        self._deciding = threading.Thread(target=self._decide, name="analyses", daemon=True)
        mirror = self._mirror = Mirror.of(root, state_dir)
        elsewhere = (lambda: mirror.problems) if mirror is not None else tuple
        repository = Repository(root, store.import_edit, elsewhere=elsewhere)
        self._log = DeploymentLog(repository, store)
        self._gate = GateClient(repository, state_dir=state_dir, limits=Limits(extension_ops=extension_ops))
        self.coordinator = Coordinator(repository, self._gate, report=self._report, loads_at_once=loads_at_once)

    def start(self) -> None:
        """Follow the folder from now on."""
        self.coordinator.start()
        watch(self._root, self.coordinator.rescan, self._ended)
        self._deciding.start()
        if self._mirror is not None:
            follow = partial(self._mirror.follow, self.coordinator.rescan)
            threading.Thread(target=follow, name="mirror", daemon=True).start()

    def _decide(self) -> None:
        """See how the versions do that are tried: once a second, and at each change, before one that kills does."""
        swept = float("-inf")
        while not self._concluded.is_set():
            self._file.beat()
            try:
                # Here, for it reads the disk, and workers wait for the coordinator's thread.
                if self.coordinator.contents is not None:
                    self._log.scanned(self.coordinator.contents)
                self._log.served(self.coordinator.plans)
                if time.monotonic() - swept > SWEEP_S:
                    swept = time.monotonic()
                    for server in self._others.sweep():
                        self._analyses.server_died(server.tried)
                tried = self._analyses.tried
                if self._analyses.tick(self.coordinator.plans, time.monotonic()):
                    self.coordinator.rescan()
                if self._analyses.tried != tried:
                    self._say()  # now: what is tried may end this server, and only its file tells of it then
                self._last_error = ""
            except Exception as error:  # what is served stays as it is, and the next second may go better
                if self._last_error != repr(error):
                    self._last_error = repr(error)
                    log.exception("what is tried could not be judged")
            self._moved.wait(1.0)
            self._moved.clear()
        self._analyses.close()
        self._say()

    def conclude(self) -> None:
        """Judge nothing any more: this server ends as it should, whatever becomes of what it still has to answer."""
        self._concluded.set()
        self._moved.set()

    def died(self, versions: Iterable[tuple[str, str]]) -> None:
        """Take note that a worker died while it ran these, given as (name, version)."""
        self._analyses.died(versions)
        self._moved.set()

    def _report(self, summary: dict[str, Any]) -> None:
        self._moved.set()
        self._summary = summary | {"scans": self.coordinator.scans}
        self._say()

    def _say(self) -> None:
        """Write down what is served, how what is tried goes, and what that is."""
        # The coordinator's thread and that of the trials both do. Unlocked, one could put back a summary that it
        # had read before the other wrote a newer, and who waits for this server to serve a change would wait in vain.
        with self._saying:
            if (summary := self._summary) is None:
                return
            lines = self._analyses.lines
            models = {name: {**one, "trial": lines.get(name, [])} for name, one in summary["models"].items()}
            self._file.write({**summary, "models": models, "tried": self._analyses.tried})

    def stop(self) -> None:
        """Leave the workers as they are."""
        self._ended.set()
        if self._mirror is not None:
            self._mirror.close()
        self.conclude()
        self._deciding.join(5)
        self.coordinator.stop()
        self._gate.close()
        self._file.remove()
