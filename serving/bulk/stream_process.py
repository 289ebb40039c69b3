"""The process that reads and writes streams of rows: what it computes takes no turn of an interpreter that serves.

It loads Arrow once, and forks for each stream a child that ends with it. Beside live requests a child has the processor
only when nobody else wants it, which it may as it holds no lock that others wait for.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import pyarrow as pa

from serving.bodies.exchange import receive, send
from serving.bulk import answers, arrow, text  # noqa: F401  for the children
from serving.bulk.formats import Format, answer_form, reader
from serving.engine.signature import Described
from serving.errors import PayloadTooLarge, ServingError
from serving.linux.limits import confine

IDLE_S = 60.0
"""Without a stream; then it ends."""
_AT_ONCE = 5 << 17
"""Bytes with which a reader is content: with those that come in one go they are a block of text at most."""
_LINGER_S = 0.01
"""How long what has come waits for more: rows that come one by one are answered so, and all others by the thousand."""
_MEMORY_BYTES = 1 << 30
"""Of one stream, as a last resort: what readers take is bounded by what they read at a time."""


def main(descriptor: int) -> None:
    """Serve a stream for each three sockets that come, until the worker closes this one, or none has come for long."""
    control = socket.socket(fileno=descriptor)
    # The worker decides when it ends: while a server drains, its processes may all be sent SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pa.set_cpu_count(1)  # it is not asked to use more, and the stacks of many are memory that a stream may not have
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child that has ended stays as a zombie
    gc.freeze()  # what is loaded is shared with the children: no collection of theirs should touch it
    control.settimeout(IDLE_S)
    control.send(b"\0")  # it has started
    while True:
        try:
            given, descriptors, _, _ = socket.recv_fds(control, 1, 3)
        except TimeoutError:
            if not _children():
                return
            continue
        if not given:
            return
        if os.fork() == 0:
            try:
                control.close()  # or the worker's end would not be seen here for as long as a stream goes on
                serve(*(socket.socket(fileno=each) for each in descriptors))
            finally:
                os._exit(0)  # and not back into the loop, whatever was raised
        for each in descriptors:
            os.close(each)  # or the worker would wait for a stream whose child has died


def _children() -> bool:
    """Tell whether there are any that have not ended."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def serve(body: socket.socket, batches: socket.socket, answered: socket.socket) -> None:
    """Read the rows of one stream, and write its answers, until the worker closes the sockets.

    body: bytes as the client sends them. batches: takes each Batch, and None at the end, or what went wrong. answered:
    brings whether others have live requests, what became of rows, and at the end how many; takes the bytes to write.
    """
    confine(_MEMORY_BYTES)
    with contextlib.suppress(OSError, EOFError):
        described, given, wanted = receive(answered)
        aside = False
        _schedule(aside)
        threading.Thread(target=_read, args=(body, batches, described, given), daemon=True).start()
        form = answer_form(wanted, described)
        before = form.head()
        send(answered, None)  # it has begun
        while True:
            result: Any
            try:
                beside_live, scored, counts = receive(answered)
                if beside_live != aside:
                    aside = beside_live
                    _schedule(aside)
                made = [before, *[form.written(*each) for each in scored]]
                result = b"".join(made if counts is None else [*made, form.tail(*counts)])
                before = b""
            except (OSError, EOFError):
                raise
            except Exception:
                result = traceback.format_exc()
            send(answered, result)


def _schedule(aside: bool) -> None:
    """Have all threads of this process run only when nobody else wants the processor, or as batch jobs that share it.

    Who is not root may not come back from the former, and stays behind all others until the stream ends.
    """
    if sys.platform == "linux":
        policy = os.SCHED_IDLE if aside else os.SCHED_BATCH
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def _read(body: socket.socket, batches: socket.socket, described: Described, kind: Format) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        send(batches, _result_of_reading(body, batches, described, kind))


def _result_of_reading(body: socket.socket, batches: socket.socket, described: Described, kind: Format) -> Any:
    try:
        for batch in reader(kind, _Body(body), described):  # type: ignore[arg-type]  # nobody seeks
            send(batches, batch)
    except ServingError as error:
        return error.bare()
    except MemoryError:
        return PayloadTooLarge("these rows take more memory than they may: send fewer at a time")
    except Exception:
        return traceback.format_exc()
    return None


class _Body:
    """The bytes of a stream as a file."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._came = b""
        self._read = 0  # bytes of it

    def read(self, size: int) -> bytes:
        """Give some bytes, none at the end."""
        if self._read >= len(self._came):
            self._came, self._read = self._gather(), 0
        begin, self._read = self._read, self._read + size
        return self._came[begin : self._read]

    def _gather(self) -> bytes:
        self._sock.settimeout(None)
        made = [self._sock.recv(_AT_ONCE)]
        until = time.monotonic() + _LINGER_S
        while made[-1] and (room := _AT_ONCE - sum(map(len, made))) > 0 and (left := until - time.monotonic()) > 0:
            self._sock.settimeout(left)
            try:
                made.append(self._sock.recv(room))
            except TimeoutError:
                break
        return b"".join(made)


if __name__ == "__main__":
    main(int(sys.argv[1]))
