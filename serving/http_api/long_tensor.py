"""Reads a tensor's `data` from a long JSON array, in pieces: what `tensor_json` makes of a short one."""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.errors import InvalidRequest
from serving.http_api import number_array
from serving.http_api.long_json import Long, values
from serving.http_api.tensor_json import (
    ACCEPTED,
    no_json_form,
    out_of_range,
    ragged,
    wrong_count,
    wrong_kind,
    wrong_rows,
)
from serving.tensor_bytes import room
from serving.tensors import HALVES, INTEGERS, NUMPY, Array, count, limits


def array_of(data: Long, datatype: str, shape: tuple[int, ...], at: str) -> Array:
    """Make the array, as tensor_json.array_of does, with the same errors. For a thread of its own."""
    if datatype in HALVES:
        raise no_json_form(datatype, at)
    array = None
    if datatype == "BOOL":
        array = number_array.flags(data.body, data.start, data.end, shape)
    elif datatype != "BYTES":
        array = number_array.numbers(data.body, data.start, data.end, shape, NUMPY[datatype])
    if array is not None:
        return array
    filling = _Filling(data, datatype, shape, at)
    for piece in data.pieces():
        filling.take(values(piece, whole=datatype in INTEGERS))
    return filling.array()


class _Filling:
    """An array that is filled piece by piece, and what was found wrong first at each step of `tensor_json.array_of`."""

    def __init__(self, data: Long, datatype: str, shape: tuple[int, ...], at: str) -> None:
        self._datatype = datatype
        self._shape = shape
        self._at = at
        self._accepted = ACCEPTED[datatype]
        self._limits = limits(datatype) if datatype in INTEGERS else None
        self._size = count(shape)
        size = min(self._size, (data.end - data.start) // 2 + 1)
        self._made = room(size) if datatype == "BYTES" else np.empty(size, NUMPY[datatype])
        self._filled = 0
        self._nested: bool | None = None
        self._seen = [0] * len(shape)  # how many lists there were at each level
        self._ragged: dict[int, InvalidRequest] = {}
        self._wrong: InvalidRequest | None = None
        self._beyond: InvalidRequest | None = None
        self._overflow: InvalidRequest | None = None

    def take(self, values: list[Any]) -> None:
        """Take the next elements."""
        if self._nested is None:
            self._nested = bool(values) and isinstance(values[0], list)
        flat = self._flat(values) if self._nested else values
        if not flat:
            return
        start = self._filled
        self._filled += len(flat)
        if self._wrong is None and not self._accepted.issuperset(map(type, flat)):
            index = next(i for i, value in enumerate(flat) if type(value) not in self._accepted)
            self._wrong = self._judged(start + index, flat[index])
        if self._wrong is None and self._filled <= self._size and self._fits(flat, start):
            try:
                with np.errstate(over="ignore"):  # the caller refuses what overflowed, by name
                    self._made[start : self._filled] = flat
            except OverflowError:
                self._overflow = InvalidRequest(f"{self._at}: a number is too large for {self._datatype}")

    def _judged(self, index: int, value: Any) -> InvalidRequest:
        return wrong_kind(self._at, index, value, self._datatype)

    def _fits(self, flat: list[Any], start: int) -> bool:
        """Tell whether whole numbers fit their type; remember the first that does not."""
        if self._limits is None or self._beyond is not None:
            return self._beyond is None
        least, greatest = self._limits
        if min(flat) < least or max(flat) > greatest:
            index = next(i for i, value in enumerate(flat) if not least <= value <= greatest)
            self._beyond = out_of_range(self._at, start + index, self._datatype)
        return self._beyond is None

    def _flat(self, values: list[Any]) -> list[Any]:
        """Flatten some rows level by level; nothing where a list of a level is not as long as the shape says."""
        if self._seen:
            self._seen[0] += len(values)
        level = values
        for depth, dim in enumerate(self._shape[1:], 1):
            flat: list[Any] = []
            for index, item in enumerate(level, self._seen[depth]):
                if not isinstance(item, list) or len(item) != dim:
                    self._ragged.setdefault(depth, ragged(self._at, index, item, self._shape, dim))
                    return []
                flat += item
            self._seen[depth] += len(level)
            level = flat
        return level

    def array(self) -> Array:
        """Return what was filled. Raises InvalidRequest for the fault that the whole array would be refused for."""
        if self._nested:
            if self._seen[:1] != list(self._shape[:1]):
                raise wrong_rows(self._at, self._seen[0], self._shape)
            if self._ragged:
                raise self._ragged[min(self._ragged)]
        if self._filled != self._size:
            raise wrong_count(self._at, self._filled, self._shape)
        for fault in (self._wrong, self._beyond, self._overflow):
            if fault is not None:
                raise fault
        return self._made.reshape(self._shape)
