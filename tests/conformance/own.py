"""This project's own server as a subject: the real command on the shipped models and the probes."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.access.keys import Key, digest, generate
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
        secret = generate()
        keys.write_text(Key("conformance", frozenset({"deploy"}), digest(secret.encode())).line() + "\n")
        keys.chmod(0o600)
        with running("--keys", str(keys), *flags, models=root, python=python) as server:
            grpc = grpc_address(server) if "--grpc-port" in flags else None
            subject = Subject(server.url, grpc, key=secret)
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
