"""The C library's heap (glibc): how a worker keeps it, and gives back what versions that went have left in it."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8


def one_arena() -> None:
    """Have one heap for all threads to come; called before there are any.

    With one for each, every thread that ever loaded a version keeps pieces of it: the top of a heap that is not the
    first is never given back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Give memory that is free back to the system; others that allocate wait meanwhile, for a millisecond or so."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
