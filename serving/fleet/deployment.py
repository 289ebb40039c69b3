"""Puts the parts that keep a server at what its folder says together: repository, watch, gate, coordinator, status."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from serving.fleet.analysis import Totals
from serving.fleet.analysis_runner import AnalysisRunner
from serving.fleet.coordinator import Coordinator
from serving.fleet.deployment_log import DeploymentLog
from serving.fleet.judge import GateJudge
from serving.fleet.ledger import Ledger
from serving.fleet.repository import Repository
from serving.fleet.state import state_folder, subfolder
from serving.fleet.watch import watch

Totalled: TypeAlias = Callable[[Iterable[tuple[str, str]]], Mapping[tuple[str, str], Totals]]

log = logging.getLogger("serving.deployment")


class Deployment:
    """Runs beside the workers of one server, from `start` to `stop`.

    root: the models folder. totals: sums what versions, given as (name, version), did in all workers; called on a
    thread of this object's own. state_dir: see `state_folder`. loads_at_once: see `Coordinator`.
    """

    def __init__(self, root: Path, totals: Totalled, *, state_dir: Path | None = None, loads_at_once: int = 1) -> None:
        self._root = root
        self._status = _Status(root, state_dir)
        self._ended = threading.Event()
        self._concluded = threading.Event()
        ledger = Ledger(root, state_dir)
        self._analyses = AnalysisRunner(ledger, totals)
        self._moved = threading.Event()
        self._trouble = ""
        self._deciding = threading.Thread(target=self._decide, name="analyses", daemon=True)
        repository = Repository(root, ledger.adopt)
        self._log = DeploymentLog(repository, ledger)
        self._judge = GateJudge(repository, state_dir=state_dir)
        self.coordinator = Coordinator(repository, self._judge, report=self._write, loads_at_once=loads_at_once)

    def start(self) -> None:
        """Look at the folder, and watch it from now on."""
        self.coordinator.start()
        watch(self._root, self.coordinator.look, self._ended)
        self._deciding.start()

    def _decide(self) -> None:
        """See how the versions do that are tried: once a second, and at each change, before one that kills does."""
        while not self._concluded.is_set():
            try:
                if self._analyses.tick(self.coordinator.plans, time.monotonic()):
                    self.coordinator.look()
                self._trouble = ""
            except Exception as error:  # what is served stays as it is, and the next second may go better
                if self._trouble != repr(error):
                    self._trouble = repr(error)
                    log.exception("what is tried could not be judged")
            self._moved.wait(1.0)
            self._moved.clear()
        self._analyses.close()

    def conclude(self) -> None:
        """Judge nothing any more: this server ends as it should, whatever becomes of what it still has to answer."""
        self._concluded.set()
        self._moved.set()
        self._deciding.join(5)

    def died(self, versions: Iterable[tuple[str, str]]) -> None:
        """Take note that a worker died while it ran these, given as (name, version)."""
        self._analyses.died(versions)
        self._moved.set()

    def _write(self, summary: dict[str, Any]) -> None:
        self._moved.set()
        if self.coordinator.contents is not None:
            self._log.looked(self.coordinator.contents)
        self._log.served(self.coordinator.plans)
        for name, said in self._analyses.said.items():
            if name in summary["models"]:
                summary["models"][name]["trial"] = said
        self._status.write(summary)

    def attach(self, connection: Connection) -> None:
        """Take a worker, by our end of its pipe."""
        self.coordinator.attach(connection)

    def stop(self) -> None:
        """Leave the workers as they are."""
        self._ended.set()
        self.conclude()
        self.coordinator.stop()
        self._judge.close()
        self._status.remove()


class _Status:
    """The file in which a running server says what it serves, for those who wait outside: the command line."""

    def __init__(self, root: Path, state_dir: Path | None) -> None:
        self._root = root
        self._state_dir = state_dir
        self._id = f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._failed = False

    def _file(self) -> Path:
        return subfolder(state_folder(self._root, self._state_dir), "servers") / f"{self._id}.json"

    def write(self, summary: dict[str, Any]) -> None:
        try:
            file = self._file()
            fresh = file.with_suffix(".new")
            fresh.write_bytes(
                orjson.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), **summary})
            )
            fresh.replace(file)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("what this server serves is not written down: %s", error.strerror)
            self._failed = True

    def remove(self) -> None:
        try:
            self._file().unlink(missing_ok=True)
        except OSError:
            return
