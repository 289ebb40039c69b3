"""One worker process: builds the application and serves it from the socket that it shares with the others."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from serving.access.rate_limits import Buckets
from serving.engine.limits import LEAST_MODEL_MEMORY
from serving.heartbeat import Heartbeat
from serving.linux import limits
from serving.linux.memory import bound_free_memory
from serving.log_pipe import LogPipe
from serving.logs import configure, form_of
from serving.metrics.counts import Counts
from serving.settings import Settings
from serving.signals import DRAIN, UNREADY
from serving.tls import server_context

if TYPE_CHECKING:  # the parent imports this module, and must not load onnxruntime
    from serving.deploy.fleet import Fleet
    from serving.http_api.services import Companion, Services

log = logging.getLogger("serving.worker")


_LEAST_SHARE = 1024 * 1024 * 1024
"""Bytes below which no worker is bounded, however many there are."""
REFUSED = 3
"""Exit status of a worker that must not be replaced: it was told to be strict, and a model is bad."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one worker process is given."""

    settings: Settings
    sock: socket.socket
    """Listens already; shared by all workers."""
    grpc: socket.socket | None
    """Holds the address of gRPC, which each worker binds for itself."""
    slot: int
    metrics_dir: Path
    parent: int
    heartbeat: Heartbeat
    counts: Counts
    buckets: Buckets
    link: socket.socket
    """To the coordinator, which says what to load."""
    announces: bool
    """Whether it says where the server is found: the first worker does, once."""


def keep_the_loop_turning() -> None:
    """Bound how long the interpreter and the allocator may keep the event loop waiting; for the whole process."""
    # A thread that works in Python (a long body, a version being loaded) gives way after it, at each turn of the loop.
    # At Python's own 5 ms the slowest answers took twice as long; throughput is the same.
    sys.setswitchinterval(0.0005)
    bound_free_memory()


def work(given: Assignment) -> None:
    """Be one worker: build the application and serve it from the shared socket, and gRPC at the address of another."""
    settings = given.settings
    keep_the_loop_turning()
    # Some operators take memory beside their arena, for texts and to sort: beyond this worker's share of the machine
    # they fail, before the system kills the process.
    limits.limit_data(max(_LEAST_SHARE, limits.memory() * 7 // 8 // settings.workers))
    # Until it serves there is nothing to finish; the listener takes these signals when it starts.
    for number in (DRAIN, UNREADY):
        signal.signal(number, lambda *_: os._exit(0))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None if os.getppid() == given.parent else os._exit(0))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    given.heartbeat.catch_crashes()
    pipe = LogPipe(sys.stderr.fileno())
    form = form_of(settings.log_format, sys.stderr)
    configure(settings.log_level, form, pipe)
    logging.getLogger("uvicorn").setLevel("WARNING")
    logging.getLogger("alembic").setLevel("WARNING")  # what it does to the schema is logged in this server's words
    # What is wrong has been said in a line; the traceback of refusing to start with it says no more.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not any(kind in record.getMessage() for kind in ("errors.ModelInvalid", "library.Unfit"))
    )
    try:
        _serve(given, pipe, voice=LogPipe(sys.stdout.fileno()) if form == "json" and given.announces else pipe)
    except Exception:  # multiprocessing would print it past the log
        log.critical("this worker ends with a fault", exc_info=True)
        pipe.finish()
        sys.exit(1)


def _serve(given: Assignment, pipe: LogPipe, *, voice: LogPipe) -> None:
    """Serve until told to end. voice: takes the announcement, which is no JSON and may not stand in a log that is."""
    settings = given.settings
    # Imported here, so that the parent, which only watches, stays small.
    from serving.http_api.listener import Listener  # noqa: PLC0415
    from serving.http_api.services import make_services  # noqa: PLC0415
    from serving.library import Unfit, host  # noqa: PLC0415
    from serving.metrics.metrics import Metrics  # noqa: PLC0415
    from serving.monitoring.shared import SharedDocuments  # noqa: PLC0415

    metrics = None
    if settings.metrics:
        metrics = Metrics(
            directory=given.metrics_dir,
            slot=given.slot,
            counts=given.counts,
            triton=settings.metrics_compat == "triton",
        )
        metrics.follow("serving_log_lines_dropped", lambda: pipe.dropped)
    companion = grpc_beside(settings, address(given.grpc)) if given.grpc is not None else None
    services = make_services(
        settings,
        metrics=metrics,
        threads=max(1, limits.cores() // settings.workers),
        memory_bytes=max(LEAST_MODEL_MEMORY, limits.memory() // (4 * settings.workers)),
        companion=companion,
        link=given.link,
        heartbeat=given.heartbeat,
        buckets=given.buckets,
        documents=SharedDocuments(given.metrics_dir, given.slot),
    )
    url = location(given.sock, settings)
    where = f"docs: {url}/docs   metrics: {url}/metrics" if settings.app is None else f"application: {settings.app}"
    if given.grpc is not None:
        where += f"   gRPC: {address(given.grpc)}"
    try:
        app = host(settings, services)
    except Exception as error:
        if not isinstance(error, Unfit):  # which has said why
            log.critical("the application %s can't be imported", settings.app, exc_info=True)
        pipe.finish()
        sys.exit(REFUSED)
    gc.enable()  # off since `cli`: all is imported
    listener = Listener(
        app,
        services,
        drain_s=settings.drain_s,
        tls=server_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca, "http/1.1"),
        parent=given.parent,
        heartbeat=given.heartbeat,
        announce=(lambda fleet: announce(fleet, url, where, voice)) if given.announces else None,
    )
    try:
        listener.listen(given.sock)
    except SystemExit:
        pipe.finish()
        sys.exit(REFUSED)
    if listener.cut_short:
        pipe.finish()
        os._exit(0)  # a model's thread may still run, and would hold up the exit


def location(sock: socket.socket, settings: Settings) -> str:
    """Return where a socket's server is found: an URL, or unix:path."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    return f"{'http' if settings.tls_cert is None else 'https'}://{address(sock)}"


def address(sock: socket.socket) -> str:
    """Return host:port as URLs have it."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def grpc_beside(settings: Settings, where: str) -> Callable[[Services], Companion]:
    """Return what makes the gRPC server of an application, for an address host:port."""
    from serving.grpc_api.server import GrpcServer  # noqa: PLC0415  only where gRPC is wanted

    tls = server_context(settings.tls_cert, settings.tls_key, settings.tls_client_ca, "h2")
    return lambda services: GrpcServer(
        services.fleet,
        services.metrics,
        access=services.access,
        bodies=services.bodies,
        pool=services.pool,
        address=where,
        grace=settings.drain_s,
        max_bytes=settings.max_body_bytes,
        timeouts=services.shared.timeouts,
        tls=tls,
        log=services.log,
    )


def announce(fleet: Fleet, url: str, where: str, pipe: LogPipe) -> None:
    """Print what is served, what is not and why, and where the documentation is."""
    table = Table(box=box.SIMPLE)
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
    text = io.StringIO()
    console = Console(file=text, highlight=False)
    console.print(f"serving on {url}", markup=False, soft_wrap=True)
    console.print(table)
    for problem in fleet.problems:
        console.print(f"not served: {problem.name} {problem.version}: {problem.reason}", markup=False, soft_wrap=True)
    console.print(where, markup=False, soft_wrap=True)
    pipe.write(text.getvalue())  # at once: who waits for the first line may read on
