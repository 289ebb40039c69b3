"""Reads a tensor's `data` from JSON, flat or nested, with nothing converted that was not meant."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from serving.errors import InvalidRequest
from serving.protocols.strict_json import kind
from serving.tensors import FLOATS, HALVES, INTEGERS, NUMPY, Array, count, limits


def array_of(data: Any, datatype: str, shape: tuple[int, ...], at: str, *, missing: bool = False) -> Array:
    """Make the array. Nested data must have exactly `shape`; flat data as many elements.

    missing: null is taken, as NaN or an empty string. A number is no array, but of a shape without dimensions.
    Raises InvalidRequest naming the first bad element by its place under `at`.
    """
    if not shape and not isinstance(data, list):
        data = [data]
    if not isinstance(data, list):
        raise InvalidRequest(f"{at}: is {kind(data)}: send an array")
    if datatype in HALVES:
        raise InvalidRequest(f"{at}: {datatype} has no JSON form in the protocol: send it as binary data")
    nested = bool(data) and bool(shape) and isinstance(data[0], list)
    flat = _flatten(data, shape, at) if nested else data
    if len(flat) != count(shape):
        raise InvalidRequest(f"{at}: has {len(flat)} elements, and shape {list(shape)} holds {count(shape)}")
    accepted = _ACCEPTED[datatype]
    if missing and None in flat:
        flat = [_MISSING[datatype] if value is None else value for value in flat]
    for index, value in enumerate(flat):
        if type(value) not in accepted:
            raise InvalidRequest(f"{at}: element {index} is {kind(value)}, and {datatype} takes {_TAKES[datatype]}")
    if datatype in INTEGERS and flat:
        least, greatest = limits(datatype)
        if min(flat) < least or max(flat) > greatest:
            index = next(i for i, v in enumerate(flat) if not least <= v <= greatest)
            raise InvalidRequest(f"{at}: element {index} does not fit {datatype} ({least} to {greatest})")
    try:
        with np.errstate(over="ignore"):  # the caller refuses what overflowed, by name
            array: Array = np.array(flat, dtype=NUMPY[datatype])
    except OverflowError:
        raise InvalidRequest(f"{at}: a number is too large for {datatype}") from None
    if datatype in FLOATS and (infinite := np.isinf(array)).any():  # JSON has none: it did not fit
        raise InvalidRequest(f"{at}: element {int(np.argmax(infinite))} is too large for {datatype}")
    return array.reshape(shape)


_ACCEPTED: dict[str, frozenset[type]] = {
    **{name: frozenset({int}) for name in INTEGERS},
    **{name: frozenset({int, float}) for name in FLOATS},
    "BOOL": frozenset({bool}),
    "BYTES": frozenset({str}),
}
_MISSING = {**dict.fromkeys(FLOATS, math.nan), "BYTES": ""}
_TAKES = {
    **dict.fromkeys(INTEGERS, "whole numbers"),
    **dict.fromkeys(FLOATS, "numbers"),
    "BOOL": "true and false",
    "BYTES": "strings",
}


def _flatten(data: list[Any], shape: tuple[int, ...], at: str) -> list[Any]:
    """Flatten nested lists level by level; every list of a level must be as long as the shape says."""
    level = data
    if len(level) != shape[0]:
        raise InvalidRequest(f"{at}: has {len(level)} rows, and shape {list(shape)} says {shape[0]}")
    for dim in shape[1:]:
        flat: list[Any] = []
        for index, item in enumerate(level):
            if not isinstance(item, list) or len(item) != dim:
                got = f"{len(item)} values" if isinstance(item, list) else kind(item)
                raise InvalidRequest(f"{at}: part {index} has {got}, and shape {list(shape)} says {dim}: ragged?")
            flat += item
        level = flat
    return level
