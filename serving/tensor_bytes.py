"""Tensors as raw bytes, both ways: binary tensors over HTTP and raw contents over gRPC are the same bytes.

Numbers are C-ordered and little-endian; each element of a BYTES tensor stands behind its length, 4 bytes,
little-endian. Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html.
"""

from __future__ import annotations

import mmap
import struct
from typing import TypeAlias

import numpy as np

from serving.errors import InvalidRequest
from serving.pages import pages
from serving.tensors import NUMPY, Array, count

Text: TypeAlias = bytes | bytearray | mmap.mmap
"""What can be searched as bytes can, and whose slices are bytes, or a bytearray."""
Buffer: TypeAlias = Text | memoryview

_length = struct.Struct("<I")
_ALIGNMENT = 64
_FILLED = 16384
"""Strings that are put into a tensor at a time."""
_OWN_PAGES_FROM = 4 * 1024 * 1024
"""Bytes from which numpy asks for huge pages: the first byte in each has 2 MB cleared, which may take 5 ms."""


class Gathered:
    """A body of raw tensors that arrives in pieces, put together once, where onnxruntime can read it in place.

    Takes pieces until `length` bytes are there; `len()` says how many are.

    The last tensor of a body ends where the body ends, so the buffer is placed such that its end is aligned: then
    the last tensor, in most requests the only one, starts at a multiple of its element size and needs no copy. The
    memory is not touched before bytes come, so that a head alone, however much it announces, takes none.
    """

    __slots__ = ("_place", "_view", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        store = (
            np.frombuffer(pages(length + _ALIGNMENT), np.uint8)
            if length >= _OWN_PAGES_FROM
            else np.empty(length + _ALIGNMENT, np.uint8)
        )
        start = -(store.ctypes.data + length) % _ALIGNMENT
        self._view = memoryview(store.data)[start : start + length]
        self._place = 0

    def __len__(self) -> int:
        return self._place

    def add(self, piece: Buffer) -> None:
        """Take the next piece; all pieces together have `length` bytes."""
        end = self._place + len(piece)
        self._view[self._place : end] = piece
        self._place = end

    def whole(self) -> memoryview:
        """Return the body, once it is complete."""
        return self._view


def read(raw: Buffer, datatype: str, shape: tuple[int, ...], at: str) -> Array:
    """Make the array of a tensor's bytes; numbers are a view of `raw`, without a copy where it is aligned.

    Raises InvalidRequest, naming `at`, where the bytes are not exactly what datatype and shape take.
    """
    if datatype == "BYTES":
        return _read_strings(raw, shape, at)
    dtype = NUMPY[datatype]
    due = count(shape) * dtype.itemsize
    if len(raw) != due:
        raise InvalidRequest(f"{at}: has {len(raw)} bytes, and {datatype} {list(shape)} takes {due}")
    if datatype == "BOOL":
        flags = np.frombuffer(raw, np.uint8)
        if flags.size and flags.max() > 1:
            raise InvalidRequest(f"{at}: a BOOL is one byte, 0 or 1, and there are others")
    array: Array = np.frombuffer(raw, dtype).reshape(shape)
    # A model's kernels may load whole vectors of elements: those must lie where elements may.
    return array if array.flags.aligned else array.copy()


def _read_strings(raw: Buffer, shape: tuple[int, ...], at: str) -> Array:
    due = count(shape)
    if due * _length.size > len(raw):
        raise InvalidRequest(f"{at}: {len(raw)} bytes can't hold the {due} elements of shape {list(shape)}")
    texts: list[str] = []
    place, end = 0, len(raw)
    while place < end:
        start = place + _length.size
        if start > end:
            raise InvalidRequest(f"{at}: is cut short in the length of element {len(texts)}")
        place = start + _length.unpack_from(raw, start - _length.size)[0]
        if place > end:
            raise InvalidRequest(f"{at}: element {len(texts)} is said to be longer than what follows")
        if len(texts) == due:
            raise InvalidRequest(f"{at}: has more elements than shape {list(shape)} holds, which is {due}")
        texts.append(text(raw[start:place], f"{at}: element {len(texts)}"))
    if len(texts) != due:
        raise InvalidRequest(f"{at}: has {len(texts)} elements, and shape {list(shape)} holds {due}")
    return strings(texts, shape)


def text(raw: Buffer, at: str) -> str:
    """Read one element of a BYTES tensor. Raises InvalidRequest where it is not UTF-8."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{at} is not UTF-8, and this model takes text") from None


def strings(texts: list[str], shape: tuple[int, ...]) -> Array:
    """Make a BYTES tensor of its elements in C order."""
    array: Array = np.empty(len(texts), dtype=object)
    for at in range(0, len(texts), _FILLED):  # all at once, millions would keep other threads waiting
        array[at : at + _FILLED] = texts[at : at + _FILLED]
    return array.reshape(shape)


def view(array: Array) -> bytes | memoryview:
    """Return a tensor's bytes as they lie in memory, for large ones; a copy only where they do not lie in a row."""
    if array.dtype.hasobject or not array.flags.c_contiguous:
        return write(array)
    return array.reshape(-1).view(np.uint8).data


def write(array: Array) -> bytes:
    """Write a tensor's bytes.

    >>> write(np.array([1, 2], np.int16)), write(np.array(["a"], object))
    (b'\\x01\\x00\\x02\\x00', b'\\x01\\x00\\x00\\x00a')
    """
    if not array.dtype.hasobject:
        return array.tobytes()
    parts: list[bytes] = []
    for value in array.ravel().tolist():
        encoded = value.encode()
        parts += (_length.pack(len(encoded)), encoded)
    return b"".join(parts)
