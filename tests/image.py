"""Run by `make image`: does what the Dockerfile says, without Docker, in folders that stand for the image's.

Twice, since both must be the same bytes; adds up what is installed; starts it as the image does and asks what the
health check asks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.contestants import free_port

ROOT = Path(__file__).parents[1]
BASE_MB = 125
"""python:3.11-slim on disk (45.5 MB to transfer): docker-library/repo-info, repos/python/local/3.11-slim.md."""


def instructions() -> list[tuple[str, str]]:
    """Return what the Dockerfile says, each instruction with its arguments, in one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line)]


class Stage:
    """The file system of an image that is being made, below a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root
        self.environment = {
            name: os.environ[name] for name in ("HOME", "LANG", "SSL_CERT_FILE", "PIP_CERT") if name in os.environ
        }
        self.environment["PATH"] = f"{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
        self.said: dict[str, str] = {}

    def here(self, text: str) -> str:
        """Put the image's own folders below ours."""
        return re.sub(r"(?<![\w.])/(venv|src|models)\b", rf"{self.root}/\1", text)

    def do(self, word: str, rest: str) -> None:
        """Do one instruction."""
        if word == "WORKDIR":
            self.folder = self.root / rest.strip("/")
            self.folder.mkdir(exist_ok=True)
        elif word == "ENV":
            for name, value in (pair.split("=", 1) for pair in rest.split()):
                self.environment[name] = self.here(value).replace("$PATH", self.environment["PATH"])
        elif word == "COPY" and not rest.startswith("--from"):
            *names, to = rest.split()
            for name in names:
                target = Path(self.here(to)) if to.startswith("/") else self.folder / to
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, target)
        elif word == "RUN" and not rest.startswith("useradd"):
            subprocess.run(["sh", "-ec", self.here(rest)], cwd=self.folder, env=self.environment, check=True)
        else:
            self.said[word] = rest


def build(root: Path) -> Stage:
    """Make what the Dockerfile makes."""
    root.mkdir()
    stage = Stage(root)
    for word, rest in instructions():
        stage.do(word, rest)
    return stage


def digest(folder: Path) -> str:
    """Return a hash over the names and the bytes of all files."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(f"{path.relative_to(folder)}\0".encode())
        if path.is_file() and not path.is_symlink():
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def megabytes(folder: Path) -> float:
    """Add up the files of a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def serve(stage: Stage) -> None:
    """Run the image's command, until what checks its health says that it is well."""
    port = str(free_port())
    command = json.loads(stage.said["ENTRYPOINT"]) + json.loads(stage.said["CMD"])
    check = [part.replace("8080", port) for part in json.loads(stage.said["HEALTHCHECK"].partition("CMD")[2])]
    environment = {**stage.environment, "SERVING_PORT": port, "SERVING_HOST": "127.0.0.1"}
    began = time.monotonic()
    with subprocess.Popen(command, cwd=stage.folder, env=environment) as server:
        try:
            while subprocess.run(check, env=environment, capture_output=True, check=False).returncode:
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() - began < 60, "the server is not ready"
            print(f"ready {time.monotonic() - began:.1f} s after start")
        finally:
            server.send_signal(signal.SIGTERM)
    assert server.returncode == 0, server.returncode


def main() -> None:
    """Build, compare, add up, serve."""
    with tempfile.TemporaryDirectory() as made:
        root, first = Path(made) / "image", Path(made) / "first"
        build(root)
        before = digest(root / "venv")
        root.rename(first)
        stage = build(root)
        assert digest(root / "venv") == before, f"two builds differ: diff -r {first} {root}"
        print(f"two builds are the same: sha256 {before}")
        packages = next((root / "venv" / "lib").glob("python*/site-packages"))
        sizes = sorted(((megabytes(path), path.name) for path in packages.iterdir() if path.is_dir()), reverse=True)
        for size, name in sizes[:8]:
            print(f"{size:8.1f} MB {name}")
        whole, models = megabytes(root / "venv"), megabytes(root / "models")
        print(f"{whole:8.1f} MB /venv and {models:.1f} MB /models upon python:3.11-slim, {BASE_MB} MB")
        serve(stage)
        # What was left out is missed by nothing that answers a prediction or shows the documentation.
        python = str(root / "venv" / "bin" / "python")
        asking = [python, "-I", str(ROOT / "tests" / "installed.py"), str(root / "models")]
        subprocess.run(asking, check=True, cwd=stage.folder)


main()
