"""A stretch of a long JSON document, without its long strings and its long spaces."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import orjson
import simdjson

from serving.http_api import strict_json
from serving.http_api.json_marks import unescaped
from serving.tensor_bytes import HANDOVER_S, Text

_SPACE = b" \t\r\n"
_LONGEST_ESCAPE = 12
"""Two halves of a surrogate pair."""
_FIRST_OF_MORE, _CONTINUES, _KIND = 0xC0, 0x80, 0xC0
_LONGEST_CHARACTER = 4
_HALF = re.compile(rb"\\u[dD][89abAB].{2}", re.DOTALL)
"""The first half of a surrogate pair, escaped."""


class Source:
    """The bytes of a body from a place on, some of which may be left out; it knows where each of them stands."""

    def __init__(self, body: Text, start: int, piece: int) -> None:
        self.body = body
        self._piece = piece
        self._skipped = [(0, start)]  # from an offset in the text on: what to add for the place in the body
        self._strings: list[int] = []
        self.text = b""
        self._end = start
        self.grow()

    @property
    def last(self) -> bool:
        """Tell whether nothing stands behind it."""
        return self._end >= len(self.body)

    def grow(self) -> None:
        """Take more of the body."""
        self.text += self.body[self._end : self._end + self._piece]
        self._end = min(len(self.body), self._end + self._piece)

    def place(self, offset: int) -> int:
        """Return where in the body an offset in the text is."""
        return offset + next(added for start, added in reversed(self._skipped) if start <= offset)

    def skip_string(self, offset: int, end: int) -> None:
        """Put a short one in place of a string, from its quote's offset on to the place of the quote that ends it."""
        self._strings.append(offset)
        self.text = b"%b%d" % (self.text[: offset + 1], end)  # no other of the same object: keys stay apart
        self._skip(len(self.text), end)

    def skip_spaces(self, offset: int) -> None:
        """Leave out all but the first of the spaces that stand from an offset on, and are all there is behind it."""
        end = self.place(offset) + 1
        while end < len(self.body):
            piece = bytes(self.body[end : end + self._piece])
            bare = len(piece) - len(piece.lstrip(_SPACE))
            end += bare
            if bare < len(piece):
                break
            time.sleep(HANDOVER_S)
        self._skip(offset + 1, end)

    def _skip(self, offset: int, end: int) -> None:
        self.text = self.text[:offset]
        self._skipped.append((offset, end - offset))
        self._end = end
        self.grow()

    def lacks(self, start: int, end: int) -> bool:
        """Tell whether a string between two offsets was left out."""
        return any(start <= string < end for string in self._strings)

    def size(self, start: int, end: int) -> int:
        """Return how many bytes `whole` has."""
        if self.lacks(start, end):
            return self.place(end) - self.place(start)
        return end - start

    def whole(self, start: int, end: int) -> bytes:
        """Return the text between two offsets with its strings."""
        if self.lacks(start, end):
            return bytes(self.body[self.place(start) : self.place(end)])
        return self.text[start:end]


class StringEnd(NamedTuple):
    """Where a string ends: at the quote at `place`. Or the part of it that is wrong, which begins at `place`."""

    place: int
    fault: bytes | None


def end_of_string(body: Text, start: int, piece: int) -> StringEnd:
    """Find the end of a string whose first character is at `start`, and judge all of it.

    A string without an end is said to be wrong with nothing, at `start`. For a thread of its own.
    """
    parser = simdjson.Parser()
    place = start
    while place < len(body):
        text = bytes(body[place : place + piece + _LONGEST_ESCAPE])
        shown = unescaped(text)
        quote = shown.find(b'"')
        cut = quote if quote >= 0 else len(text) if place + len(text) >= len(body) else _border(text, shown)
        if not _right(parser, text[:cut]):
            return StringEnd(place, text[:cut])
        place += cut
        if quote >= 0:
            return StringEnd(place, None)
        time.sleep(HANDOVER_S)
    return StringEnd(start, b"")


def long_text(text: bytes, piece: int) -> str | None:
    """Parse an array that is right and has one element, a string; None for any other. For a thread of its own."""
    start = text.find(b'"') + 1
    if not start or text[:start].strip(_SPACE) != b'["':
        return None
    parts = []
    while True:
        some = text[start : start + piece + _LONGEST_ESCAPE]
        shown = unescaped(some)
        quote = shown.find(b'"')
        cut = quote if quote >= 0 else _border(some, shown)
        try:
            parts.append(orjson.loads(b'"%b"' % some[:cut]))
        except ValueError:  # half of a surrogate pair
            return None
        start += cut
        if quote >= 0:
            return "".join(parts) if text[start + 1 : start + 64].strip(_SPACE) == b"]" else None
        time.sleep(HANDOVER_S)


def _border(text: bytes, shown: bytes) -> int:
    """Return where a stretch of a string can be cut: neither in an escape nor in a character of several bytes."""
    size = len(text)
    escape = shown.find(b"\\", max(1, size - _LONGEST_ESCAPE))
    cut = escape if escape > 0 else size
    if _HALF.fullmatch(text, max(0, cut - _LONGEST_ESCAPE // 2), cut):
        return cut - _LONGEST_ESCAPE // 2 or cut
    for back in range(1, min(_LONGEST_CHARACTER, cut - 1) + 1):
        if text[cut - back] & _KIND != _CONTINUES:
            return cut - back if text[cut - back] & _KIND == _FIRST_OF_MORE else cut
    return cut


def _right(parser: simdjson.Parser, text: bytes) -> bool:
    quoted = b'"%b"' % text
    try:
        parser.parse(quoted)
    except (ValueError, RuntimeError):
        try:  # half of a surrogate pair is right too
            strict_json.parse(quoted.decode())
        except ValueError:
            return False
    return True
