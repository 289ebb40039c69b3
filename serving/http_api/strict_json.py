"""JSON as RFC 8259 has it, and no more: no NaN, no duplicate keys, no numbers beyond a double."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

from serving.errors import InvalidRequest
from serving.tensor_bytes import Buffer


def loads(body: Buffer) -> Any:
    """Parse, refusing what two parsers could read in two ways.

    Raises InvalidRequest with the place of the fault.
    """
    if not body:
        raise InvalidRequest("the body is empty: send a JSON object, as /docs shows")
    try:
        return parse(bytes(body).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(error.start) from None
    except json.JSONDecodeError as error:
        raise not_json(error.msg, error.lineno, error.colno) from None
    except RecursionError:
        raise too_deep() from None


def parse(text: str, constant: Callable[[str], Any] | None = None) -> Any:
    """Parse text; `constant` makes the value of a NaN or an Infinity, which are refused without it.

    Raises InvalidRequest, JSONDecodeError or RecursionError.
    """
    return json.loads(
        text,
        object_pairs_hook=_unique,
        parse_constant=constant or no_constant,
        parse_float=_finite,
        parse_int=_whole,
    )


def not_utf8(offset: int) -> InvalidRequest:
    """Say at which byte a body is no UTF-8."""
    return InvalidRequest(f"the body is not UTF-8: byte {offset} can't be decoded")


def not_json(problem: str, line: int, column: int) -> InvalidRequest:
    """Say what the parser found, and where."""
    return InvalidRequest(f"the body is not JSON: {problem.lower()} at line {line}, column {column}")


def twice(key: str) -> InvalidRequest:
    """Say which key stands twice in one object."""
    return InvalidRequest(f"the key {key[:64]!r} stands twice in one object: send it once")


def too_deep() -> InvalidRequest:
    """Say that there are too many brackets in each other."""
    return InvalidRequest("the body is nested too deeply")


def dumps(value: Any) -> bytes:
    """Write JSON; numpy arrays are written as they are, and non-finite numbers as null."""
    return orjson.dumps(value, listed, orjson.OPT_SERIALIZE_NUMPY)


def listed(value: Any) -> list[Any]:
    """Give orjson an array of a type that it does not know (BF16) as a list; its `default`."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    raise TypeError


def pointer(*parts: str | int) -> str:
    """Write a JSON pointer (RFC 6901).

    >>> pointer("instances", 3, "a/b")
    '/instances/3/a~1b'
    """
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def kind(value: Any) -> str:
    """Name a JSON value's type as a person would.

    >>> kind([1]), kind(None), kind(True), kind(1.5)
    ('an array', 'null', 'a boolean', 'a number')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise twice(doubled)
    return made


def no_constant(token: str) -> Any:
    """Refuse NaN and the infinities."""
    raise InvalidRequest(f"{token} is not JSON: send null for a missing value, or a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise InvalidRequest(f"the number {text[:32]} is too large for a double")
    return number


def _whole(text: str) -> int:
    if len(text) > 400:
        raise InvalidRequest("a number has over 400 digits")
    return int(text)
