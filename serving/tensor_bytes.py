"""Tensors as raw bytes, both ways: binary tensors over HTTP and raw contents over gRPC are the same bytes.

Numbers are C-ordered and little-endian; each element of a BYTES tensor stands behind its length, 4 bytes,
little-endian. Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from serving.errors import InvalidRequest
from serving.pages import GivenBack, Pages, give_back_later, pages, wait_for_room
from serving.tensors import NUMPY, Array, count

Text: TypeAlias = bytes | bytearray | mmap.mmap
"""What can be searched as bytes can, and whose slices are bytes, or a bytearray."""
Buffer: TypeAlias = Text | memoryview

_length = struct.Struct("<I")
_ALIGNMENT = 64
HANDOVER_S = 20e-6
"""Seconds that a thread sleeps between pieces: the event loop gets the interpreter at once, and need not ask for it."""
MOST_STRINGS = 4096
"""Strings that are worked on at a time: a millisecond's work at the most."""
_MOST_CHARACTERS = 64 * 1024
"""The same for long strings."""
_REFERENCE = np.dtype(object).itemsize
_FEW, _MANY = 256, 16 * 1024
_LONG_BYTES = 64 * 1024
"""Bytes of a tensor from which its strings are made, written and let go of by the piece."""
_WEIGHT = 16 * 1024 * 1024
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


class LongStrings(np.ndarray[Any, Any]):
    """A BYTES tensor of so many strings, or so long ones, that they are let go of by the piece, on a thread.

    Its references lie in pages of its own, which come as they are filled: numpy alone would write a None in each place
    first, all at once. So it is this class, and not numpy, that lets go of what they refer to.

    Its `nbytes` says that it is large, however few its strings are: what has to do with it does not go to the loop.
    """

    @property
    def nbytes(self) -> int:
        """Bytes, at least: as many as the largest body has."""
        return max(_WEIGHT, super().nbytes)

    def __del__(self, later: Callable[[GivenBack], None] = give_back_later, pages: type[Pages] = Pages) -> None:
        """Come to life again, for the thread, unless it is only a view; Python calls this once."""
        if isinstance(self.base, pages):
            later(self)

    def __array_function__(self, function: Any, types: Any, given: Any, named: Any) -> Any:
        """Be put behind others, as a batch is, by the piece."""
        if function is np.concatenate and len(given) == 1 and not named:
            return joined(list(given[0]))
        return super().__array_function__(function, types, given, named)

    def give_back(self) -> None:
        """Let go of the strings; sleeps in between."""
        flat = self.reshape(-1)
        step = MOST_STRINGS if flat.size > _MANY else _FEW  # few may be long
        for at in range(0, flat.size, step):
            flat[at : at + step] = None
            time.sleep(HANDOVER_S)


class Filling:
    """A tensor of many strings that is made by the piece; for a thread, which sleeps."""

    __slots__ = ("_flat", "array", "place")

    def __init__(self, shape: tuple[int, ...]) -> None:
        wait_for_room()
        self.array = LongStrings(shape, object, pages(_REFERENCE * count(shape)))
        self._flat = self.array.reshape(-1)
        self.place = 0
        """Strings that are there."""

    def add(self, texts: list[str] | Array) -> None:
        """Take the next strings, in C order; sleeps a moment after some."""
        rest = texts if isinstance(texts, list) else texts.ravel()
        for at in range(0, len(rest), MOST_STRINGS):
            piece = rest[at : at + MOST_STRINGS]
            self._flat[self.place : self.place + len(piece)] = piece
            self.place += len(piece)
            time.sleep(HANDOVER_S)


def joined(parts: list[Array]) -> Array:
    """Put arrays together along their first dimension, strings by the piece; the list is empty afterwards.

    Raises ValueError where the other dimensions differ.
    """
    first = parts[0]
    if len(parts) == 1 or not first.dtype.hasobject:
        return parts.pop() if len(parts) == 1 else np.concatenate(parts)
    if any(part.shape[1:] != first.shape[1:] for part in parts):
        raise ValueError("parts have different shapes")
    filling = Filling((sum(map(len, parts)), *first.shape[1:]))
    parts.reverse()
    while parts:
        filling.add(parts.pop())
    return filling.array


