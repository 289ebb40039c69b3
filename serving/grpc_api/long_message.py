"""Takes a long ModelInferRequest apart: what its tensors hold stays where it lies, and protobuf reads only the rest.

protobuf holds the interpreter, and with it the event loop, from the first byte of a message to its last, and makes an
object of each number. Numbers that are typed are read in pieces, each a message of its own; floats lie in the bytes as
they do in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from serving.errors import InvalidRequest
from serving.grpc_api.fields import field_head, length_at
from serving.grpc_api.messages import message, reader
from serving.tensor_bytes import HANDOVER_S, Buffer
from serving.tensors import NUMPY, Array

_SHORT_BYTES = 4096
"""Contents that protobuf may read with the rest."""
_MOST_FIELDS = 1024
"""Of a message, or of one tensor's contents; whoever sends more is read by protobuf alone, which is faster at it."""
_PIECE_BYTES = 8 * 1024
"""Up to as many numbers, which become objects in a quarter of a millisecond."""
_UNRESTED_BYTES = 64 * 1024
"""Contents that are looked through without a sleep: they may be in a message that is read on the event loop."""
# Tags of length-delimited fields: of a request, of one of its inputs, of contents.
_INPUT, _RAW, _LAST = 0x2A, 0x3A, 0x3A
_CONTENTS, _LAST_OF_INPUT = 0x2A, 0x2A
_BYTES = 0x42
_FIXED = frozenset({0x32, 0x3A})
"""Floats: 4 or 8 bytes each, of which a piece has a whole number."""
PACKED = {"BOOL": 0x0A, "FP32": 0x32, "FP64": 0x3A}
"""Tags of contents that lie packed as they do in memory."""
_NUMBERS = frozenset(range(0x0A, _BYTES, 8))

_read = reader(message("ModelInferRequest"))
_read_contents = reader(message("InferTensorContents"))


class Contents(NamedTuple):
    """Typed contents of one tensor: tags, and what lies packed behind each; with strings, whole fields in a row."""

    runs: tuple[tuple[int, memoryview], ...]

    def as_they_lie(self, datatype: str) -> Array | None:
        """Return all elements without a copy; None where they do not lie in a row as they would in memory."""
        if datatype not in _FLOATS or len(self.runs) != 1:
            return None
        tag, packed = self.runs[0]
        dtype = NUMPY[datatype]
        if tag != PACKED[datatype] or len(packed) % dtype.itemsize:
            return None
        array: Array = np.frombuffer(packed, dtype)
        return array if array.flags.aligned else array.copy()

    def messages(self) -> Iterator[Any]:
        """Give InferTensorContents of some elements each; for a thread, which sleeps between. Raises InvalidRequest."""
        first = True
        for tag, run in self.runs:
            for piece in [run] if tag == _BYTES else _cut(tag, run):
                if not first:
                    time.sleep(HANDOVER_S)
                first = False
                yield _read_contents(bytes(piece) if tag == _BYTES else b"".join((field_head(tag, len(piece)), piece)))


_FLOATS = frozenset({"FP32", "FP64"})


class Bulk(NamedTuple):
    """What was taken out of a request: its raw contents, and long typed ones by the index of their input."""

    raws: list[memoryview]
    typed: dict[int, Contents]


def parsed(request: Buffer) -> tuple[Any, Bulk | None]:
    """Read the protobuf message, and what was taken out of a long one. Raises InvalidRequest."""
    apart = _apart(memoryview(request)) if len(request) > _SHORT_BYTES else None
    if apart is None:
        return _read(bytes(request)), None
    return _read(apart[0]), apart[1]


def _apart(request: memoryview) -> tuple[bytes, Bulk] | None:
    """Cut a request into a short one and its bulk; None for one of another form, wrong or right."""
    rest: list[bytes | memoryview] = []
    raws: list[memoryview] = []
    typed: dict[int, Contents] = {}
    index = 0
    try:
        for tag, whole, inside in _fields(request, _LAST):
            if tag == _RAW:
                raws.append(inside)
                continue
            if tag == _INPUT:
                if len(inside) > _SHORT_BYTES:
                    bare, contents = _input(inside)
                    if contents is not None:
                        typed[index] = contents
                        whole = memoryview(field_head(_INPUT, len(bare)) + bare)  # noqa: PLW2901
                index += 1
            rest.append(whole)
    except IndexError:
        return None
    return b"".join(rest), Bulk(raws, typed)


def _input(tensor: memoryview) -> tuple[bytes, Contents | None]:
    """Take the contents out of an input, and leave empty ones. Raises IndexError for one of another form."""
    rest: list[bytes | memoryview] = []
    contents: Contents | None = None
    for tag, whole, inside in _fields(tensor, _LAST_OF_INPUT):
        if tag == _CONTENTS:
            if contents is not None:
                raise IndexError  # protobuf makes one of several
            contents = Contents(tuple(_runs(inside)))
            rest.append(field_head(_CONTENTS, 0))
        else:
            rest.append(whole)
    return b"".join(rest), contents


def _fields(given: memoryview, last: int) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Give tag, whole field and what is inside, where all are length-delimited; else raises IndexError."""
    place, end = 0, len(given)
    for _ in range(_MOST_FIELDS):
        if place == end:
            return
        tag = given[place]
        size, start = length_at(given, place + 1)
        if tag > last or tag & 7 != 2 or start + size > end:
            raise IndexError
        yield tag, given[place : start + size], given[start : start + size]
        place = start + size
    raise IndexError


def _runs(contents: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give packed numbers, and strings by the piece. Raises IndexError for what is of another form."""
    place, end, runs = 0, len(contents), 0
    rest = _UNRESTED_BYTES
    while place < end:
        if place >= rest:
            time.sleep(HANDOVER_S)
            rest = place + _PIECE_BYTES
        tag = contents[place]
        size, start = length_at(contents, place + 1)
        stop = start + size
        if tag == _BYTES:
            while stop - place < _PIECE_BYTES and stop < end and contents[stop] == _BYTES:
                size, start = length_at(contents, stop + 1)
                stop = start + size
            start = place
        elif tag not in _NUMBERS or (runs := runs + 1) > _MOST_FIELDS:
            raise IndexError
        if stop > end:
            raise IndexError
        yield tag, contents[start:stop]
        place = stop


def _cut(tag: int, packed: memoryview) -> Iterator[memoryview]:
    """Cut packed numbers between two of them."""
    start, end = 0, len(packed)
    while start < end:
        cut = min(start + _PIECE_BYTES, end)
        if cut < end and tag not in _FIXED:
            while cut > start and packed[cut - 1] & 0x80:  # the middle of a varint
                cut -= 1
            if cut == start:
                raise InvalidRequest("the bytes are no ModelInferRequest")
        yield packed[start:cut]
        start = cut
