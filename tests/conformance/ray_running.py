"""A Ray cluster for `ray_cluster`, the models that it serves, and nginx before servers that Ray keeps."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from serving.access.key_store import KeyStore
from tests.conformance import probes
from tests.conformance.environments import environment
from tests.conformance.peers import _free_ports
from tests.conftest import MODELS

NODES = Path(__file__).with_name("ray_nodes.py")
# A token of its own: another cluster of this machine may have written another one where Ray looks for it.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class Nodes:
    """A cluster that serves at `port`; `say` asks it (see ray_nodes)."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def say(self, what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def healed(self, how: str) -> float:
        """Kill something; give the seconds until as many replicas run as before."""
        before = self.say("replicas")
        began = time.monotonic()
        assert self.say(how), how
        until(lambda: self.say("replicas") != before, 60)
        return until(lambda: self.say("replicas") == before, 120) - began


@contextmanager
def cluster(
    file: str,
    settings: dict[str, str],
    folder: Path,
    *,
    nodes: int,
    replicas: int = 1,
    scaling: dict[str, Any] | None = None,
    **env: str,
) -> Iterator[Nodes]:
    """Have a cluster of so many nodes beside its head."""
    gcs, port = _free_ports(2)
    given = {"file": file, "settings": settings, "nodes": nodes, "replicas": replicas, "scaling": scaling}
    given |= {"gcs_port": gcs, "port": port}
    python = environment("ray") / "bin" / "python"
    with (folder / f"ray-{port}.log").open("w") as log:
        process = subprocess.Popen(
            [str(python), "-P", str(NODES), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **ENVIRONMENT, **env},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError(Path(log.name).read_text()[-4000:])
            yield Nodes(process, port)
        finally:
            process.stdin.close()
            process.wait(90)


@contextmanager
def repository(folder: Path, *, more: bool = False) -> Iterator[tuple[dict[str, str], str]]:
    """Give the settings of a models folder with two versions of iris, and a key that may deploy."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        root = Path(made)
        shutil.copytree(MODELS if more else MODELS / "iris", root / "models" if more else root / "models" / "iris")
        if more:
            probes.write(root / "models")
        key = KeyStore(root / "keys").create("ray", frozenset({"deploy"}))
        yield {"models": f"{root}/models", "state_dir": f"{root}/state", "keys": f"{root}/keys"}, key


@contextmanager
def nginx(urls: list[str], folder: Path, reload: str | None = None) -> Iterator[int]:
    """Have nginx before servers that Ray keeps, as the manual says; reload: what is run instead of its own reload."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        (port,) = _free_ports(1)
        upstreams = Path(made) / "upstreams.conf"
        server = (
            files("serving.scale").joinpath("nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
        )
        temporary = " ".join(
            f"{what}_temp_path {made};" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = Path(made) / "whole.conf"
        config.write_text(
            f"daemon off; worker_processes 1; pid {made}/pid; error_log {made}/error.log; events {{}}\n"
            f"http {{ access_log off; keepalive_requests 1000000; {temporary} include {upstreams};\n{server}}}\n"
        )
        command = ["nginx", "-c", str(config)]
        told = reload or " ".join([*command, "-s", "reload"])
        flags = [flag for url in urls for flag in ("--url", url)]
        following = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "serving.cli",
                "ray",
                "upstreams",
                *flags,
                "--out",
                str(upstreams),
                "--reload",
                told,
            ],
            stderr=subprocess.DEVNULL,
        )
        until(upstreams.exists, 30)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            until((Path(made) / "pid").exists, 30)
            yield port
        finally:
            following.terminate()
            following.wait(10)
            process.terminate()
            process.wait(10)


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Wait for a condition, and give the time (monotonic) at which it was met."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.1)
    return time.monotonic()
