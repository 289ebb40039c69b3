"""The composition root: takes the addresses, and has a supervisor's workers serve from them."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable

from serving.access.caller import AccessInvalid
from serving.log_pipe import LogPipe
from serving.settings import Settings
from serving.supervisor import Supervisor, check_access
from serving.worker import LOG_FORMAT, allow_descriptors


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


def serve(settings: Settings, reread: Callable[[], Settings]) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status. Raises CannotStart.

    reread: gives the settings anew when SIGHUP asks for it; raises CannotReload.
    """
    allow_descriptors()
    pipe = LogPipe(sys.stderr.fileno())
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT, stream=pipe)
    try:
        check_access(settings)
    except AccessInvalid as error:  # said once here, rather than by every worker
        raise CannotStart(str(error)) from None
    sock = bind(settings.host, settings.port)
    grpc = reserve(settings.host, settings.grpc_port) if settings.grpc_port is not None else None
    return Supervisor(settings, sock, grpc, reread).run()
