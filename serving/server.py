"""The composition root: takes the addresses, and has a supervisor's workers serve from them."""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from serving import platforms
from serving.access.principal import AccessInvalid
from serving.deploy.adopted import adopted
from serving.deploy.mirror import mirrored
from serving.errors import ServingError
from serving.linux.limits import raise_open_files
from serving.log_pipe import LogPipe
from serving.logs import configure, form_of
from serving.repository.state_directory import state_folder
from serving.settings import Settings
from serving.supervisor import Supervisor, check_credentials
from serving.tls import TlsInvalid

log = logging.getLogger("serving.server")


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


def bind_unix(path: Path) -> socket.socket:
    """Bind a Unix socket that owner and group may use, and listen.

    A file that a server left which has gone is replaced. Raises CannotStart where a server listens there, where
    something else has the name, or where the folder can't be written.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                refused = probe.connect_ex(str(path)) == errno.ECONNREFUSED
            if refused:
                path.unlink()
        before = os.umask(0o117)  # from the first moment: whoever connects before a chmod stays connected
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        sock.close()
        raise CannotStart(f"can't listen on {path}: {_reason(error)}; choose another with --uds") from None
    sock.listen(2048)
    sock.set_inheritable(True)
    return sock


def _remove(path: Path, ours: os.stat_result) -> None:
    """Remove our socket's file, and not that of a server which has taken the place meanwhile."""
    with contextlib.suppress(OSError):
        if os.path.samestat(path.lstat(), ours):
            path.unlink()


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
        raise CannotStart(f"can't listen on {host}:{port}: {_reason(error)}; choose another with {option}") from None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def check_folders(models: Path) -> None:
    """Look for what no server can start without. Raises CannotStart."""
    try:
        with os.scandir(models):
            pass
    except OSError as error:
        raise CannotStart(
            f"the models folder {models} can't be read: {_reason(error)}; name another with --models"
        ) from None
    try:
        with tempfile.TemporaryFile():
            pass
    except OSError as error:
        raise CannotStart(
            f"no temporary file can be written: {_reason(error)}; mount a writable folder at /tmp, or name one in "
            "TMPDIR"
        ) from None


def misnamed(environment: Iterable[str]) -> list[str]:
    """Say which variables look like settings and are none."""
    known = {f"SERVING_{name.upper()}" for name in Settings.model_fields}
    found = []
    for name in sorted(environment):
        if name.upper().startswith("SERVING_") and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, 1, 0.8)
            found.append(f"{name} in the environment is no setting{f': did you mean {near[0]}?' if near else ''}")
    return found


def _moved(
    settings: Settings, reread: Callable[[], Settings], models: Path, state_dir: Path | None
) -> tuple[Settings, Callable[[], Settings]]:
    """Serve another folder than the settings name, now and when they are read again."""
    theirs = {"models": models, "state_dir": state_dir}
    return settings.model_copy(update=theirs), lambda: reread().model_copy(update=theirs)


def serve(settings: Settings, reread: Callable[[], Settings]) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status. Raises CannotStart.

    reread: gives the settings anew when SIGHUP asks for it; raises CannotReload.
    """
    raise_open_files()
    configure(settings.log_level, form_of(settings.log_format, sys.stderr), LogPipe(sys.stderr.fileno()))
    try:
        check_credentials(settings)
    except (AccessInvalid, TlsInvalid) as error:  # said once here, rather than by every worker
        raise CannotStart(str(error)) from None
    for warning in misnamed(os.environ):
        log.warning(warning)
    try:
        models, state_dir = mirrored(settings.models, settings.state_dir, say=log.error)
    except ServingError as error:
        raise CannotStart(f"the models can't be read: {error.message}") from None
    if models != settings.models:
        settings, reread = _moved(settings, reread, models, state_dir)
    check_folders(settings.models)
    if settings.jobs_database_url is not None:
        try:
            state_folder(settings.models, settings.state_dir)
        except OSError as error:
            raise CannotStart(f"jobs need a state folder: {_reason(error)}; name one with --state-dir") from None
    with contextlib.ExitStack() as ending:
        asked = platforms.platform(settings.platform, os.environ)
        by_request = asked is not None and asked.many
        itself = settings.platform_model or "model"
        folder = ending.enter_context(adopted(settings.models, by_request=by_request, itself=itself))
        if folder is not None:
            settings, reread = _moved(settings, reread, folder, settings.state_dir or folder.with_name("state"))
        if settings.uds is None:
            sock = bind(settings.host, settings.port)
        else:
            sock = bind_unix(settings.uds)
            ending.callback(_remove, settings.uds, os.stat(settings.uds))
        grpc = reserve(settings.host, settings.grpc_port) if settings.grpc_port is not None else None
        return Supervisor(settings, sock, grpc, reread).run()
