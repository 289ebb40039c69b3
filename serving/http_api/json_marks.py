"""Finds the brackets, commas and colons of a stretch of JSON that begins outside of every string."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

QUOTE, COMMA, COLON, ARRAY, OBJECT = b'",:[{'
DEEPEST = 512
"""Levels of nesting beyond which a long document is refused; the strict reader itself gives up at some 900."""

_LOOKED_AT = np.zeros(256, bool)
_LOOKED_AT[list(b'",:[]{}')] = True
_STEP = np.zeros(256, np.int32)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_LATER_HALF = 2


class Marks(NamedTuple):
    """The brackets, commas and colons outside of strings, in order.

    at: their offsets. mark: which they are. depth: brackets that are open after each, less those at the start.
    quotes: the offsets of all quotes. open: where a string begins that does not end here; -1 where there is none.
    """

    at: NDArray[np.int64]
    mark: NDArray[np.uint8]
    depth: NDArray[np.int32]
    quotes: NDArray[np.int64]
    open: int


class Cut(NamedTuple):
    """Where a stretch may be cut: before the comma, or behind the opening bracket, that is mark number `nth`."""

    nth: int
    offset: int
    comma: bool


def unescaped(text: bytes) -> bytes:
    """Hide escaped quotes and backslashes; all other bytes stay where they are."""
    return text.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in text else text


def marks(text: bytes) -> Marks:
    """Find the marks of a stretch; right up to its first fault, where it has one."""
    codes = np.frombuffer(unescaped(text), np.uint8)
    at = np.flatnonzero(_LOOKED_AT[codes])
    mark = codes[at]
    quote = mark == QUOTE
    inside = np.bitwise_xor.accumulate(quote.view(np.uint8)).view(bool)
    quotes = at[quote]
    outside = ~(inside | quote)
    mark = mark[outside]
    opened = int(quotes[-1]) if len(quotes) % 2 else -1
    return Marks(at[outside], mark, np.cumsum(_STEP[mark], dtype=np.int32), quotes, opened)


def cut_of(found: Marks, size: int) -> Cut | None:
    """Choose where to cut a stretch of `size` bytes: late, and at as few open brackets as possible."""
    commas = np.flatnonzero(found.mark == COMMA)
    if len(commas):
        late = commas[np.searchsorted(found.at[commas], size // _LATER_HALF) :]
        commas = late if len(late) else commas
        depths = found.depth[commas][::-1]
        index = int(commas[len(commas) - 1 - int(depths.argmin())])
        return Cut(index, int(found.at[index]), True)
    opening = np.flatnonzero(_STEP[found.mark] > 0)
    if not len(opening):
        return None
    index = int(opening[-1])
    return Cut(index, int(found.at[index]) + 1, False)


def stack_after(stack: bytes, found: Marks, count: int) -> bytes | None:
    """Return the brackets that are open after `count` marks; None where some do not match."""
    kinds = found.mark[:count]
    left = kinds[_STEP[kinds] != 0].tobytes()
    size = -1
    while len(left) != size:
        size = len(left)
        left = left.replace(b"[]", b"").replace(b"{}", b"")
    closing = len(left) - len(left.lstrip(b"]}"))
    opened = left[closing:].translate(None, b"[{")
    if opened or closing > len(stack):
        return None
    ended = stack[len(stack) - closing :][::-1].translate(_CLOSING)
    return stack[: len(stack) - closing] + left[closing:] if ended == left[:closing] else None


def closing(stack: bytes) -> bytes:
    """Return what closes the brackets that are open.

    >>> closing(b"{[")
    b']}'
    """
    return stack[::-1].translate(_CLOSING)


_CLOSING = bytes.maketrans(b"[{", b"]}")
