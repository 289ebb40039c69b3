"""This project's own server as a subject: the real command on the shipped models and the probes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conformance import probes
from tests.conformance.subject import Subject
from tests.conftest import MODELS, Server, running


@contextmanager
def own(*flags: str, python: str = sys.executable) -> Iterator[Subject]:
    """Run it for a while; with `--grpc-port 0` among the flags it is asked over gRPC too.

    python: the interpreter that runs it.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        shutil.copytree(MODELS, root)
        probes.write(root)
        keys = Path(folder) / "keys"
        create = ["keys", "create", "--name", "conformance", "--scope", "deploy", "--keys", str(keys)]
        made = subprocess.run(
            [sys.executable, "-m", "serving.cli", *create], check=True, capture_output=True, text=True
        )
        with running("--keys", str(keys), *flags, models=root, python=python) as server:
            grpc = grpc_address(server) if "--grpc-port" in flags else None
            subject = Subject(server.url, grpc, key=made.stdout.strip())
            subject.pid = server.process.pid
            try:
                yield subject
            finally:
                subject.close()


def grpc_address(server: Server) -> str:
    """Return the address that the server printed for gRPC."""
    while not (found := re.search(r"gRPC: (\S+)\n", server.output())):
        assert server.process.poll() is None, server.output()
    return found[1]
