"""The running servers of a models folder, by the files in which each says what it serves, and waiting for them."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from serving.repository import presence
from serving.repository.state_directory import state_folders

POLL_S = 0.05
SILENT_S = 10.0
"""Seconds without a word after which it is unknown what a server does; each says something every 2 s."""
LEASE_S = 60.0
"""Seconds without a word after which a server on another machine, whose lock nobody holds, has ended."""


@dataclass(frozen=True, slots=True)
class Server:
    """One running server. `models[name]` has `asked` and `serving` (generations), `stable`, `error` and `busy`."""

    host: str
    pid: int
    models: dict[str, dict[str, Any]]
    silent_s: float
    """Seconds since it has said something, or, of another machine, since it was first seen without saying more."""
    gone: str = ""
    """Why it can't follow the models folder now; empty where it can."""

    @property
    def unheard(self) -> str:
        """Say why it is not known what it serves or will; empty where it can be waited for."""
        if self.silent_s >= SILENT_S:
            return f"has said nothing for {self.silent_s:.0f} s"
        return f"can't follow: {self.gone}" if self.gone else ""

    def waits_for(self, name: str, generation: int) -> str | None:
        """Return '' once it serves a generation of a model, why it can't, or None as long as it is not known."""
        standing = self.models.get(name, {})
        serving = standing.get("serving")
        if serving is not None and serving >= generation:
            return ""
        if standing.get("busy", True) or (standing.get("asked") or 0) < generation:
            return None
        return str(standing["error"]) if standing.get("error") else None


class Observer:
    """Looks again and again at the servers of a models folder. root, state_dir: see `state_folder`."""

    def __init__(self, root: Path, state_dir: Path | None = None) -> None:
        self._root = root
        self._state_dir = state_dir
        self._moved: dict[Path, tuple[int, float]] = {}
        """The count in each file, and when it was first seen, in seconds of this machine's monotonic clock."""

    def servers(self) -> list[Server]:
        """Return the servers that have not ended, and remove the files of those that have."""
        found = []
        now, root = time.monotonic(), presence.place(self._root)
        for folder in state_folders(self._root, self._state_dir):
            for file in sorted(folder.glob(f"{presence.FOLDER}/*.json")):
                try:
                    said = json.loads(file.read_bytes())
                    beat, here = int(said["beat"]), said["boot"] == presence.boot()
                    elsewhere = here and said["root"] not in (root, [])
                    if beat != self._moved.get(file, (-1, 0.0))[0]:
                        self._moved[file] = beat, now
                    since = float(said["at"]) if here else self._moved[file][1]
                    gone = next((str(reason) for name, _, reason in said["problems"] if not name), "")
                    silent_s = max(0.0, now - since)
                    server = Server(str(said["host"]), int(said["pid"]), dict(said["models"]), silent_s, gone)
                    alone = bool(said["locked"]) and here
                except (OSError, ValueError, TypeError, KeyError):
                    continue  # it has just gone, or is not one
                # Locks of another machine may be invisible here: that nobody holds one proves nothing by itself.
                if presence.ended(file) and (alone or server.silent_s > LEASE_S):
                    with contextlib.suppress(OSError):
                        file.unlink()
                elif not elsewhere:  # two models folders have been given one state folder
                    found.append(server)
        return found


class Waited(NamedTuple):
    """What came of waiting: how many servers serve it, why others can't, and of which it is not known."""

    serving: int
    problems: list[str]
    unknown: list[Server]


class Waiting:
    """Waits until all running servers serve a generation of a model, or one can't, or the rest is not heard of.

    root, state_dir: see `state_folder`. seconds: after which those that speak and do not serve it are given up.
    """

    def __init__(
        self, root: Path, name: str, generation: int, *, seconds: float, state_dir: Path | None = None
    ) -> None:
        self._observer = Observer(root, state_dir)
        self._name = name
        self._generation = generation
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def poll(self) -> Waited | None:
        """Look once; None as long as there is something to wait for."""
        servers = self._observer.servers()
        states = [(server, server.waits_for(self._name, self._generation)) for server in servers]
        serving = sum(state == "" for _, state in states)
        problems = list(dict.fromkeys(_said(servers, server, state) for server, state in states if state))
        late = [server for server, state in states if state is None]
        heard = [server for server in late if not server.unheard]
        if problems or not heard:
            return Waited(serving, problems, late)
        if time.monotonic() < self._until:
            return None
        said = [f"the server on {s.host} has not taken it within {self._seconds:.0f} s" for s in heard]
        return Waited(serving, said, [])


def wait(root: Path, name: str, generation: int, *, seconds: float, state_dir: Path | None = None) -> Waited:
    """Wait as `Waiting` says."""
    waiting = Waiting(root, name, generation, seconds=seconds, state_dir=state_dir)
    while (waited := waiting.poll()) is None:
        time.sleep(POLL_S)
    return waited


def _said(servers: list[Server], server: Server, problem: str) -> str:
    return problem if len(servers) == 1 else f"{server.host}: {problem}"
