"""Long arrays as JSON, written by the piece, for a thread: between pieces the event loop gets the interpreter."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from serving.http_api.strict_json import dumps
from serving.tensor_bytes import HANDOVER_S
from serving.tensors import Array

PIECE = 4096
"""Elements that are written at a time, in about a quarter of a millisecond."""
CHARACTERS = 64 * 1024
"""The same for strings."""
_WORK_BYTES = 16 * 1024
"""Bytes that are written without giving way."""
_PART_BYTES = 64 * 1024
"""Bytes of a part, at least: each is sent by itself."""


def in_pieces(array: Array, *, doubles: bool = False) -> Iterator[bytes]:
    """Write an array, nested as it is shaped, or the only element of one without dimensions; for `gathered`.

    doubles: numbers are written as Python's own are, which looks otherwise where FP32 are large or small.
    """
    if not array.ndim:
        yield from _written(array.reshape(1), doubles)
        return
    yield b"["
    yield from elements(array, doubles=doubles)
    yield b"]"


def elements(array: Array, *, doubles: bool = False) -> Iterator[bytes]:
    """Write what is inside the brackets of an array."""
    inner = array.size // max(1, len(array))
    if inner > PIECE:
        for index, part in enumerate(array):
            if index:
                yield b","
            yield from in_pieces(part, doubles=doubles)
        return
    step = PIECE // max(1, inner)
    for at in range(0, len(array), step):
        if at:
            yield b","
        yield from _written(array[at : at + step], doubles)


def _written(part: Array, doubles: bool) -> Iterator[bytes]:
    """Write some elements, without brackets; strings one by one where they are long."""
    if not part.dtype.hasobject:
        text = dumps(part if part.flags.c_contiguous else part.copy())
        yield (dumps(orjson.loads(text)) if doubles else text)[1:-1]
        return
    values = part.tolist()
    if sum(map(len, part.ravel().tolist())) > CHARACTERS:
        yield from _texts(values)
    else:
        yield dumps(values)[1:-1]


def _texts(values: list[Any]) -> Iterator[bytes]:
    for index, value in enumerate(values):
        if index:
            yield b","
        if isinstance(value, list):
            yield b"["
            yield from _texts(value)
            yield b"]"
        else:
            yield b'"'
            yield from _text(value)
            yield b'"'


def _text(text: str) -> Iterator[bytes]:
    """Write what is inside the quotes of a string."""
    for at in range(0, len(text), CHARACTERS):
        yield dumps(text[at : at + CHARACTERS])[1:-1]


def gathered(pieces: Iterable[bytes]) -> list[bytes]:
    """Join pieces into parts that are worth sending by themselves; sleeps a moment after as much as a piece."""
    made: list[bytes] = []
    some: list[bytes] = []
    size = rested = 0
    for piece in pieces:
        some.append(piece)
        size += len(piece)
        if size >= rested + _WORK_BYTES:
            time.sleep(HANDOVER_S)
            rested = size
        if size >= _PART_BYTES:
            made.append(b"".join(some))
            some, size, rested = [], 0, 0
    if some:
        made.append(b"".join(some))
    return made
