"""The composition root: one parent that owns the socket, and worker processes that serve from it."""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from serving.logs import configure, form_of
from serving.metrics import forget_gauges
from serving.settings import Settings
from serving.worker import REFUSED, work

log = logging.getLogger("serving.server")

RESPAWN_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Waits before a dead worker is replaced, growing while it keeps dying young."""
YOUNG_S = 10.0


class CannotStart(Exception):
    """The server can't start; the text is one line for the person who started it."""


def bind(host: str, port: int) -> socket.socket:
    """Bind and listen. Raises CannotStart where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _bind(sock, host, port, "--port")
    sock.listen(2048)
    sock.set_inheritable(True)
    return sock


def reserve(host: str, port: int) -> socket.socket:
    """Keep an address for the workers' gRPC servers, each of which binds it for itself (SO_REUSEPORT).

    Bound and not listening, it takes no connections. Raises CannotStart where the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Of two servers that share a port by mistake, each would get half of the calls: so ask first for it alone.
    with socket.socket(family, socket.SOCK_STREAM) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(alone, host, port, "--grpc-port")
        port = alone.getsockname()[1]
    shared = socket.socket(family, socket.SOCK_STREAM)
    shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _bind(shared, host, port, "--grpc-port")
    shared.set_inheritable(True)
    return shared


def _bind(sock: socket.socket, host: str, port: int, option: str) -> None:
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise CannotStart(f"can't listen on {host}:{port}: {reason.lower()}; choose another with {option}") from None


class Supervisor:
    """Starts the workers, replaces those that die, and drains them all when told to end."""

    def __init__(self, settings: Settings, sock: socket.socket, grpc: socket.socket | None) -> None:
        self._settings = settings
        self._sock = sock
        self._grpc = grpc
        self._context = multiprocessing.get_context("spawn")  # onnxruntime sessions do not survive fork
        self._workers: dict[int, BaseProcess] = {}
        self._born: dict[int, float] = {}
        self._deaths: dict[int, int] = {}
        self._metrics_dir = Path(tempfile.mkdtemp(prefix="serving-metrics-"))
        self._ending: int | None = None

    def run(self) -> int:
        """Run until told to end; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        try:
            for slot in range(self._settings.workers):
                self._spawn(slot)
            while self._ending is None:
                if not self._watch():
                    return 3
            return self._drain()
        finally:
            shutil.rmtree(self._metrics_dir, ignore_errors=True)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending = number

    def _spawn(self, slot: int) -> None:
        worker = self._context.Process(
            target=work,
            args=(self._settings, self._sock, self._grpc, slot, self._metrics_dir, os.getpid()),
            name=f"worker-{slot}",
        )
        worker.start()
        self._workers[slot] = worker
        self._born[slot] = time.monotonic()

    def _watch(self) -> bool:
        """Wait for a death or a signal, and replace the dead. False where a worker refused to start at all."""
        multiprocessing.connection.wait([w.sentinel for w in self._workers.values()], timeout=0.2)
        for slot, worker in list(self._workers.items()):
            if worker.is_alive() or self._ending is not None:
                continue
            if worker.exitcode == REFUSED:
                self._stop_all()
                return False
            forget_gauges(self._metrics_dir, slot)
            young = time.monotonic() - self._born[slot] < YOUNG_S
            self._deaths[slot] = self._deaths.get(slot, 0) + 1 if young else 1
            wait = RESPAWN_S[min(self._deaths[slot], len(RESPAWN_S)) - 1]
            log.error("worker %d ended with %s; its replacement starts in %.1f s", slot, worker.exitcode, wait)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and self._ending is None:
                time.sleep(0.05)
            if self._ending is None:
                self._spawn(slot)
        return True

    def _drain(self) -> int:
        self._sock.close()
        grace = time.monotonic() + self._settings.drain_s + 2
        self._stop_all(grace)
        codes = {slot: worker.exitcode for slot, worker in self._workers.items()}
        bad = {slot: code for slot, code in codes.items() if code != 0}
        if bad:
            log.error("workers that did not end cleanly: %s", bad)
        return 1 if bad else 0

    def _stop_all(self, grace: float | None = None) -> None:
        for worker in self._workers.values():
            if worker.is_alive():
                worker.terminate()
        until = grace if grace is not None else time.monotonic() + 5
        for worker in self._workers.values():
            worker.join(max(0.1, until - time.monotonic()))
            if worker.is_alive():
                log.error("%s did not end in time", worker.name)
                worker.kill()
                worker.join()


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status. Raises CannotStart."""
    configure(settings.log_level, form_of(settings.log_format, sys.stderr), sys.stderr)
    sock = bind(settings.host, settings.port)
    grpc = reserve(settings.host, settings.grpc_port) if settings.grpc_port is not None else None
    return Supervisor(settings, sock, grpc).run()
