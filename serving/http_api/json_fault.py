"""Says what is wrong with a stretch of a long JSON document, in the words and with the place of `strict_json`."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

from serving.http_api import strict_json
from serving.http_api.json_source import Source
from serving.tensor_bytes import HANDOVER_S, Text

COMMA = b","
CUT_SHORT = b" "
_STEP = 256 * 1024
_LONGEST_CHARACTER = 4


def refuse(  # noqa: PLR0917  a stretch and what stands around it
    source: Source, before: bytes, longs: int, text: bytes, behind: bytes, string: bytes, at: int
) -> None:
    """Raise InvalidRequest where a stretch of a body that is UTF-8 is wrong; return where it is right.

    before: all that stands before it, in which NaN stands for `longs` arrays. behind: nothing where the body ends,
    COMMA where that comes next, else CUT_SHORT. Nothing is closed: an object is judged where it ends.
    string: what follows the text: a quote, and a part of a string that is wrong, which stands at the place `at`.
    """
    taken = itertools.count()

    def constant(token: str) -> Any:
        return None if next(taken) < longs else strict_json.no_constant(token)

    ahead = before.decode()
    looked_at = text.decode() + string.decode()
    try:
        strict_json.parse(ahead + looked_at + behind.decode(), constant)
    except json.JSONDecodeError as error:
        found = error.pos - len(ahead)
        if behind and found >= len(looked_at) + (behind == COMMA):
            return
        found = max(0, found)
        offset = len(looked_at[:found].encode())
        into = offset - len(text) - 1  # the string, behind its quote
        place = at + into if string and into >= 0 else source.place(offset)
        raise strict_json.not_json(error.msg, *line_and_column(source.body, place)) from None
    except RecursionError:
        raise strict_json.too_deep() from None


def check_utf8(body: Text, start: int) -> None:
    """Raise InvalidRequest where a body is not UTF-8; it is known to be until `start`."""
    while start < len(body):
        text = bytes(body[start : start + _STEP])
        try:
            text.decode()
            start += len(text)
        except UnicodeDecodeError as error:
            cut_short = error.end == len(text) and len(text) - error.start < _LONGEST_CHARACTER
            if not cut_short or start + len(text) >= len(body) or error.reason != "unexpected end of data":
                raise strict_json.not_utf8(start + error.start) from None
            start += error.start
        time.sleep(HANDOVER_S)


def line_and_column(body: Text, place: int) -> tuple[int, int]:
    """Return the line and the column, in characters from 1 on, of a place in a body that is UTF-8."""
    line, column = 1, 1
    for start in range(0, place, _STEP):
        text = bytes(body[start : min(place, start + _STEP)])
        line += text.count(b"\n")
        begins = text.rfind(b"\n") + 1
        column = _characters(text[begins:]) + (1 if begins else column)
        time.sleep(HANDOVER_S)
    return line, column


def _characters(text: bytes) -> int:
    return len(text.translate(None, _CONTINUING))


_CONTINUING = bytes(range(0x80, 0xC0))
