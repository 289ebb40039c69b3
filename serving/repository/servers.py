"""The running servers of a models folder: the file in which each says what it serves, and waiting for all of them.

No clocks are compared between machines. A server holds a lock on its file for as long as it lives, so that whoever can
have the lock knows that it ended, however it did; and it counts on in it, so that whoever reads it twice knows that it
lives. The file is replaced by rename, each new one locked before anybody can see it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict

from serving.linux.files import is_at, try_lock
from serving.repository.state_directory import state_folder, state_folders, subfolder, unique_id

log = logging.getLogger("serving.deployment")

BEAT_S = 2.0
"""Seconds between two words of a server."""
POLL_S = 0.05
SILENT_S = 10.0
"""Seconds without a word after which it is unknown what a server does; see BEAT_S."""
UNSEEN_S = 10.0
"""Seconds for which a server may look at its models folder, and more than once, without seeing a change; see BEAT_S."""
LEASE_S = 60.0
"""Seconds without a word after which a server on another machine, whose lock nobody holds, has ended."""


class ServerFile:
    """One server's file, from the first `write` to `remove`. root, state_dir: see `state_folder`. For any thread."""

    def __init__(self, root: Path, state_dir: Path | None) -> None:
        self._root = root
        self._state_dir = state_dir
        self._id = unique_id()
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
        """Say that this server lives, whatever keeps it from scanning its folder: a large version takes a while."""
        with self._lock:
            if self._summary is not None and time.monotonic() - self._written >= BEAT_S:
                self._write(self._summary)

    def _write(self, summary: dict[str, Any]) -> None:
        self._written = time.monotonic()
        self._beat += 1
        said: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "beat": self._beat}
        try:
            file = self._file()
            fresh = file.with_suffix(".new")
            held = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                said["locked"] = False
                with contextlib.suppress(OSError):  # its file system has no locks
                    said["locked"] = try_lock(held)
                said |= {"at": time.monotonic(), "root": _place(self._root), **summary}
                with open(held, "wb", closefd=False) as whole:  # or nothing: a full disk may take a part
                    whole.write(orjson.dumps(said))
                # Named once it is locked, or whoever looks takes it for that of a server that has ended.
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
        return subfolder(state_folder(self._root, self._state_dir), "servers") / f"{self._id}.json"

    def _release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


class Server(BaseModel):
    """One running server, as its file says. `models[name]` has the fields of `worker_agent.Standing`."""

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    boot: str
    """Which run of a machine's kernel it is under."""
    locked: bool
    """Whether it could lock its file."""
    beat: int
    """Grows with each word that it says."""
    at: float
    """When it said this, by the monotonic clock of its machine."""
    root: list[int]
    """What its machine names the models folder by."""
    models: dict[str, dict[str, Any]]
    problems: list[tuple[str, str, str]]
    """Why it does not serve what is in the folder: name, version, or none for what is asked for, and reason."""
    scans: int
    """How often it has looked at the folder."""
    tried: dict[str, dict[str, Any]]
    """By model, what it judges; see `AnalysisRunner.tried`."""
    silent_s: float = 0.0
    """Seconds since it has said something, or, of another machine, since it was first seen without saying more."""
    unseen: bool = False
    """Whether it has looked at its folder and not found the change that is waited for."""

    @property
    def gone(self) -> str:
        """Say why it can't follow the models folder now; empty where it can."""
        if self.unseen:
            return "its models folder does not show the change: another folder, or an old state of it"
        return next((reason for name, _, reason in self.problems if not name), "")

    @property
    def unheard(self) -> str:
        """Say why it is not known what it serves or will; empty where it can be waited for."""
        if self.silent_s >= SILENT_S:
            return f"has said nothing for {self.silent_s:.0f} s"
        return f"can't follow: {self.gone}" if self.gone else ""

    def refused(self, name: str, version: str | None) -> list[str]:
        """Return why it does not serve a version."""
        return [reason for *of, reason in self.problems if of == [name, version]]

    def sees(self, name: str, generation: int, version: str | None) -> bool:
        """Tell whether it has found a generation of a model, and a version, in the folder: see `waits_for`."""
        standing = self.models.get(name)
        if standing is None:
            return False
        known = version is None or version in standing.get("versions", ()) or bool(self.refused(name, version))
        return bool(standing.get("busy", True)) or (known and (standing.get("asked") or 0) >= generation)

    def waits_for(self, name: str, generation: int, version: str | None = None) -> str | None:
        """Return '' once it serves a generation of a model, why it can't, or None as long as it is not known.

        version: one that must have passed too, and be loaded where it is to be.
        """
        standing = self.models.get(name, {})
        if version is not None and version not in standing.get("versions", ()):
            return "; ".join(self.refused(name, version)) or None
        serving = standing.get("serving")
        if serving is not None and serving >= generation:
            return ""
        if standing.get("busy", True) or (standing.get("asked") or 0) < generation:
            return None
        return str(standing["error"]) if standing.get("error") else None


