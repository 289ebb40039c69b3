"""Tensors as raw bytes, both ways: binary tensors over HTTP and raw contents over gRPC are the same bytes.

Numbers are C-ordered and little-endian; each element of a BYTES tensor stands behind its length, 4 bytes,
little-endian. Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import numpy as np

from serving.errors import InvalidRequest
from serving.tensors import NUMPY, Array, count

Buffer: TypeAlias = bytes | bytearray | memoryview

_length = struct.Struct("<I")


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
    due, end = count(shape), len(raw)
    if due * _length.size > end:
        raise InvalidRequest(f"{at}: {end} bytes can't hold the {due} elements of shape {list(shape)}")
    texts: list[str] = []
    place = 0
    while place < end:
        start = place + _length.size
        if start > end:
            raise InvalidRequest(f"{at}: is cut short in the length of element {len(texts)}")
        place = start + _length.unpack_from(raw, start - _length.size)[0]
        if place > end:
            raise InvalidRequest(f"{at}: element {len(texts)} is said to be longer than what follows")
        if len(texts) == due:
            raise InvalidRequest(f"{at}: has more elements than shape {list(shape)} holds, which is {due}")
        try:
            texts.append(str(raw[start:place], "utf-8"))
        except UnicodeDecodeError:
            raise _no_text(f"{at}: element {len(texts)}") from None
    if len(texts) != due:
        raise InvalidRequest(f"{at}: has {len(texts)} elements, and shape {list(shape)} holds {due}")
    return strings(texts, shape)


def text(raw: Buffer, at: str) -> str:
    """Read one element of a BYTES tensor. Raises InvalidRequest where it is not UTF-8."""
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError:
        raise _no_text(at) from None


def _no_text(at: str) -> InvalidRequest:
    return InvalidRequest(f"{at} is not UTF-8, and this model takes text")


def strings(texts: list[str], shape: tuple[int, ...]) -> Array:
    """Make a BYTES tensor of its elements in C order."""
    array: Array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(shape)


def as_it_lies(array: Array) -> memoryview:
    """Return the bytes of numbers; a copy only where they do not lie in a row."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


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
