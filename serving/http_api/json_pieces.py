"""Cuts the long arrays of a JSON document into pieces that are JSON themselves, so that no parser runs for long.

A parser holds the interpreter from its first byte to its last, and with it the event loop. Where an array is cut is a
guess: at a comma behind what elements like the first one end in. A parser judges it. JSON is read from left to right:
a piece that parses ends outside of every string, between two elements. A wrong guess thus fails, and is never misread.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import orjson

from serving.tensor_bytes import HANDOVER_S, Text

PIECE_BYTES = 32 * 1024
"""About 0.4 ms of rows that become Python objects."""
_LONGEST_ELEMENT = 256 * 1024
_SPACE = rb"[ \t\r\n]{0,64}"
_INSTANCES = re.compile(rb'%b\{%b"instances"%b:%b\[' % ((_SPACE,) * 4))
_INPUTS = re.compile(rb'%b\{%b"inputs"%b:%b\{' % ((_SPACE,) * 4))
_MEMBER = re.compile(rb'%b("(?:[^"\\\x00-\x1f]|\\.){0,1024}")%b:%b\[' % ((_SPACE,) * 3))
_NEXT = re.compile(rb"\]%b([,}])" % _SPACE)
_TAIL = re.compile(rb"%b\}%b" % ((_SPACE,) * 2))
_LONGEST_TAIL = 64


class Span(NamedTuple):
    """Where the elements of an array lie: between its brackets."""

    start: int
    end: int


def instances(body: Text) -> Span | None:
    """Find the array of a document that has `instances` and nothing else; None for any other."""
    found = _INSTANCES.match(body)
    end = body.rfind(b"]")
    if found is None or end < found.end() or len(body) - end > _LONGEST_TAIL or not _TAIL.fullmatch(body, end + 1):
        return None
    return Span(found.end(), end)


def columns(body: Text) -> dict[str, Span] | None:
    """Find the arrays of a document that has `inputs` and nothing else; None for any other.

    An array ends at its first bracket that another name, or the end of the object, follows: this too is a guess.
    """
    found = _INPUTS.match(body)
    if found is None:
        return None
    place = found.end()
    spans: dict[str, Span] = {}
    while (member := _MEMBER.match(body, place)) is not None:
        end = body.find(b"]", member.end())
        following = _NEXT.match(body, end) if end >= 0 else None
        name = orjson.loads(member[1])
        if following is None or name in spans:
            return None
        spans[name] = Span(member.end(), end)
        place = following.end()
        if following[1] == b"}":
            return spans if _TAIL.fullmatch(body, place) else None
    return None


def pieces(body: Text, span: Span) -> Iterator[bytes]:
    """Give the elements of an array as arrays of about PIECE_BYTES; whoever takes them must refuse an empty one.

    For a thread of its own: it sleeps a moment between pieces. Raises ValueError where nothing follows a last comma, or
    an element is so long that reading it takes long.
    """
    start, end = span
    last = bytes(body[start : start + 64]).lstrip(b" \t\r\n")[:1]
    mark = {b"{": b"},", b"[": b"],", b'"': b'",'}.get(last, b",")
    while start < end:
        cut = end
        if end - start > PIECE_BYTES:
            cut = body.rfind(mark, start, start + PIECE_BYTES)
            if cut < 0:  # an element larger than a piece
                most = start + PIECE_BYTES + _LONGEST_ELEMENT
                cut = body.find(mark, start + PIECE_BYTES, min(end, most))
                if cut < 0 and end > most:
                    raise ValueError("an element is too long")
            cut = end if cut < 0 else cut + len(mark) - 1
        yield b"".join((b"[", body[start:cut], b"]"))
        start = cut + 1
        if start < end:
            time.sleep(HANDOVER_S)
    if start != end + 1:
        raise ValueError("nothing follows the last comma")
