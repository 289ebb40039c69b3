"""Memory that goes back to the system once it is free, whatever the C library (glibc) would like to keep."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_OWN_PAGES_FROM = 2 * 1024 * 1024
_MOST_FREE_AT_THE_END = 4 * 1024 * 1024
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python names from 3.13 on."""


def bound_free_memory() -> None:
    """Have each large block returned to the system as soon as it is free; to be called before there are threads.

    Left alone, glibc takes blocks of up to 32 MiB from the heap once it has seen one freed, and any small block behind
    such a one keeps it there: a few bodies at the limit would cost 40 MiB for good. A body that grows on the heap is
    copied again and again (9 ms for 15 MB), where pages of its own are only moved. And each thread with a heap of its
    own, as every thread that loads a version would have, keeps what is below the top of it.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _OWN_PAGES_FROM)
        set_option(_M_TRIM_THRESHOLD, _MOST_FREE_AT_THE_END)
        set_option(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Give memory that is free back to the system; others that allocate wait meanwhile, for a millisecond or so."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def private_memory() -> int:
    """Return the bytes of memory that this process has for itself alone; 0 where the system does not say."""
    try:
        pages, shared = Path("/proc/self/statm").read_text().split()[1:3]
    except OSError:
        return 0
    return (int(pages) - int(shared)) * mmap.PAGESIZE


def own_pages(size: int) -> mmap.mmap:
    """Map memory, which takes none before it is touched.

    In small pages: the first byte in a huge one has 2 MB cleared, which may hold the event loop for 5 ms.
    """
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    with contextlib.suppress(AttributeError, OSError):  # a system or kernel without huge pages
        made.madvise(mmap.MADV_NOHUGEPAGE)
    return made
