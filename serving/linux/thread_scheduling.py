"""Threads that let others have the processor first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""Number of the system call, which the C library has no function for; by `platform.machine()`."""
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""`struct sched_attr` of sched_setattr(2): size, policy, flags, nice, priority, runtime, deadline, period."""
_LONGEST_NS = 100_000_000
"""The longest turn at the processor that Linux lets a thread ask for (since 6.12; before, it asks for nothing)."""


def lowest_priority() -> None:
    """Put the calling thread behind all others; there is no way back."""
    give_way()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def give_way() -> None:
    """Have the calling thread interrupt nobody, and be interrupted by whoever wakes; its share stays the same.

    Without it, one that wakes may push a thread that serves off the processor for a tick of 4 ms.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        _schedule(os.SCHED_BATCH, _LONGEST_NS)


def as_usual() -> None:
    """Undo `give_way` for the calling thread, which it has got from the one that made it."""
    if sys.platform == "linux" and os.sched_getscheduler(os.getpid()) == os.SCHED_OTHER:
        _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, turn_ns: int) -> None:
    """Set policy and length of a turn of the calling thread, as far as the system lets it; 0: the usual length."""
    number = _SCHED_SETATTR.get(platform.machine())
    call = getattr(ctypes.CDLL(None), "syscall", None)
    if number is None or call is None:
        return
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, turn_ns, 0, 0)
    call(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))


class Aside:
    """Runs functions for who calls it: there and then or, where `apart`, on one thread that waits for each.

    That thread may be put behind all others. It should be in Python for as short as can be: one that is put off while
    it holds the interpreter's lock holds up the event loop.
    """

    def __init__(self, *, apart: bool) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load-aside", initializer=as_usual) if apart else None

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what a function returns, or raise what it raises."""
        if self._thread is None:
            return function(*args, **kwargs)
        return self._thread.submit(function, *args, **kwargs).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()
