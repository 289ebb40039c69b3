"""A worker's side of the process that reads and writes streams of rows."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from serving.bodies.exchange import receive, send
from serving.bulk.batch import Batch
from serving.bulk.formats import Format
from serving.engine.signature import Described
from serving.errors import NotReady, ServingError
from serving.linux.sandbox import bare_environment

log = logging.getLogger("serving.bulk")

_START_S = 60.0
_BUFFER_BYTES = 1 << 20
"""That a socket should hold, where net.core.wmem_max lets it: with the usual 208 KiB CSV is a quarter slower."""


class RowStream:
    """One stream. `next` and `write` block, each for a thread of its own.

    body: takes the bytes that the client sends; does not block, and is shut down for writing at their end.
    """

    def __init__(self, body: socket.socket, batches: socket.socket, answered: socket.socket) -> None:
        self.body = body
        self._batches = batches
        self._answered = answered
        self._closed = False
        body.setblocking(False)

    def next(self) -> Batch | None:
        """Wait for the next rows; None behind the last ones.

        Raises SignatureMismatch for columns that are not the model's, InvalidRequest for what is not of the format,
        PayloadTooLarge, and ServingError where the process has ended.
        """
        with self._alive():
            made = receive(self._batches)
        if isinstance(made, ServingError):
            raise made
        batch: Batch | None = _without_fault(made)
        return batch

    def write(
        self, scored: Sequence[tuple[Any, ...]], *, beside_live: bool, counts: tuple[int, int] | None = None
    ) -> bytes:
        """Return the bytes of what became of rows: see `AnswerForm.written`.

        counts: of good and bad rows, once these are the last. beside_live: others have live requests, which reading and
        writing must not keep from the processor. Raises ServingError where the process has ended.
        """
        with self._alive():
            send(self._answered, (beside_live, scored, counts))
            made = receive(self._answered)
        written: bytes = _without_fault(made)
        return written

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError):
            if not self._closed:
                log.error("the process of a stream of rows has ended: it was killed, perhaps for want of memory")
            raise ServingError("the process that reads these rows has ended: send fewer at a time") from None

    def close(self) -> None:
        """End it, whoever waits for it."""
        self._closed = True
        for sock in (self.body, self._batches, self._answered):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits; closing does not
            sock.close()


def _without_fault(made: Any) -> Any:
    if isinstance(made, str):
        raise RuntimeError(made)
    return made


class StreamProcess:
    """The process of one worker: started for the first stream, and again where it has ended, as it does when idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def open(self, described: Described, given: Format, wanted: Format) -> RowStream:
        """Begin a stream of a model's rows; on any thread. Raises NotReady where the process does not start."""
        fault: Exception | None = None
        for _ in range(2):
            control: socket.socket | None = None
            ours: list[socket.socket] = []
            theirs: list[socket.socket] = []
            try:
                for _ in range(3):
                    for side, each in zip((ours, theirs), socket.socketpair(), strict=True):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
                        side.append(each)
                with self._lock:  # two that start it at once would leave one that nobody ends
                    control = self._control = self._control or self._start()
                    socket.send_fds(control, [b"\0"], [each.fileno() for each in theirs])
                for each in theirs:
                    each.close()  # the child has its own: only with these closed is its death the end of a message
                ours[2].settimeout(_START_S)
                send(ours[2], (described, given, wanted))
                receive(ours[2])  # it has begun
                ours[2].settimeout(None)
            except (OSError, EOFError) as error:  # it was just about to end, or was killed
                fault = error
                for each in (*ours, *theirs):
                    each.close()
                with self._lock:
                    if control is self._control:  # else another stream has replaced it already
                        self._end()
            else:
                return RowStream(*ours)
        log.error("the process for streams of rows does not start: %s", str(fault) or repr(fault))
        raise NotReady("rows in bulk can't be read now: come back later")

    def _start(self) -> socket.socket:
        control, theirs = socket.socketpair()
        with theirs, ExitStack() as unless_started:
            unless_started.callback(control.close)
            self._process = subprocess.Popen(  # noqa: S603  nothing in it comes from outside
                [sys.executable, "-m", "serving.bulk.stream_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                # Arrow's other allocators reserve gigabytes of addresses, of which its children may have few.
                env=bare_environment() | {"ARROW_DEFAULT_MEMORY_POOL": "system"},
            )
            theirs.close()
            control.settimeout(_START_S)
            if not control.recv(1):
                raise EOFError
            unless_started.pop_all()
        return control

    def _end(self) -> None:
        """Let it end with the streams that it has."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self._control = self._process = None
