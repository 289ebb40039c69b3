"""The process that runs codecs over long bodies and answers, so that no event loop waits for them.

It loads neither onnxruntime nor a web framework: only the modules of the codecs that it is sent.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import sys
import traceback
from functools import lru_cache
from typing import Any

from serving.bodies.exchange import receive, send
from serving.errors import PayloadTooLarge, ServingError
from serving.linux.limits import confine

_NICE = 5
"""Below the worker, which answers small requests meanwhile; not last, or nothing long would be read under load."""
_codec = lru_cache(64)(pickle.loads)
"""Makes a codec of what the worker sends: what it decides beforehand takes longer than most bodies."""


def main(descriptor: int, memory_bytes: int) -> None:
    """Do what is asked for until the worker closes the socket: it has ended, or needs this process no longer."""
    sock = socket.socket(fileno=descriptor)
    _confine(memory_bytes)
    with contextlib.suppress(OSError, EOFError):
        # A body may become millions of lists, none of them in a cycle: looking for cycles takes longer than reading it.
        gc.disable()
        gc.freeze()
        send(sock, None)  # it has started
        while True:
            _answer(sock)


def _answer(sock: socket.socket) -> None:
    """Take one task: the codec, what to do, with what."""
    codec, work, given = receive(sock)
    result: tuple[Any, str | None]
    try:
        result = (work(_codec(codec), *given), None)
    except ServingError as error:
        result = (error.bare(), None)
    except MemoryError:
        result = (
            PayloadTooLarge("this takes more memory as text than it may: send less, or the binary protocol"),
            None,
        )
    except Exception:
        result = (None, traceback.format_exc())
    del given
    send(sock, result)
    del result
    gc.collect(1)  # what this task left; a look at all that there is would take milliseconds


def _confine(memory_bytes: int) -> None:
    # The worker decides when it ends: while a server drains, its processes may all be sent SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
    confine(memory_bytes)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
