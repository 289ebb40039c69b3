"""A PostgreSQL of a test's own, of Debian's package `postgresql`: a cluster in a folder, on a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest


class Postgres:
    """A cluster that can be stopped, killed and started again."""

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not found:
            pytest.skip("Debian's package postgresql is not installed")
        self._bin = found[-1]
        # The server refuses to run as root.
        self._user = "postgres" if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
        if self._user is not None:
            os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, -1)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-D", "data", "-A", "trust", "-U", "tester", "--no-sync", "-E", "UTF8", "--locale", "C")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments],
            check=False,
            cwd=self.folder,
            user=self._user,
            capture_output=True,
            text=True,
            env={},
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c max_connections=200"
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """End it: `immediate` as a crash does."""
        self._run("pg_ctl", "-D", "data", "-w", "-m", mode, "stop")

    def database(self, name: str) -> str:
        """Make a database, and return its URL, with options as libpq has them."""
        self._run(
            "psql",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "tester",
            "postgres",
            "-qc",
            f"create database {name}",
        )
        return f"postgresql://tester@127.0.0.1:{self.port}/{name}?sslmode=prefer&application_name=jobs"

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
