"""Text cut into blocks of whole lines, in bounded memory, whatever it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from serving.bulk.batch import BEGIN, BadRow, Piece, Position
from serving.errors import InvalidRequest

BLOCK_BYTES = 1 << 20
"""What is parsed at a time: large enough that a call costs nothing beside it, small enough to be held by many."""
MOST_LINE_BYTES = 4 << 20
"""Of one row: an image of 600 x 600 pixels fits in."""

_BOM = b"\xef\xbb\xbf"
LINE = re.compile(rb"[^\n]*+\n")
QUOTED_LINE = re.compile(rb'(?:[^"\n]++|"[^"]*+")*+\n')
"""A line that ends where no quote is open; possessive, so that it takes no longer than its text."""

Read: TypeAlias = Callable[[int], bytes]
"""Gives so many bytes at most, and none at the end."""


class Splitter:
    """Cuts text into blocks of whole lines; one that is too long is passed over, and said to be bad.

    read: begins at `start`. quotes: a line ends where no quote is open (RFC 4180).
    """

    def __init__(
        self, read: Read, start: Position = BEGIN, *, quotes: bool = False, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self._read = read
        self._offset, self._line = start
        self._quotes = quotes
        self._block_bytes = block_bytes
        self._held = b""
        self._ended = False

    def blocks(self) -> Iterator[Piece]:
        """Give the text in order. Raises InvalidRequest where it is UTF-16 or UTF-32."""
        if not self._offset:
            self._begin()
        while True:
            if end := self._cut():
                yield self._taken(end)
            elif self._ended and not self._held:
                return
            elif len(self._held) > MOST_LINE_BYTES or (self._ended and b"\n" in self._held):
                yield self._passed_over()
            elif self._ended:
                yield self._taken(len(self._held))
            else:
                self._fill()

    def first(self) -> bytes:
        """Give the first line alone, in which quotes may be; nothing where there is none. Raises as `blocks`."""
        self._begin()
        while not (found := QUOTED_LINE.match(self._held)) and not self._ended and len(self._held) <= MOST_LINE_BYTES:
            self._fill()
        line: bytes = self._taken(found.end() if found else len(self._held)).data
        return line

    def _begin(self) -> None:
        while len(self._held) < 4 and not self._ended:
            self._fill()
        head = self._held[:4]
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
            raise InvalidRequest("the text is UTF-16 or UTF-32: send it as UTF-8")
        if head.startswith(_BOM):
            self._drop(len(_BOM))

    def _fill(self) -> None:
        more = self._read(self._block_bytes)
        self._ended = not more
        self._held += more

    def _cut(self) -> int:
        """Return where the last line that is whole ends; 0 where none is."""
        held = self._held
        end = held.rfind(b"\n")
        if self._quotes and b'"' in held:
            quotes = held.count(b'"', 0, end + 1)
            while end >= 0 and quotes % 2:  # it is part of a field
                # So are all between the last quote and here.
                before = held.rfind(b"\n", 0, held.rfind(b'"', 0, end))
                quotes -= held.count(b'"', before + 1, end)
                end = before
        return end + 1

    def _taken(self, end: int) -> Piece:
        line = self._line
        data = self._drop(end)
        if data and not data.endswith(b"\n"):
            data += b"\n"
        self._line += data.count(b"\n")
        return Piece(data, line, Position(self._offset, self._line))

    def _drop(self, size: int) -> bytes:
        data, self._held = self._held[:size], self._held[size:]
        self._offset += size
        return data

    def _passed_over(self) -> Piece:
        """Pass over a line that never seems to end; where a quote is open, over the line that opens it."""
        line = self._line
        said = f"is a line of over {MOST_LINE_BYTES} bytes, which is the limit"
        if b"\n" in self._held:
            said = "opens a quote that is not closed: write a quote inside of a field as two"
        while b"\n" not in self._held and not self._ended:
            self._drop(len(self._held))
            self._fill()
        self._drop(self._held.find(b"\n") + 1 or len(self._held))
        self._line += 1
        return Piece(BadRow(line, "", said), line, Position(self._offset, self._line))
