"""The running servers of a models folder, by the files in which each says what it serves, and waiting for them."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.fleet.state import state_folders

FRESH_S = 10.0
"""Seconds after which a server that says nothing does not count any more; each says something every 2 s."""


@dataclass(frozen=True, slots=True)
class Server:
    """One running server. `models[name]` has `asked` and `serving` (generations), `stable`, `error` and `busy`."""

    host: str
    pid: int
    time: float
    models: dict[str, dict[str, Any]]

    def waits_for(self, name: str, generation: int) -> str | None:
        """Return '' once it serves a generation of a model, why it can't, or None as long as it is not known."""
        standing = self.models.get(name, {})
        serving = standing.get("serving")
        if serving is not None and serving >= generation:
            return ""
        if standing.get("busy", True) or (standing.get("asked") or 0) < generation:
            return None
        return str(standing["error"]) if standing.get("error") else None


def running(root: Path, state_dir: Path | None = None) -> list[Server]:
    """Return the servers that serve from a models folder now."""
    found = []
    for file in sorted(file for folder in state_folders(root, state_dir) for file in folder.glob("servers/*.json")):
        try:
            said = json.loads(file.read_bytes())
            server = Server(str(said["host"]), int(said["pid"]), float(said["time"]), dict(said["models"]))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # it has just gone, or is not one
        if time.time() - server.time < FRESH_S and not _dead(server):
            found.append(server)
    return found


def wait(
    root: Path, name: str, generation: int, *, seconds: float, state_dir: Path | None = None
) -> tuple[int, list[str]]:
    """Wait until all running servers serve a generation of a model, or one can't; return how many, and why not."""
    until = time.monotonic() + seconds
    while True:
        servers = running(root, state_dir)
        states = [(server, server.waits_for(name, generation)) for server in servers]
        problems = list(dict.fromkeys(_said(servers, server, state) for server, state in states if state))
        if problems or all(state is not None for _, state in states):
            return len(servers), problems
        if time.monotonic() > until:
            late = [server for server, state in states if state is None]
            return len(servers), [f"the server on {s.host} has not taken it within {seconds:.0f} s" for s in late]
        time.sleep(0.05)


def _said(servers: list[Server], server: Server, problem: str) -> str:
    return problem if len(servers) == 1 else f"{server.host}: {problem}"


def _dead(server: Server) -> bool:
    """Tell whether a server on this machine was killed, and left its file."""
    if server.host != socket.gethostname():
        return False
    try:
        os.kill(server.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
