"""How the C library keeps memory that is free: bounded, so that a large body goes when its request ends."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_OWN_PAGES_FROM = 4 * 1024 * 1024
_MOST_FREE_AT_THE_END = 4 * 1024 * 1024


def give_back_soon() -> None:
    """Have each large block returned to the system as soon as it is free, where the C library can (glibc).

    Left alone, glibc learns from the first large block that is freed to take the next ones, up to 32 MiB, from the
    heap, where whatever small thing comes to lie behind one keeps it: a few bodies at the limit cost 40 MiB for ever.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _OWN_PAGES_FROM)
        set_option(_M_TRIM_THRESHOLD, _MOST_FREE_AT_THE_END)