def room(size: int) -> Array:
    """Make an array for `size` strings, which are let go of by the piece where they are many."""
    return Filling((size,)).array if size > MOST_STRINGS else np.empty(size, object)


def string_pieces(array: Array) -> Iterator[list[str]]:
    """Give the elements of a BYTES tensor in C order, some at a time; sleeps in between."""
    for piece in _cut(array):
        texts = piece.tolist()
        start = characters = 0
        for end, text in enumerate(texts):
            characters += len(text)
            if characters > _MOST_CHARACTERS and end > start:
                yield texts[start:end]
                time.sleep(HANDOVER_S)
                start, characters = end, len(text)
        yield texts[start:]
        time.sleep(HANDOVER_S)


def _cut(array: Array) -> Iterator[Array]:
    flat = array.ravel()
    for at in range(0, flat.size, MOST_STRINGS):
        yield flat[at : at + MOST_STRINGS]


def _read_strings(raw: Buffer, shape: tuple[int, ...], at: str) -> Array:
    due, end = count(shape), len(raw)
    if due * _length.size > end:
        raise InvalidRequest(f"{at}: {end} bytes can't hold the {due} elements of shape {list(shape)}")
    texts: list[str] = []
    filling = Filling(shape) if end > _LONG_BYTES else None
    most = due if filling is None else min(due, MOST_STRINGS)
    place = done = 0
    while place < end:
        start = place + _length.size
        if start > end:
            raise InvalidRequest(f"{at}: is cut short in the length of element {done + len(texts)}")
        place = start + _length.unpack_from(raw, start - _length.size)[0]
        if place > end:
            raise InvalidRequest(f"{at}: element {done + len(texts)} is said to be longer than what follows")
        if len(texts) == most:
            if filling is None or done + most == due:
                raise InvalidRequest(f"{at}: has more elements than shape {list(shape)} holds, which is {due}")
            filling.add(texts)
            texts = []
            done = filling.place
            most = min(MOST_STRINGS, due - done)
        try:
            texts.append(str(raw[start:place], "utf-8"))
        except UnicodeDecodeError:
            raise _no_text(f"{at}: element {done + len(texts)}") from None
    if done + len(texts) != due:
        raise InvalidRequest(f"{at}: has {done + len(texts)} elements, and shape {list(shape)} holds {due}")
    if filling is None:
        return strings(texts, shape)
    filling.add(texts)
    return filling.array


def text(raw: Buffer, at: str) -> str:
    """Read one element of a BYTES tensor. Raises InvalidRequest where it is not UTF-8."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise _no_text(at) from None


def _no_text(at: str) -> InvalidRequest:
    return InvalidRequest(f"{at} is not UTF-8, and this model takes text")


def strings(texts: list[str], shape: tuple[int, ...]) -> Array:
    """Make a BYTES tensor of its elements in C order; of many by the piece."""
    if len(texts) > MOST_STRINGS:
        filling = Filling(shape)
        filling.add(texts)
        return filling.array
    array: Array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(shape)


def in_parts(array: Array) -> list[bytes | memoryview]:
    """Return a large tensor's bytes in parts: numbers as they lie in memory, strings as they are written by the piece.

    A copy only of numbers that do not lie in a row. Sleeps between pieces of strings.
    """
    if array.dtype.hasobject:
        return [_written(texts) for texts in string_pieces(array)]
    if not array.flags.c_contiguous:
        return [write(array)]
    return [array.reshape(-1).view(np.uint8).data]


def write(array: Array) -> bytes:
    """Write a tensor's bytes.

    >>> write(np.array([1, 2], np.int16)), write(np.array(["a"], object))
    (b'\\x01\\x00\\x02\\x00', b'\\x01\\x00\\x00\\x00a')
    """
    if not array.dtype.hasobject:
        return array.tobytes()
    return _written(array.ravel().tolist())


def _written(texts: list[str]) -> bytes:
    parts: list[bytes] = []
    for value in texts:
        encoded = value.encode()
        parts += (_length.pack(len(encoded)), encoded)
    return b"".join(parts)
