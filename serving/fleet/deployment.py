"""Puts the parts that keep a server at what its folder says together: repository, watch, gate, coordinator, status."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson

from serving.fleet.coordinator import Coordinator
from serving.fleet.ledger import Ledger
from serving.fleet.repository import Found, Repository
from serving.fleet.state import state_folder
from serving.fleet.trial import Clerk, CountTotals
from serving.fleet.watch import watch

log = logging.getLogger("serving.deployment")


class _Anything:
    def known(self, found: Found, serving: Found | None) -> str | None:
        return ""

    def examine(self, found: Found, serving: Found | None) -> str:
        return ""


class Deployment:
    """Runs beside the workers of one server, from `start` to `stop`.

    root: the models folder. totals: sums what versions did over all workers; None where nothing is counted, and then
    nothing is judged.
    """

    def __init__(self, root: Path, totals: CountTotals | None = None) -> None:
        self._root = root
        self._status = _Status(root)
        self._ended = threading.Event()
        ledger = Ledger(root)
        self._clerk = Clerk(ledger, totals, ledger.versions) if totals is not None else None
        self.coordinator = Coordinator(Repository(root, Ledger(root).adopt), _Anything(), report=self._write)

    def start(self) -> None:
        """Look at the folder, and watch it from now on."""
        self.coordinator.start()
        watch(self._root, self.coordinator.look, self._ended)
        if self._clerk is not None:
            self._clerk.start(self.coordinator.documents, self.coordinator.look, self._ended)

    def _write(self, summary: dict[str, Any]) -> None:
        for name, said in self._clerk.said.items() if self._clerk is not None else ():
            if name in summary["models"]:
                summary["models"][name]["trial"] = said
        self._status.write(summary)

    def attach(self, connection: Connection) -> None:
        """Take a worker, by our end of its pipe."""
        self.coordinator.attach(connection)

    def stop(self) -> None:
        """Leave the workers as they are."""
        self._ended.set()
        self.coordinator.stop()
        self._status.remove()


class _Status:
    """The file in which a running server says what it serves, for those who wait outside: the command line."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._id = f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._failed = False

    def _file(self) -> Path:
        folder = state_folder(self._root) / "servers"
        folder.mkdir(exist_ok=True)
        return folder / f"{self._id}.json"

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
