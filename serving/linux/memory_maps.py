"""The pages of a file that this process maps: to unmap them in small steps, before their owner does it in one."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

_MOST_MAPS_BYTES = 1024 * 1024
"""Of the list of mappings that is looked at: ten thousand."""

Range: TypeAlias = tuple[int, int]
"""Address of the first byte, and of the first one behind."""


def mapped_ranges(file: Path) -> set[Range]:
    """Return where a file is mapped now; nothing where the system does not tell."""
    text = _maps()
    # Looked for and not split into its thousand lines: meanwhile the event loop would wait for the interpreter.
    end_of_line = os.fsencode(file) + b"\n"
    found = set()
    at = text.find(end_of_line)
    while at >= 0:
        first, _, behind = text[text.rfind(b"\n", 0, at) + 1 : at].partition(b" ")[0].partition(b"-")
        found.add((int(first, 16), int(behind, 16)))
        at = text.find(end_of_line, at + 1)
    return found


def _maps() -> bytes:
    """Read this process's mappings with one call into C; nothing where the system does not tell.

    The system gives a page of them at a time: Python would release the interpreter's lock for each read, and take it
    back before the event loop, which waits for it, had woken.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "fopen"):
        return b""
    library.fopen.restype = ctypes.c_void_p
    file = library.fopen(b"/proc/self/maps", b"r")
    if not file:
        return b""
    try:
        buffer = ctypes.create_string_buffer(_MOST_MAPS_BYTES)
        library.fread.restype = ctypes.c_size_t
        size = library.fread(buffer, 1, len(buffer), ctypes.c_void_p(file))
        return ctypes.string_at(buffer, size)
    finally:
        library.fclose(ctypes.c_void_p(file))


def added(before: set[Range], after: set[Range]) -> list[Range]:
    """Return the ranges that are new, whole ones only: one that grew is partly somebody else's.

    >>> added({(0, 4), (8, 12)}, {(0, 4), (8, 16), (20, 24)})
    [(20, 24)]
    """
    return sorted(new for new in after - before if all(new[1] <= old[0] or old[1] <= new[0] for old in before))


def discard(pages: Iterable[Range]) -> None:
    """Give mapped pages back to the system, range by range; the interpreter is free meanwhile.

    Whoever touches one later gets it from the file again, without what was written there.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        for first, behind in pages:
            advise(ctypes.c_void_p(first), ctypes.c_size_t(behind - first), mmap.MADV_DONTNEED)


def release(owner: object, pages: Iterable[Range]) -> None:
    """Drop the last reference to an object that maps `pages`, and unmaps them at its end, without holding up others.

    That end would take milliseconds with the interpreter's lock held, nearly all of it for pages that were touched:
    those go first, and on a thread of their own, for this may be called on the event loop.
    """

    def end(held: list[object]) -> None:
        discard(pages)
        held.clear()

    # In a list that is cleared there: a frame here that still knew the object would end it here.
    with contextlib.suppress(RuntimeError):  # the process ends
        threading.Thread(target=end, args=([owner],), name="unmap", daemon=True).start()
