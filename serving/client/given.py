"""What a caller gives as rows, and how the answer is given back in kind: rows, arrays, pandas, polars.

pandas and polars are never imported here: a caller who gives a frame of one of them has it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import orjson

from serving.errors import Detail, InvalidRequest, listed
from serving.protocols.strict_json import pointer
from serving.tensors import Array

Values: TypeAlias = Sequence[Any] | Array
"""One column: a value a row. A missing one is None, in arrays of floats NaN."""
Columns: TypeAlias = dict[str, Array]
"""An answer by column: `label` [rows], `probabilities` [rows, classes], or outputs by name, rows first."""

BINARY_CELLS = 4000
"""Cells of rows given as Python's objects from which they go as tensors: below it JSON costs as little."""
ACCEPTED = "rows (dicts or lists), a NumPy array, a dict of arrays, or a DataFrame of pandas or polars"


class Frame(Protocol):
    """A DataFrame of pandas or polars."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""

    def __len__(self) -> int: ...


F = TypeVar("F", bound=Frame)
Arrays: TypeAlias = Array | Mapping[str, Array]


class Given(NamedTuple):
    """Rows as they were given; one of the last three is there."""

    kind: Literal["row", "rows", "array", "arrays", "pandas", "polars"]
    itself: Any
    rows: Sequence[Any] | None = None
    """As JSON has them: dicts by feature name, lists by position, or values of the only feature."""
    columns: Mapping[str, Values] | None = None
    """By feature name; for `arrays`, also by input name."""
    array: Array | None = None
    """[rows, features], or the model's only input."""


def given(data: Any) -> Given:
    """Tell what it is. Raises InvalidRequest for what is none of it."""
    if isinstance(data, np.ndarray):
        if not data.ndim or not len(data):
            raise InvalidRequest("the array has no rows: give at least one, as array[None] makes of a single row")
        return Given("array", data, array=data)
    if isinstance(data, Mapping):
        if data and all(isinstance(values, np.ndarray) for values in data.values()):
            return Given("arrays", data, columns=data)
        return Given("row", data, rows=[data])
    for kind, values in _FRAMES.items():
        library = sys.modules.get(kind)
        if library is not None and isinstance(data, library.DataFrame):
            if not len(data):
                raise InvalidRequest("the frame has no rows: give at least one")
            return Given(kind, data, columns={str(name): values(data[name]) for name in data.columns})
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        if not data:
            raise InvalidRequest("there are no rows: give at least one")
        return Given("rows", data, rows=data)
    raise InvalidRequest(f"rows can't be a {type(data).__name__}: give {ACCEPTED}")


def cells(rows: Sequence[Any]) -> int:
    """Count the values of rows."""
    width = len(rows[0]) if isinstance(rows[0], Mapping | list) else 1
    return len(rows) * width


def _pandas(series: Any) -> Values:
    array = series.to_numpy()
    if array.dtype.kind in "biuf":
        return np.asarray(array)
    missing = series.isna().to_numpy()
    return [None if gone else value for value, gone in zip(series.tolist(), missing, strict=True)]


def _polars(series: Any) -> Values:
    return series.to_list() if series.null_count() or not series.dtype.is_numeric() else np.asarray(series.to_numpy())


_FRAMES: dict[Literal["pandas", "polars"], Callable[[Any], Values]] = {"pandas": _pandas, "polars": _polars}


def in_kind(asked: Given, columns: Columns, classes: Sequence[Any]) -> Any:
    """Give back arrays as arrays, and a frame as a frame of the same library; pandas keeps its index.

    Of a frame, scores become a column for each class: `probabilities.setosa`.
    """
    if asked.kind in ("array", "arrays"):
        return columns
    flat: dict[str, Any] = {}
    for name, column in columns.items():
        if column.ndim == 2 and name in ("probabilities", "scores") and column.shape[1] == len(classes):
            flat |= {f"{name}.{c}": column[:, i] for i, c in enumerate(classes)}
        else:
            flat[name] = column if column.ndim == 1 else list(column)
    if asked.kind == "pandas":
        return sys.modules["pandas"].DataFrame(flat, index=asked.itself.index)
    plain = {name: c.tolist() if isinstance(c, np.ndarray) and c.dtype.hasobject else c for name, c in flat.items()}
    return sys.modules["polars"].DataFrame(plain)


def body(asked: Given, names: Sequence[str]) -> bytes:
    """Write the rows as a V1 request. names: of the features, for an array's columns.

    Raises InvalidRequest for what JSON has no form for, SignatureMismatch for infinite numbers.
    """
    if asked.rows is not None:
        return written({"instances": asked.rows})
    columns = asked.columns
    if asked.array is not None:
        columns = columns_of(asked.array, names)
    return written({"inputs": dict(columns or {})})


def columns_of(array: Array, names: Sequence[str]) -> dict[str, Array]:
    """Name the columns of an array. Raises InvalidRequest where there are not as many as names."""
    if len(names) == 1:
        return {names[0]: array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array}
    if array.ndim != 2 or array.shape[1] != len(names):
        raise InvalidRequest(
            f"the array has shape {list(array.shape)}, and the model takes rows of {len(names)} features: "
            f"{', '.join(names)}"[:600]
        )
    return {name: array[:, index] for index, name in enumerate(names)}


def written(document: dict[str, Any]) -> bytes:
    """Write a document of one member as JSON. Raises as `body` does."""
    ((name, value),) = document.items()
    try:
        made = orjson.dumps(document, _as_json, orjson.OPT_SERIALIZE_NUMPY)
    except (TypeError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"{name}: can't be written as JSON: {error}") from None
    # What is not finite is written as null, which for NaN is what it means.
    if b"null" in made and (details := _infinite(value, (name,))):
        raise listed("JSON has no infinite numbers", details)
    return made


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    pandas = sys.modules.get("pandas")
    if pandas is not None and value is pandas.NA:
        return None
    raise TypeError(f"a value is a {type(value).__name__}")


def _infinite(value: Any, at: tuple[str | int, ...]) -> list[Detail]:
    """Find the infinite numbers: nulls on the wire, which would be taken for missing values."""
    if isinstance(value, float | np.floating):
        return [Detail(pointer(*at), "is infinite")] if np.isinf(value) else []
    if isinstance(value, np.ndarray):
        if value.dtype.kind != "f" or not np.isinf(value).any():
            return []
        return [Detail(pointer(*at, *map(int, place)), "is infinite") for place in np.argwhere(np.isinf(value))]
    if isinstance(value, Mapping):
        return [found for key, part in value.items() for found in _infinite(part, (*at, str(key)))]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [found for index, part in enumerate(value) for found in _infinite(part, (*at, index))]
    return []
