"""Reads a long JSON array of numbers, flat or nested, in pieces, so that other threads get the interpreter in between.

A JSON parser holds the interpreter from its first byte to its last: 16 MB at once would stop the event loop for a
tenth of a second. Pieces that fit the processor's cache are also read twice as fast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import simdjson

from serving.tensor_bytes import HANDOVER_S, Text
from serving.tensors import Array

PIECE_BYTES = 128 * 1024
"""About 0.3 ms of reading."""
_LONGEST_SKELETON = 2048
STAND_IN = [0.5]
"""What the skeleton has in place of the long array; no shape can be this."""
_NO_STRUCTURE = b"0123456789+-.eE \t\r\n" + b"truefals"
_TRUE, _FALSE = b"tf"
_FLAGS = b"truefals,[] \t\r\n"


class Split(NamedTuple):
    """A document whose longest array was taken out: what is left, and where the numbers lie."""

    skeleton: bytes
    start: int
    end: int


def split(body: Text) -> Split | None:
    """Find the long array of a document with three arrays, as a v2 request with one tensor has; else None."""
    first = body.find(b"[", 0, _LONGEST_SKELETON)
    second = body.find(b"[", first + 1, _LONGEST_SKELETON)
    end = body.find(b"]", second + 1, _LONGEST_SKELETON)
    start = second
    if first < 0 or second < 0:
        return None
    if end >= 0 and not nested(body, second + 1):  # the second array is short, the shape: the third is the data
        start = body.find(b"[", end + 1, _LONGEST_SKELETON)
        if start < 0:
            return None
    end = body.rfind(b"]", start, len(body))
    # From the back: ], of the data, then perhaps the shape's, then ] of the inputs.
    end = body.rfind(b"]", max(start, end - _LONGEST_SKELETON), end)
    if start == second:
        end = body.rfind(b"]", max(start, end - _LONGEST_SKELETON), end)
    if end <= start or len(body) - end > _LONGEST_SKELETON:
        return None
    return Split(bytes(body[: start + 1]) + b"0.5" + bytes(body[end:]), start + 1, end)


def nested(body: Text, start: int) -> bool:
    """Tell whether the first element of the array that begins before `start` is an array."""
    return bytes(body[start : start + 64]).lstrip(b" \t\r\n")[:1] == b"["


def numbers(body: Text, start: int, end: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
    """Read the numbers of `shape` that stand between `start` and `end`, flat or nested; None for anything else.

    Floats must be finite; whole numbers must be written as such, and fit. For a thread of its own: it sleeps a moment
    between pieces.
    """
    size = math.prod(shape)
    if size > (end - start + 1) // 2:
        return None
    made = np.empty(size, dtype)
    parser = simdjson.Parser()
    filled = 0
    try:
        for piece in _pieces(body, start, end, shape):
            found = read(parser, piece, dtype.kind)
            if found is None or found.size == 0 or filled + found.size > size:
                return None
            part = made[filled : filled + found.size]
            with np.errstate(over="ignore", invalid="ignore"):
                part[:] = found
                if dtype.kind != "f":
                    if not np.array_equal(part, found):
                        return None
                # A sum is finite only if all of its terms are, and costs half of asking each one.
                elif not math.isfinite(float(part.sum())) and not np.isfinite(part).all():
                    return None
            filled += found.size
    except ValueError:
        return None
    return made.reshape(shape) if filled == size else None


def flags(body: Text, start: int, end: int, shape: tuple[int, ...]) -> Array | None:
    """Read booleans as `numbers` reads numbers, of an array that is known to be JSON."""
    size = math.prod(shape)
    if size > (end - start + 1) // 2:
        return None
    made = np.empty(size, np.bool_)
    filled = 0
    try:
        for piece in _pieces(body, start, end, shape):
            if piece.translate(None, _FLAGS):
                return None
            codes = np.frombuffer(piece, np.uint8)
            found = codes[(codes == _TRUE) | (codes == _FALSE)] == _TRUE
            if filled + found.size > size:
                return None
            made[filled : filled + found.size] = found
            filled += found.size
    except ValueError:
        return None
    return made.reshape(shape) if filled == size else None


def _pieces(body: Text, start: int, end: int, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Give the elements, cut at commas, with the brackets that make an array of them, nested as `shape` is or flat.

    Raises ValueError where they are nested otherwise.
    """
    nesting = _Nesting(shape) if shape and nested(body, start) else None
    place = start
    while place < end:
        cut = end if end - place <= PIECE_BYTES else body.rfind(b",", place, place + PIECE_BYTES)
        if cut < 0:
            raise ValueError("these are no short elements")
        piece = body[place:cut]
        # What is nested would be read as if it were flat, and nothing between two commas as nothing.
        opening, closing = b"[", b"]"
        if nesting is not None:
            opening, closing = nesting.around(piece)
        elif piece.find(b"[") >= 0:
            raise ValueError("these are nested")
        yield b"".join((opening, piece, closing))
        place = cut + 1
        if place < end:
            time.sleep(HANDOVER_S)
    if place != end + 1 or (nesting is not None and not nesting.complete()):
        raise ValueError("these are too few")


class _Nesting:
    """Follows the brackets and commas of an array of `shape` through its pieces, which are cut at commas."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        row = b""
        for dim in reversed(shape[1:]):
            row = b"[%b]" % b",".join([row] * dim)
        self._period = len(row) + 1
        self._rows = b"%b," % row * (2 + PIECE_BYTES // self._period)
        self._whole = self._period * shape[0]
        self._seen = self._depth = 0

    def around(self, piece: bytes | bytearray) -> tuple[bytes, bytes]:
        """Return the brackets that a piece lacks at both ends. Raises ValueError where its form is not the shape's."""
        marks = bytes(piece.translate(None, _NO_STRUCTURE)) + b","
        at = self._seen % self._period
        if self._rows[at : at + len(marks)] != marks:
            raise ValueError("these are nested otherwise")
        opened = 1 + self._depth
        self._seen += len(marks)
        self._depth += marks.count(b"[") - marks.count(b"]")
        return b"[" * opened, b"]" * (1 + self._depth)

    def complete(self) -> bool:
        """Tell whether all rows have come, and no more."""
        return self._seen == self._whole


def read(parser: simdjson.Parser, piece: bytes, kind: str = "f") -> Array | None:
    """Read an array of numbers as doubles, or of whole ones; nested ones as if they were flat. None for anything else.

    kind: f, or i or u for whole numbers of 64 bits.
    """
    document: Any = None
    try:
        document = parser.parse(piece)
        return np.frombuffer(document.as_buffer(of_type="d" if kind == "f" else kind), f"{kind}8")
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return None
    finally:
        del document  # the parser can't be used again while its document lives