class ServerMonitor:
    """Reads again and again what the servers of a models folder say. root, state_dir: see `state_folder`."""

    def __init__(self, root: Path, state_dir: Path | None = None) -> None:
        self._root = root
        self._state_dir = state_dir
        self._moved: dict[Path, tuple[int, float]] = {}
        """The count in each file, and when it was first seen, in seconds of this machine's monotonic clock."""

    def servers(self) -> list[Server]:
        """Return the servers that have not ended."""
        return [server for _, server, ended in self._read() if not ended]

    def sweep(self) -> list[Server]:
        """Remove the files of servers that died, and return those: each to the first of all who ask."""
        dead = []
        for file, server, ended in self._read():
            if ended:
                with contextlib.suppress(OSError):
                    file.unlink()  # fails for whoever comes second
                    dead.append(server)
        return dead

    def _read(self) -> Iterator[tuple[Path, Server, bool]]:
        """Yield each server of the folder, with its file, and whether it has died. One that ends removes its file."""
        now, root = time.monotonic(), _place(self._root)
        files = (file for state in state_folders(self._root, self._state_dir) for file in state.glob("servers/*.json"))
        for file in sorted(files):
            try:
                server = Server.model_validate_json(file.read_bytes())
            except (OSError, ValueError):
                continue  # it has just gone, or is not one
            here = server.boot == _boot()
            if server.beat != self._moved.get(file, (-1, 0.0))[0]:
                self._moved[file] = server.beat, now
            since = server.at if here else self._moved[file][1]
            server = server.model_copy(update={"silent_s": max(0.0, now - since)})
            # Locks of another machine may be invisible here: that nobody holds one proves nothing by itself.
            ended = _ended(file) and ((server.locked and here) or server.silent_s > LEASE_S)
            if ended or not here or server.root in (root, []):  # else two models folders have one state folder
                yield file, server, ended


class Waited(NamedTuple):
    """What came of waiting: how many servers serve it, why others can't, and of which it is not known."""

    serving: int
    problems: list[str]
    unknown: list[Server]


@dataclass(slots=True)
class Waiting:
    """Waits until all running servers serve a generation of a model, or one can't, or the rest is not heard of.

    root, state_dir: see `state_folder`. seconds: after which those that speak and do not serve it are given up.
    version: see `Server.waits_for`.
    """

    root: Path
    name: str
    generation: int
    seconds: float
    state_dir: Path | None = None
    version: str | None = None
    _monitor: ServerMonitor = field(init=False)
    _began: float = field(init=False)
    _scans: dict[tuple[str, int], int] = field(init=False, default_factory=dict)
    """How often each server had looked at its folder when it was first met."""

    def __post_init__(self) -> None:
        self._monitor = ServerMonitor(self.root, self.state_dir)
        self._began = time.monotonic()

    def wait(self) -> Waited:
        """Wait, as long as it takes."""
        while (waited := self.poll()) is None:
            time.sleep(POLL_S)
        return waited

    def poll(self) -> Waited | None:
        """Read once; None as long as there is something to wait for."""
        servers = self._monitor.servers()
        states = [(server, server.waits_for(self.name, self.generation, self.version)) for server in servers]
        serving = sum(state == "" for _, state in states)
        problems = list(dict.fromkeys(_said(servers, server, state) for server, state in states if state))
        late = [self._looked(server) for server, state in states if state is None]
        heard = [server for server in late if not server.unheard]
        if problems or not heard:
            return Waited(serving, problems, late)
        if time.monotonic() < self._began + self.seconds:
            return None
        said = [f"the server on {s.host} has not taken it within {self.seconds:.0f} s" for s in heard]
        return Waited(serving, said, [])

    def _looked(self, server: Server) -> Server:
        """Judge one that lives and does not serve it: has it looked at the folder since, and not found the change?

        The look that was under way may have come too early, so two count.
        """
        scans = server.scans - self._scans.setdefault((server.host, server.pid), server.scans)
        unseen = scans >= 2 and not server.sees(self.name, self.generation, self.version)
        if not unseen or time.monotonic() < self._began + UNSEEN_S:
            return server
        return server.model_copy(update={"unseen": True})


def _said(servers: list[Server], server: Server, problem: str) -> str:
    return problem if len(servers) == 1 else f"{server.host}: {problem}"


def _ended(file: Path) -> bool:
    """Tell whether nobody holds the lock on a file any more; False where that can't be known."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return try_lock(opened, shared=True) and is_at(file, opened)  # else it has just been replaced by a new one
    except OSError:
        return False
    finally:
        os.close(opened)


@cache
def _boot() -> str:
    """Name this run of this machine's kernel, all of whose processes share locks and the monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _place(root: Path) -> list[int]:
    """Name a models folder among those of this machine, by whatever path it is reached; empty where it is away."""
    try:
        facts = root.stat()
    except OSError:
        return []
    return [facts.st_dev, facts.st_ino]
