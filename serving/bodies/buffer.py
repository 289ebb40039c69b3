"""Memory for a long body that arrives in pieces."""

from __future__ import annotations

import numpy as np

from serving.linux.memory import own_pages
from serving.tensor_bytes import Buffer

_ALIGNMENT = 64
OWN_PAGES_FROM = 1024 * 1024
"""Bytes of a body from which it gets pages of its own, which the system takes back as soon as it is freed."""


class BodyBuffer:
    """A body of `length` bytes at the most, put together once; `len()` says how many have come.

    A tensor of raw bytes ends where its body ends, so the buffer is placed such that its end is aligned: then the last
    tensor, in most requests the only one, starts at a multiple of its element size and needs no copy. The memory is
    not touched before bytes come, so that a head alone, however much it announces, takes none.
    """

    __slots__ = ("_place", "_view", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        if length < OWN_PAGES_FROM:
            store = memoryview(np.empty(length + _ALIGNMENT, np.uint8).data)
        else:
            store = memoryview(own_pages(length + _ALIGNMENT))
        start = -(np.frombuffer(store, np.uint8).ctypes.data + length) % _ALIGNMENT
        self._view = store[start : start + length]
        self._place = 0

    def __len__(self) -> int:
        return self._place

    def add(self, piece: Buffer) -> None:
        """Take the next piece; all pieces together have `length` bytes at the most."""
        end = self._place + len(piece)
        self._view[self._place : end] = piece
        self._place = end

    def received(self) -> memoryview:
        """Return what has come."""
        return self._view[: self._place]
