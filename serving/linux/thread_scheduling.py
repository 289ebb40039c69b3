"""Threads that let others have the processor first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, Protocol, TypeVar

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
    """Schedule the calling thread as a batch job: it preempts no other thread when it wakes; its share stays the same.

    Without it, waking up it may push a thread that serves off the processor for a tick of 4 ms.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        _schedule(os.SCHED_BATCH, _LONGEST_NS)


def as_usual() -> None:
    """Undo `give_way` for the calling thread, which has inherited it from the thread that made it."""
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


class Call(Protocol):
    """Has functions run."""

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one, and return what it returns or raise what it raises."""


@contextmanager
def thread_aside() -> Iterator[Call]:
    """Give what runs functions on one thread beside the calling one, which waits for each.

    That thread may be put behind all others. It should be in Python for as short as can be: one that the system
    suspends while it holds the interpreter's lock holds up the event loop.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="load-aside", initializer=as_usual) as pool:

        def call(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
            return pool.submit(function, *args, **kwargs).result()

        yield call
