"""Whether a key stands twice in an object that is too long to be parsed at once."""

from __future__ import annotations

import time
from typing import Any

from serving.errors import InvalidRequest
from serving.http_api import strict_json
from serving.http_api.json_marks import ARRAY, COLON, COMMA, OBJECT, Marks
from serving.http_api.json_source import Source
from serving.tensor_bytes import HANDOVER_S

MOST_MEMBERS = 65_536
_STEP = 1024


class Keys:
    """The keys of the objects that are open, from stretch to stretch."""

    def __init__(self) -> None:
        self._open: list[tuple[set[str], list[str]]] = []  # of each: its keys, and those that came again

    def clear(self) -> None:
        """Begin anew, outside of all objects."""
        self._open.clear()

    def follow(self, source: Source, found: Marks, first: int, last: int) -> None:
        """Read the keys among some marks.

        Raises InvalidRequest at the end of an object where one stood twice, or as soon as there are too many.
        """
        for index in range(first, last):
            if index % _STEP == 0:
                time.sleep(HANDOVER_S)
            kind = found.mark[index]
            if kind == COMMA:
                continue
            if kind == COLON:
                self._add(_key(source, found, int(found.at[index])))
            elif kind in (ARRAY, OBJECT):
                self._open.append((set(), []))
            elif self._open and (again := self._open.pop()[1]):
                raise strict_json.twice(again[0])

    def _add(self, key: str) -> None:
        keys, again = self._open[-1]
        if key in keys:
            again.append(key)
        keys.add(key)
        if len(keys) > MOST_MEMBERS:
            raise InvalidRequest(f"an object in the body has over {MOST_MEMBERS} members")


def _key(source: Source, found: Marks, colon: int) -> str:
    closes = int(found.quotes.searchsorted(colon)) - 1
    text = source.whole(int(found.quotes[closes - 1]), int(found.quotes[closes]) + 1)
    return str(strict_json.parse(text.decode()))


def members(value: Any, due: int) -> bool:
    """Tell whether the objects in an array have `due` members in all."""
    total = sum([len(row) for row in value if type(row) is dict])
    if total == due:
        return True
    total = 0
    left: list[Any] = [value]
    while left:
        each = left.pop()
        if type(each) is dict:
            total += len(each)
            left += each.values()
        elif type(each) is list:
            left += each
    return total == due
