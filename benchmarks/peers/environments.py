"""A virtual environment for each peer, made once, of the versions that PyPI has on that day."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from uv import find_uv_bin

from benchmarks.peers.servers import Peer


class NotInstalled(Exception):
    """A peer that can't be installed; says why."""


def environment(peer: Peer, root: Path) -> Path:
    """Return the folder of a peer's programs. Raises NotInstalled."""
    folder = root / peer.name.replace(" ", "-")
    done = folder / "complete"
    wanted = " ".join(peer.packages)
    if not done.exists() or done.read_text() != wanted:
        print(f"making {folder}: {wanted}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        _uv("venv", "--python", sys.executable, str(folder))
        _uv("pip", "install", "--python", str(folder / "bin" / "python"), "--compile-bytecode", *peer.packages)
        done.write_text(wanted)
    return folder / "bin"


def versions(peer: Peer, programs: Path) -> dict[str, str]:
    """Return the versions of a peer's packages, as they are installed."""
    listed = json.loads(_uv("pip", "list", "--format", "json", "--python", str(programs / "python")))
    installed = {one["name"].lower(): one["version"] for one in listed}
    return {name: installed[name] for name in (package.partition("[")[0] for package in peer.packages)}


def _uv(*arguments: str) -> str:
    done = subprocess.run([find_uv_bin(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotInstalled(done.stderr.strip().splitlines()[-1])
    return done.stdout
