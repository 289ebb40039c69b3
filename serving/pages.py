"""Memory for long bodies: pages of its own, given by the system as bytes come, and given back as soon as it is free.

What grows instead (a bytearray) is moved again and again: one of 15 MB held the event loop for 3 ms at a time, and for
as long where it was freed, since Python frees such memory without letting other threads have the interpreter.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

OWN_PAGES_FROM = 1024 * 1024
"""Bytes of a body from which pages of its own cost less than what they spare."""
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE, which Python names from 3.13 on."""


def pages(size: int) -> mmap.mmap:
    """Make room for `size` bytes at the most; none of it is taken before bytes come.

    Small pages: the first byte in a huge one has 2 MB cleared, which may take 5 ms.
    """
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
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

    def whole(self) -> bytes | mmap.mmap:
        """Return the body, once it is complete; bytes where it is short after all."""
        made, size = self._pages, len(self)
        if size < OWN_PAGES_FROM:
            return made[:size]
        if size < len(made):
            made.resize(size)
        made.seek(0)  # `find` begins where writing ended
        return made
