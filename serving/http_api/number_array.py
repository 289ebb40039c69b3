"""Reads a long flat JSON array of numbers piece by piece, so that other threads get the interpreter in between.

A JSON parser holds the interpreter from its first byte to its last: 16 MB at once would stop the event loop for a
tenth of a second. Pieces that fit the processor's cache are also read twice as fast.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
import simdjson

from serving.tensors import Array

PIECE_BYTES = 256 * 1024
"""About 0.6 ms of reading."""
_HANDOVER_S = 20e-6
_LONGEST_SKELETON = 2048
STAND_IN = [0.5]
"""What the skeleton has in place of the long array; no shape can be this."""


class Split(NamedTuple):
    """A document whose longest array was taken out: what is left, and where the numbers lie."""

    skeleton: bytes
    start: int
    end: int


def split(body: bytes | bytearray) -> Split | None:
    """Find the long array of a document with three arrays, as a v2 request with one flat tensor has; else None."""
    first = body.find(b"[", 0, _LONGEST_SKELETON)
    second = body.find(b"[", first + 1, _LONGEST_SKELETON)
    end = body.find(b"]", second + 1, _LONGEST_SKELETON)
    start = second
    if first < 0 or second < 0:
        return None
    if end >= 0:  # the second array is short, the shape: the third is the data
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


def numbers(body: bytes | bytearray, start: int, end: int, size: int, dtype: np.dtype[np.floating]) -> Array | None:
    """Read `size` finite numbers that stand between `start` and `end`; None for anything else.

    For a thread of its own: it sleeps a moment between pieces.
    """
    if size > (end - start + 1) // 2:
        return None
    made = np.empty(size, dtype)
    parser = simdjson.Parser()
    filled = 0
    place = start
    while place < end:
        cut = end if end - place <= PIECE_BYTES else body.rfind(b",", place, place + PIECE_BYTES)
        if cut < 0:
            return None
        piece = b"".join((b"[", body[place:cut], b"]"))
        # A nested array would be read as if it were flat, and nothing between two commas as nothing.
        read = _read(parser, piece) if piece.count(b"[") == 1 else None
        if read is None or read.size == 0 or filled + read.size > size:
            return None
        part = made[filled : filled + read.size]
        with np.errstate(over="ignore"):
            part[:] = read
            total = float(part.sum())
        # A sum is finite only if all of its terms are, and costs half of asking each one.
        if not math.isfinite(total) and not np.isfinite(part).all():
            return None
        filled += read.size
        place = cut + 1
        if place < end:
            time.sleep(_HANDOVER_S)
    return made if filled == size and place == end + 1 else None


def _read(parser: simdjson.Parser, piece: bytes) -> Array | None:
    document: Any = None
    try:
        document = parser.parse(piece)
        return np.frombuffer(document.as_buffer(of_type="d"))
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return None
    finally:
        del document  # the parser can't be used again while its document lives
