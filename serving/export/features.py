"""Describes a table's columns as features, and makes graph feeds of its rows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from serving.engine.reference import MOST_CATEGORIES
from serving.engine.signature import Feature, TensorSpec
from serving.export.asked import Asked, Image, Layout
from serving.export.refusal import CannotExport
from serving.tensors import NUMPY, Array, Datatype


def features_of(asked: Asked, closed: Collection[str] = ()) -> tuple[Feature, ...]:
    """Describe each column: type and missing values by all rows, range and categories by those of training.

    closed: columns of which the model knows the values of training only, so that others are refused.
    """
    return tuple(_feature(asked, name, closed=str(name) in closed) for name in asked.train.columns)


def _feature(asked: Asked, name: Any, *, closed: bool) -> Feature:
    column, other = asked.train[name], asked.held_out[name]
    present = column[~missing(column)]
    nullable = len(present) < len(column) or bool(missing(other).any())
    datatype = _wider(
        str(name), *(datatype_of(part, double=asked.double) for part in (column, other)), double=asked.double
    )
    unknown = "refuse" if closed else asked.unknown_category
    told: dict[str, Any] = {
        "name": str(name),
        "datatype": datatype,
        "description": asked.descriptions.get(str(name), ""),
        "nullable": nullable,
    }
    if datatype == "BYTES":
        values = sorted({str(value) for value in present.unique()})
        few = closed or (len(values) <= MOST_CATEGORIES and len(values) < len(present) / 2)
        return Feature(**told, categories=tuple(values), unknown_category=unknown) if few else Feature(**told)
    numbers = present.to_numpy(dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    if datatype == "INT64" and (closed or isinstance(column.dtype, pd.CategoricalDtype)):
        return Feature(**told, categories=tuple(sorted({int(v) for v in numbers})), unknown_category=unknown)
    if datatype == "BOOL" or not len(numbers):
        return Feature(**told)
    return Feature(**told, minimum=float(numbers.min()), maximum=float(numbers.max()))


def _wider(name: str, one: Datatype, other: Datatype, *, double: bool) -> Datatype:
    if one == other:
        return one
    if "BYTES" in (one, other):
        raise CannotExport(f"column {name!r}", f"is {one} in train and {other} in held_out", "give both the same types")
    return "FP64" if double else "FP32"


def datatype_of(column: pd.Series[Any], *, double: bool) -> Datatype:
    """Name the type that callers send: whole numbers and booleans stay so, unless some are missing."""
    column = column.infer_objects()
    kind = column.dtype
    values = kind.categories if isinstance(kind, pd.CategoricalDtype) else column
    if not pd.api.types.is_numeric_dtype(values):
        return "BYTES"
    if not missing(column).any():
        if pd.api.types.is_bool_dtype(values):
            return "BOOL"
        if pd.api.types.is_integer_dtype(values):
            return "INT64"
    return "FP64" if double else "FP32"


def missing(column: pd.Series[Any]) -> pd.Series[bool]:
    """Tell which values are missing: NaN, None, or the empty string, which is how a graph knows a missing string."""
    empty = column.astype(object).map(lambda value: isinstance(value, str) and not value)
    return column.isna() | empty.astype(bool)


def feeds_of(
    table: pd.DataFrame,
    inputs: tuple[TensorSpec, ...],
    *,
    layout: Layout,
    image: Image | None,
) -> tuple[Array, ...]:
    """Make the graph's inputs of a table's rows; a missing string is '', a missing number NaN."""
    if layout == "matrix" or image is not None:
        columns = [column_array(table[name], inputs[0].datatype) for name in table.columns]
        array: Array = np.hstack(columns)
        return (array.reshape(-1, *image[1]),) if image else (np.ascontiguousarray(array),)
    return tuple(
        column_array(table[name], spec.datatype).reshape(-1, *(1,) * (len(spec.shape) - 1))
        for name, spec in zip(table.columns, inputs, strict=True)
    )


def column_array(column: pd.Series[Any], datatype: str) -> Array:
    """Make one [rows, 1] input of a column."""
    if datatype == "BYTES":
        values = ["" if pd.isna(value) else str(value) for value in column]
        return np.array(values, dtype=object).reshape(-1, 1)
    if datatype in ("FP32", "FP64"):
        return column.to_numpy(dtype=float, na_value=np.nan).astype(NUMPY[datatype]).reshape(-1, 1)
    return column.to_numpy().astype(NUMPY[datatype]).reshape(-1, 1)


def plain_row(table: pd.DataFrame, index: int, features: tuple[Feature, ...]) -> dict[str, Any]:
    """Make one row as a caller would send it."""
    row: dict[str, Any] = {}
    for name, feature in zip(table.columns, features, strict=True):
        value = table[name].iloc[index]
        if pd.isna(value) or (isinstance(value, str) and not value):
            row[feature.name] = None
        elif feature.datatype == "BYTES":
            row[feature.name] = str(value)
        else:
            kind = {"INT64": int, "BOOL": bool}.get(feature.datatype, float)
            row[feature.name] = kind(value)
    return row
