"""One worker process: builds the application and serves it from the socket that it shares with the others."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from serving.logs import configure, form_of
from serving.settings import Settings

if TYPE_CHECKING:  # the parent imports this module, and must not load onnxruntime
    from serving.engine.admission import Bodies
    from serving.fleet.fleet import Fleet
    from serving.http_api.app import Companion
    from serving.metrics import Metrics

REFUSED = 3
"""Exit status of a worker that must not be replaced: it was told to be strict, and a model is bad."""


def cores() -> int:
    """Return how many cores this process may use: affinity and cgroup quota, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    for file, read in (
        ("/sys/fs/cgroup/cpu.max", _quota_v2),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", _quota_v1),
    ):
        try:
            quota = read(Path(file))
        except (OSError, ValueError):
            continue
        if quota is not None:
            allowed = min(allowed, max(1, math.floor(quota)))
    return max(1, allowed)


def _quota_v2(path: Path) -> float | None:
    quota, period = path.read_text().split()[:2]
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(path: Path) -> float | None:
    quota = int(path.read_text())
    return None if quota <= 0 else quota / int(path.with_name("cpu.cfs_period_us").read_text())


def work(  # noqa: PLR0917  what a spawned process gets is positional
    settings: Settings, sock: socket.socket, grpc: socket.socket | None, slot: int, metrics_dir: Path, parent: int
) -> None:
    """Be one worker: build the application and serve it from the shared socket, and gRPC at the address of another."""
    form = form_of(settings.log_format, sys.stderr)
    configure(settings.log_level, form, sys.stderr)
    logging.getLogger("uvicorn").setLevel("WARNING")
    # The fleet has said in a line which model is bad; the traceback of refusing to start with it says no more.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "errors.ModelInvalid" not in record.getMessage())
    # uvicorn raises the signal once more when it has drained: by then it means nothing.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics_dir)

    # Imported here, so that the parent, which only watches, stays small.
    from serving.http_api.app import create_app  # noqa: PLC0415
    from serving.http_api.listener import Listener  # noqa: PLC0415
    from serving.metrics import Metrics  # noqa: PLC0415

    metrics = Metrics(directory=metrics_dir, slot=slot) if settings.metrics else None
    companion = _grpc(settings, address(grpc)) if grpc is not None else None
    app = create_app(settings, metrics=metrics, threads=max(1, cores() // settings.workers), companion=companion)
    url = f"http://{address(sock)}"
    beside = f"   gRPC: {address(grpc)}" if grpc is not None else ""
    listener = Listener(
        app,
        drain_s=settings.drain_s,
        keep_alive_s=settings.keep_alive_s,
        parent=parent,
        announce=(lambda fleet: announce(fleet, url, beside, sys.stdout if form == "json" else sys.stderr))
        if slot == 0
        else None,
    )
    try:
        listener.listen(sock)
    except SystemExit:
        sys.exit(REFUSED)


def address(sock: socket.socket) -> str:
    """Return host:port as URLs have it."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _grpc(settings: Settings, where: str) -> Callable[[Fleet, Metrics | None, Bodies], Companion]:
    from serving.grpc_api.service import GrpcServer  # noqa: PLC0415  only where gRPC is wanted

    return lambda fleet, metrics, bodies: GrpcServer(
        fleet,
        metrics,
        bodies=bodies,
        address=where,
        deadline=settings.deadline_s,
        grace=settings.drain_s,
        max_bytes=settings.max_body_bytes,
    )


def announce(fleet: Fleet, url: str, beside: str, stream: TextIO) -> None:
    """Print what is served, what is not and why, and where the documentation is; never into a log of JSON lines."""
    table = Table(title=f"serving on {url}", title_justify="left", box=box.SIMPLE)
    for column in ("model", "versions", "task", "features"):
        table.add_column(column, overflow="fold")
    for served in fleet.models.values():
        names = [feature.name for feature in served.default.signature.features]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        versions = ", ".join(f"[{v}]" if v == served.default.version else v for v in served.versions)
        table.add_row(
            served.name,
            versions.replace("[", "\\["),
            served.default.signature.task,
            ", ".join(names[:4]) + more,
        )
    console = Console(file=stream, highlight=False)
    console.print(table)
    for problem in fleet.problems:
        console.print(f"not served: {problem.name} {problem.version}: {problem.reason}", markup=False, soft_wrap=True)
    console.print(f"docs: {url}/docs   metrics: {url}/metrics{beside}", soft_wrap=True)
