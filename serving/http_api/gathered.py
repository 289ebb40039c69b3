"""A body of raw tensors that arrives in pieces, put together once, where onnxruntime can read it in place."""

from __future__ import annotations

import numpy as np

_ALIGNMENT = 64


class Gathered:
    """Takes pieces until `length` bytes are there; `len()` says how many are.

    The last tensor of a body ends where the body ends, so the buffer is placed such that its end is aligned: then
    the last tensor, in most requests the only one, starts at a multiple of its element size and needs no copy. The
    memory is not touched before bytes come, so that a head alone, however much it announces, takes none.
    """

    __slots__ = ("_place", "_view")

    def __init__(self, length: int) -> None:
        store = np.empty(length + _ALIGNMENT, np.uint8)
        start = -(store.ctypes.data + length) % _ALIGNMENT
        self._view = memoryview(store.data)[start : start + length]
        self._place = 0

    def __len__(self) -> int:
        return self._place

    def add(self, piece: bytes) -> None:
        """Take the next piece; all pieces together have `length` bytes."""
        end = self._place + len(piece)
        self._view[self._place : end] = piece
        self._place = end

    def whole(self) -> memoryview:
        """Return the body, once it is complete."""
        return self._view
