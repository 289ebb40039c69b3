"""Messages between a worker and its codec process: pickles whose arrays travel beside them, uncopied.

The process is this server's own, started from the same code: pickles never come from anywhere else.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from serving.tensors import Array

_STRINGS = 4096
"""Strings that are pickled together: so many hold the interpreter for a quarter of a millisecond."""
_count = struct.Struct("<I")


class _Pickler(pickle.Pickler):
    """Pickles arrays of strings some at a time: between them other threads get the interpreter."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return _strings, (value.shape, list(_pieces(value)))
        return NotImplemented


def _pieces(array: Array) -> Iterator[bytes]:
    flat = array.ravel()
    for at in range(0, flat.size, _STRINGS):
        yield pickle.dumps(flat[at : at + _STRINGS].tolist(), 5)


def _strings(shape: tuple[int, ...], pieces: list[bytes]) -> Array:
    made = np.empty(shape, object)
    flat = made.reshape(-1)
    place = 0
    for piece in pieces:
        texts = pickle.loads(piece)  # noqa: S301
        flat[place : place + len(texts)] = texts
        place += len(texts)
    return made


def send(sock: socket.socket, value: Any) -> None:
    """Send a message. Raises OSError where the other side has gone, or takes nothing in time."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, 5, buffer_callback=buffers.append).dump(value)
    parts = [stream.getbuffer(), *[buffer.raw() for buffer in buffers]]
    try:
        sock.sendall(_count.pack(len(parts)) + struct.pack(f"<{len(parts)}Q", *map(len, parts)))
        for part in parts:
            sock.sendall(part)
    finally:
        # The garbage collector of CPython 3.11 crashes where it comes upon such a view that was not released.
        for part in parts:
            part.release()


def receive(sock: socket.socket) -> Any:
    """Receive a message. Raises EOFError or OSError where the other side has gone, TimeoutError where it is silent."""
    (count,) = _count.unpack(_read(sock, _count.size))
    sizes = struct.unpack(f"<{count}Q", _read(sock, 8 * count))
    parts = [_read(sock, size) for size in sizes]
    return pickle.loads(parts[0], buffers=parts[1:])  # noqa: S301


def _read(sock: socket.socket, size: int) -> memoryview:
    view = memoryview(np.empty(size, np.uint8).data)  # no bytearray: clearing megabytes would hold the interpreter
    place = 0
    while place < size:
        got = sock.recv_into(view[place:])
        if not got:
            raise EOFError
        place += got
    return view
