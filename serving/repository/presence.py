"""The file in which a running server says what it serves, for those who wait outside: `serving.repository.servers`.

No clocks are compared between machines. A server holds a lock on its file for as long as it lives, so that whoever can
have the lock knows that it ended, however it did; and it counts on in it, so that whoever looks twice knows that it
moves. The file is replaced by rename, each new one locked before anybody can see it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from serving.repository.state_directory import state_folder, subfolder

log = logging.getLogger("serving.deployment")

FOLDER = "servers"
BEAT_S = 2.0


@cache
def boot() -> str:
    """Name this run of this machine's kernel, all of whose processes share locks and the monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def place(root: Path) -> list[int]:
    """Name a models folder among those of this machine, by whatever path it is reached; empty where it is away."""
    try:
        facts = root.stat()
    except OSError:
        return []
    return [facts.st_dev, facts.st_ino]


class Presence:
    """One server's file, from the first `write` to `remove`. root, state_dir: see `state_folder`. For any thread."""

    def __init__(self, root: Path, state_dir: Path | None) -> None:
        self._root = root
        self._state_dir = state_dir
        self.id = f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._summary: dict[str, Any] | None = None
        self._written = 0.0
        self._beat = 0
        self._held: int | None = None
        self._failed = False

    def write(self, summary: dict[str, Any]) -> None:
        """Say what is served, and that this server lives."""
        with self._lock:
            self._summary = summary
            self._write(summary)

    def beat(self) -> None:
        """Say that this server lives, whatever keeps it from looking at its folder: a large version takes a while."""
        with self._lock:
            if self._summary is not None and time.monotonic() - self._written >= BEAT_S:
                self._write(self._summary)

    def _write(self, summary: dict[str, Any]) -> None:
        self._written = time.monotonic()
        self._beat += 1
        said: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot(), "beat": self._beat}
        try:
            file = self._file()
            fresh = file.with_suffix(".new")
            held = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                said["locked"] = _locked(held)
                os.write(held, orjson.dumps({**said, "at": time.monotonic(), "root": place(self._root), **summary}))
                fresh.replace(file)
            except BaseException:
                os.close(held)
                raise
            self._release()
            self._held = held
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("what this server serves is not written down, and nobody waits for it: %s", error.strerror)
            self._failed = True

    def remove(self) -> None:
        """Say that this server ends."""
        with self._lock:
            self._summary = None
            with contextlib.suppress(OSError):
                self._file().unlink(missing_ok=True)
            self._release()

    def _file(self) -> Path:
        return subfolder(state_folder(self._root, self._state_dir), FOLDER) / f"{self.id}.json"

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _locked(file: int) -> bool:
    """Lock an open file, where its file system can."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def ended(file: Path) -> bool:
    """Tell whether nobody holds the lock on a file any more; False where that can't be known."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(opened), file.stat())  # else it has just been replaced by a new one
    except OSError:
        return False
    finally:
        os.close(opened)
