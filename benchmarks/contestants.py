"""The servers that are compared, each started as its own process on loopback and ended by its pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NGINX = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; location / {{ default_type application/json; return 200 '{reply}'; }} }}
}}
"""
REPLY = '{"model_name":"forest","predictions":[{"label":"malignant","probabilities":{"malignant":0.97,"benign":0.03}}]}'


@dataclass(frozen=True)
class Contestant:
    """A server to start: its command (with {port}), the paths of its routes by dialect, and where it says ready."""

    name: str
    command: tuple[str, ...]
    paths: dict[str, str]
    ready: str = "/"
    env: dict[str, str] = field(default_factory=dict)


def contestants(models: Path, scratch: Path) -> dict[str, Contestant]:
    """Make all contestants; nginx only where it is installed."""
    python = sys.executable
    ours = (python, "-m", "serving.cli", "run", "--models", str(models), "--port", "{port}", "--log-level", "error")
    paths = {"v1": "/v1/models/forest:predict", "v2": "/v2/models/forest/infer"}
    uvicorn = (
        python,
        "-m",
        "uvicorn",
        "--port",
        "{port}",
        "--log-level",
        "error",
        "--no-access-log",
        "--loop",
        "uvloop",
    )
    model = {"MODEL": str(models / "forest" / "1" / "model.onnx")}
    made = [
        Contestant("serving", ours, paths, "/v2/health/ready"),
        Contestant("serving, plain ASGI", (*ours, "--no-fast-path"), paths, "/v2/health/ready"),
        Contestant("serving, 2 workers", (*ours, "--workers", "2"), paths, "/v2/health/ready"),
        Contestant(
            "serving, in the example application",
            (*ours, "--app", "clinic.main:app"),
            {dialect: f"/ml{path}" for dialect, path in paths.items()},
            "/ml/v2/health/ready",
            {"PYTHONPATH": "docs/examples", "CLINIC_DATABASE": "sqlite+aiosqlite:///:memory:"},
        ),
        Contestant(
            "typical FastAPI",
            (*uvicorn, "benchmarks.typical_fastapi:app"),
            {"v1": "/predict", "v2": "/infer"},
            "/ready",
            model,
        ),
        Contestant("bare uvicorn hello", (*uvicorn, "benchmarks.hello:app"), {"v1": "/", "v2": "/"}),
    ]
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    if Path(nginx).exists():
        command = (nginx, "-p", str(scratch), "-c", str(scratch / "nginx.conf"))
        made.append(Contestant("nginx static reply", command, {"v1": "/", "v2": "/"}))
    return {contestant.name: contestant for contestant in made}


@contextmanager
def running(
    contestant: Contestant, scratch: Path, cores: str | None, log: Path = Path(os.devnull)
) -> Iterator[tuple[int, int, float]]:
    """Run a contestant; give its port, its pid and the seconds that it took to be ready. log: gets what it prints.

    Raises RuntimeError where it does not get ready.
    """
    port = free_port()
    if contestant.name.startswith("nginx"):
        (scratch / "nginx.conf").write_text(NGINX.format(folder=scratch, port=port, reply=REPLY))
    command = [part.format(port=port) for part in contestant.command]
    if cores is not None:
        command = ["taskset", "-c", cores, *command]
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **contestant.env}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _await(f"http://127.0.0.1:{port}{contestant.ready}", process)
        yield port, process.pid, time.monotonic() - began
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # what some leave behind
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"{url} ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.01)
    raise RuntimeError(f"{url} was not ready in 60 s")


def resident_mib(pid: int) -> dict[int, float]:
    """Return the resident memory of a process and its children, in MiB by pid."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):  # it has ended
                pids += [int(child) for child in task.read_text().split()]
    sizes = {}
    for each in pids:
        with suppress(OSError):
            pages = int(Path(f"/proc/{each}/statm").read_text().split()[1])
            sizes[each] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return sizes
