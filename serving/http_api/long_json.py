"""Reads a long JSON document in steps, so that other threads get the interpreter in between; its arrays stay bytes.

A parser holds the interpreter from its first byte to its last. So the document is cut at commas, and each stretch is
judged by a parser with brackets around it that make it a document of its own. What is left when the long arrays are
taken out, the skeleton, is short, and is parsed at last; in place of each long array stands a `Long`, whose elements
can be read in pieces. Everything is refused that `strict_json` refuses, in the same words.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import simdjson

from serving.errors import InvalidRequest
from serving.http_api import strict_json
from serving.http_api.json_fault import COMMA, CUT_SHORT, check_utf8, refuse
from serving.http_api.json_keys import Keys, members
from serving.http_api.json_marks import ARRAY, COLON, DEEPEST, Cut, Marks, closing, cut_of, marks, stack_after
from serving.http_api.json_source import Source, end_of_string, long_text
from serving.tensor_bytes import HANDOVER_S, Text

PIECE_BYTES = 32 * 1024
"""Bytes that are looked at in one step, which takes some 0.2 ms."""
LONGEST_VALUE = 256 * 1024
"""Bytes that a value may have that is neither a string nor an array nor an object."""
LONG_ELEMENT = 256 * 1024
"""Bytes of a piece, which has one element then, from which a text or an image is read in steps."""
LONG_BYTES = 64
"""Arrays from this size on are taken out of the skeleton."""
MOST_SKELETON = 1024 * 1024
"""Bytes of a document beside its long arrays: some milliseconds of parsing."""
MOST_BRACKETS = 32_768
"""Arrays and objects there: thousands of tensors have as many; so many empty arrays are made in 3 ms."""
_SPACE = b" \t\r\n"
_BEYOND_64_BITS = re.compile(rb"\d{19}")
_FILLER = b'"\\u007fopen":'
"""A key for what is open around a stretch."""


class Long:
    """A long array of a document that was found right: where its elements lie, and the commas to cut it at."""

    __slots__ = ("_body", "cuts", "end", "start")

    def __init__(self, body: Text, start: int) -> None:
        self._body = body
        self.start = start
        self.end = start
        self.cuts: list[int] = []

    @property
    def body(self) -> Text:
        """The document that it is part of."""
        return self._body

    def pieces(self) -> Iterator[bytes]:
        """Give its elements as arrays of about PIECE_BYTES, or of one element that is longer; only the last is empty.

        For a thread of its own: it sleeps a moment between pieces.
        """
        start = self.start
        for cut in (*self.cuts, self.end):
            yield b"".join((b"[", self._body[start:cut], b"]"))
            start = cut + 1
            time.sleep(HANDOVER_S)


def read(body: Text, paths: frozenset[bytes]) -> Any:
    """Parse a document whose long arrays stand below such brackets as `paths` has: b"{[" are arrays in an object.

    For a thread of its own. Raises InvalidRequest with the place of the fault, as strict_json.loads does, and where
    what stands beside the long arrays is too long.
    """
    return _Reading(body, paths).read()


def values(piece: bytes, *, whole: bool = True) -> list[Any]:
    """Parse a piece of a `Long`. whole: numbers beyond 64 bits are whole where they are written so, and no floats."""
    if len(piece) >= LONG_ELEMENT and (text := long_text(piece, PIECE_BYTES)) is not None:
        return [text]
    if not (whole and _BEYOND_64_BITS.search(piece)):
        with contextlib.suppress(ValueError):  # half of a surrogate pair, or hundreds of digits
            return list(orjson.loads(piece))
    return list(strict_json.loads(piece))


class _Reading:
    def __init__(self, body: Text, paths: frozenset[bytes]) -> None:
        self._body = body
        self._paths = paths
        self._levels = max(map(len, paths))
        self._place = 0
        self._stack = b""
        self._fresh = True  # nothing stands before `place` in the innermost brackets
        self._skeleton = bytearray()
        self._brackets = 0  # in it
        self._long: Long | None = None  # the one that is open
        self._level = 0  # how many brackets are open in it, with its own
        self._at_border = True  # `place` is between two elements of it
        self._keys = Keys()
        self._longs: list[Long] = []
        self._known = (0, 0, 0)  # what the last step left: bytes of the skeleton, long arrays, brackets of an open one
        self._parser = simdjson.Parser()
        self._is_utf8 = False  # all of the body, for sure

    def read(self) -> Any:
        while not self._step():
            time.sleep(HANDOVER_S)
        longs = iter(self._longs)
        return strict_json.parse(self._skeleton.decode(), lambda _: next(longs))

    def _step(self) -> bool:
        """Judge the next stretch; tell whether it was the last."""
        source = Source(self._body, self._place, PIECE_BYTES)
        found = marks(source.text)
        cut = None
        while not (source.last and found.open < 0) and (cut := cut_of(found, len(source.text))) is None:
            self._extend(source, found.open)
            found = marks(source.text)
        if len(found.depth) and int(found.depth.max()) + len(self._stack) > DEEPEST:
            deepest = int(found.at[int((found.depth > DEEPEST - len(self._stack)).argmax())]) + 1
            self._refuse(source, source.text[:deepest], CUT_SHORT)
            raise strict_json.too_deep()
        text = source.text if cut is None else source.text[: cut.offset]
        count = len(found.at) if cut is None else cut.nth if cut.comma else cut.nth + 1
        stack = b"" if cut is None else stack_after(self._stack, found, count)
        after = self._judge(source, text, cut, stack)
        self._take(source, text, found, count, cut, len(after))
        self._stack = after
        self._fresh = cut is not None and not cut.comma
        self._place = source.place(len(text)) + (cut is not None and cut.comma)
        self._known = len(self._skeleton), len(self._longs), self._level if self._long is not None else 0
        return cut is None

    def _extend(self, source: Source, opened: int) -> None:
        """Look further where a stretch can't be cut: past a long string, past spaces, or at more of it."""
        if opened >= 0:
            end = end_of_string(self._body, source.place(opened) + 1, PIECE_BYTES)
            if end.fault is not None:
                self._refuse(source, source.text[:opened], b"", b'"' + end.fault, end.place)
            source.skip_string(opened, end.place)
        else:
            source.grow()
        bare = source.text.rstrip(_SPACE)
        if len(bare) > LONGEST_VALUE:
            self._refuse(source, source.text, CUT_SHORT)
            raise InvalidRequest(f"a value in the body has over {LONGEST_VALUE} bytes")
        if len(bare) < len(source.text):
            source.skip_spaces(len(bare))

    def _judge(self, source: Source, text: bytes, cut: Cut | None, stack: bytes | None) -> bytes:
        """Refuse a stretch that is wrong; return the brackets that are open behind it."""
        if stack is not None and not (cut is not None and not stack):
            around = _opening(self._stack, fresh=self._fresh), _ending(stack, cut)
            document: Any = None
            try:
                document = self._parser.parse(b"".join((around[0], text, around[1])))
            except (ValueError, RuntimeError):  # wrong, or right and rare: half a surrogate, a long whole number
                self._refuse(source, text, b"" if cut is None else COMMA if cut.comma else CUT_SHORT)
            finally:
                del document  # the parser can't be used again while its document lives
            return stack
        self._refuse(source, text, COMMA)
        raise InvalidRequest("the body is not JSON")

    def _refuse(self, source: Source, text: bytes, behind: bytes, string: bytes = b"", at: int = 0) -> None:
        """Raise what the strict reader says of a stretch, if it says anything."""
        size, longs, level = self._known
        before = bytes(self._skeleton[:size])
        if level:
            inner = self._stack[level:]
            before += _opening(inner, fresh=self._fresh) if inner else b"" if self._fresh else b"0,"
        self._check_utf8()
        refuse(source, before, longs, text, behind, string, at)

    def _check_utf8(self) -> None:
        """Refuse a body that is not UTF-8, wherever that is: it is said first. Once: what is rare may come often."""
        if not self._is_utf8:
            check_utf8(self._body, self._place)
            self._is_utf8 = True

    def _take(self, source: Source, text: bytes, found: Marks, count: int, cut: Cut | None, depth: int) -> None:  # noqa: PLR0917
        """Add a stretch that is right to the skeleton and to the long arrays, and look for keys that stand twice."""
        base = len(self._stack)
        at, mark, depths = found.at[:count], found.mark[:count], found.depth[:count] + base
        copied = begins = index = 0
        stack = self._stack[: self._levels]
        while True:
            if self._long is not None:
                ends = depths[index:] < self._level
                if not ends.any():
                    break
                index += int(ends.argmax())
                offset = int(at[index])
                self._check_keys(source, found, begins, offset, ends=True)
                self._long.end = source.place(offset)
                if self._long.end - self._long.start < LONG_BYTES:
                    self._put(bytes(self._body[self._long.start : self._long.end]))
                    copied = offset
                else:
                    self._skeleton[-1:] = b"NaN"  # not only what is in its brackets
                    self._longs.append(self._long)
                    copied = offset + 1
                self._long = None
                stack = stack[: self._level - 1]
                index += 1
                continue
            opened = self._open(mark, depths, index, stack)
            if opened is None:
                break
            index, stack = opened
            begins = int(at[index - 1]) + 1
            self._add(source, copied, begins)
            copied = begins
            self._long, self._level, self._at_border = Long(self._body, source.place(begins)), len(stack), True
        if self._long is None:
            self._add(source, copied, len(text))
            if cut is not None and cut.comma:
                self._skeleton += b","
            return
        border = cut is not None and cut.comma and depth == self._level
        self._check_keys(source, found, begins, len(text), ends=border)
        if border:
            self._long.cuts.append(source.place(len(text)))
        self._at_border = border or begins == len(text)

    def _add(self, source: Source, start: int, end: int) -> None:
        """Add some of a stretch to the skeleton."""
        if len(self._skeleton) + source.size(start, end) > MOST_SKELETON:
            raise _too_much()
        self._put(source.whole(start, end))

    def _put(self, text: bytes) -> None:
        self._skeleton += text
        self._brackets += text.count(b"[") + text.count(b"{")
        if self._brackets > MOST_BRACKETS:
            raise _too_much()

    def _open(self, mark: Any, depths: Any, index: int, stack: bytes) -> tuple[int, bytes] | None:
        """Find the next array that may be long; return the mark behind it, and the brackets open there."""
        shallow = np.flatnonzero(_BRACKET[mark[index:]] & (depths[index:] <= self._levels)) + index
        for each, kind, depth in zip(shallow.tolist(), mark[shallow].tolist(), depths[shallow].tolist(), strict=True):
            if _OPENS[kind]:
                stack = stack[: depth - 1] + bytes([kind])
                if kind == ARRAY and stack in self._paths:
                    return each + 1, stack
            else:
                stack = stack[:depth]
        return None

    def _check_keys(self, source: Source, found: Marks, start: int, end: int, *, ends: bool) -> None:
        """Refuse a key that stands twice in an object of a long array; `ends` tells whether an element ends at `end`.

        What is wholly here is counted by a parser: there are as many members as colons. Else keys are remembered.
        """
        first, last = np.searchsorted(found.at, (start, end)).tolist()
        whole = self._at_border and ends and not source.lacks(start, end)
        colons = int(np.count_nonzero(found.mark[first:last] == COLON))
        if whole and not colons:
            return
        text = source.text[start:end]
        if not whole:
            if self._at_border:
                self._keys.clear()
            try:
                self._keys.follow(source, found, first, last)
            except InvalidRequest:
                self._check_utf8()
                raise
            return
        try:
            if members(orjson.loads(b"".join((b"[", text, b"]"))), colons):
                return
        except ValueError:
            pass
        self._at_border = True
        self._refuse(source, source.text[:end], CUT_SHORT)


def _too_much() -> InvalidRequest:
    return InvalidRequest(
        f"the body has over {MOST_SKELETON} bytes, or {MOST_BRACKETS} arrays and objects, beside its arrays of rows or"
        " data: send less there"
    )


def _opening(stack: bytes, *, fresh: bool) -> bytes:
    """Return what stands for the brackets that are open around a stretch."""
    if not stack:
        return b""
    outer = stack[:-1].replace(b"{", b"{" + _FILLER)
    inner = stack[-1:]
    if fresh:
        return outer + inner
    return outer + (b"[0," if inner == b"[" else b"{" + _FILLER + b"0,")


def _ending(stack: bytes, cut: Cut | None) -> bytes:
    """Return what makes a stretch whole that ends inside these brackets."""
    comma = b""
    if cut is not None and cut.comma:
        comma = b",0" if stack.endswith(b"[") else b',"\\u007fshut":0'
    return comma + closing(stack)


_OPENS = np.zeros(256, bool)
_OPENS[list(b"[{")] = True
_BRACKET = np.zeros(256, bool)
_BRACKET[list(b"[]{}")] = True
