"""Memory for long bodies: pages of its own, given by the system as bytes come, and given back as soon as it is free.

What grows instead (a bytearray) is moved again and again: one of 15 MB held the event loop for 3 ms at a time. And to
give 15 MB back takes as long: a thread of its own does it, whoever lets go of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import queue
import sys
import threading
import time
from typing import Protocol

OWN_PAGES_FROM = 1024 * 1024
"""Bytes of a body from which pages of its own cost less than what they spare."""
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python names from 3.13 on."""
_GIVEN_BACK = 2 * 1024 * 1024
"""Bytes that are given back at a time: while all of it goes, nobody in the process can map memory."""


_MOST_WAITING = 8
"""Things that wait for the thread; who lets go of more pages gives them back itself, for memory is bounded."""
_FEW_WAITING = 3
_WAIT_S = 0.001


class GivenBack(Protocol):
    """What takes long to let go of."""

    def give_back(self) -> None:
        """Let go of all of it by the piece; on a thread."""


_free: queue.SimpleQueue[GivenBack] = queue.SimpleQueue()


def give_back_later(thing: GivenBack, waiting: queue.SimpleQueue[GivenBack] = _free) -> None:
    """Have the thread give back what nobody holds any more: called in `__del__`, this brings it to life again."""
    waiting.put(thing)


def wait_for_room() -> None:
    """Wait, on a thread that makes what will have to be given back, until little waits for that."""
    while _free.qsize() >= _FEW_WAITING:
        time.sleep(_WAIT_S)


class Pages(mmap.mmap):
    """Memory that a thread gives back once nobody holds it."""

    def __del__(self, waiting: queue.SimpleQueue[GivenBack] = _free) -> None:
        """Come to life again, for the thread; Python calls this once."""
        if waiting.qsize() < _MOST_WAITING:
            waiting.put(self)

    def give_back(self) -> None:
        """Give the memory back to the system."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self))
        for at in range(0, len(self), _GIVEN_BACK):
            # Python's own `madvise` would keep the interpreter meanwhile.
            _advise(start + at, min(_GIVEN_BACK, len(self) - at), mmap.MADV_DONTNEED)


_advise = ctypes.CDLL(None).madvise
_advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _give_back() -> None:
    while True:
        done = _free.get()
        done.give_back()
        del done


@functools.cache
def _start() -> None:
    threading.Thread(target=_give_back, name="give-back", daemon=True).start()


def pages(size: int) -> Pages:
    """Make room for `size` bytes at the most; none of it is taken before bytes come.

    Small pages: the first byte in a huge one has 2 MB cleared, which may take 5 ms.
    """
    _start()
    made = Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            made.madvise(mmap.MADV_NOHUGEPAGE)
    return made


class GatheredText:
    """A body of text that arrives in pieces, `most` bytes of it; `len()` says how many are there."""

    __slots__ = ("_pages", "add")

    def __init__(self, most: int) -> None:
        self._pages = pages(most)
        self.add = self._pages.write
        """Take the next piece; all pieces together have `most` bytes at the most."""

    def __len__(self) -> int:
        return self._pages.tell()

    def whole(self) -> bytes | Pages:
        """Return the body, once it is complete; bytes where it is short after all."""
        made, size = self._pages, len(self)
        if size < OWN_PAGES_FROM:
            return made[:size]
        if size < len(made):
            made.resize(size)
        made.seek(0)  # `find` begins where writing ended
        return made
