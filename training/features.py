"""Describes a table's columns as features, and makes graph feeds of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from serving.engine.signature import Feature, TensorSpec
from serving.tensors import NUMPY, Array

HISTOGRAM_BINS = 10
MOST_CATEGORIES = 100


def features_of(
    table: pd.DataFrame,
    *,
    descriptions: Mapping[str, str],
    unknown_category: Literal["accept", "refuse"],
    double: bool = False,
) -> tuple[Feature, ...]:
    """Describe each column: type, range or categories, missing values, histogram."""
    return tuple(
        _feature(str(name), table[name], descriptions.get(str(name), ""), unknown_category, double)
        for name in table.columns
    )


def _feature(
    name: str, column: pd.Series[Any], description: str, unknown: Literal["accept", "refuse"], double: bool
) -> Feature:
    present = column[~missing(column)]
    nullable = len(present) < len(column)
    if pd.api.types.is_numeric_dtype(column):
        counts, edges = np.histogram(present.to_numpy(dtype=float), bins=HISTOGRAM_BINS)
        return Feature(
            name=name,
            datatype="FP64" if double else "FP32",
            description=description,
            nullable=nullable,
            minimum=float(present.min()),
            maximum=float(present.max()),
            histogram=(tuple(round(float(e), 6) for e in edges), tuple(int(c) for c in counts)),
        )
    values = sorted(str(value) for value in present.unique())
    few = len(values) <= MOST_CATEGORIES and len(values) < len(present) / 2
    return Feature(
        name=name,
        datatype="BYTES",
        description=description,
        nullable=nullable,
        categories=tuple(values) if few else None,
        unknown_category=unknown if few else "accept",
    )


def missing(column: pd.Series[Any]) -> pd.Series[bool]:
    """Tell which values are missing: NaN, None, or the empty string, which is how a graph knows a missing string."""
    return column.isna() | column.eq("")


def feeds_of(
    table: pd.DataFrame,
    inputs: tuple[TensorSpec, ...],
    *,
    layout: Literal["matrix", "columns"],
    image: tuple[int, ...] | None = None,
) -> tuple[Array, ...]:
    """Make the graph's inputs of a table's rows; a missing string is '', a missing number NaN."""
    if layout == "matrix" or image is not None:
        array: Array = table.to_numpy(dtype=NUMPY[inputs[0].datatype])
        return (array.reshape(-1, *image),) if image else (np.ascontiguousarray(array),)
    return tuple(column_array(table[name], spec.datatype) for name, spec in zip(table.columns, inputs, strict=True))


def column_array(column: pd.Series[Any], datatype: str) -> Array:
    """Make one [rows, 1] input of a column."""
    if datatype == "BYTES":
        values = ["" if value is None or value != value else str(value) for value in column]  # noqa: PLR0124  NaN
        return np.array(values, dtype=object).reshape(-1, 1)
    return column.to_numpy(dtype=NUMPY[datatype]).reshape(-1, 1)


def plain_row(table: pd.DataFrame, index: int) -> dict[str, Any]:
    """Make one row as a caller would send it."""
    row: dict[str, Any] = {}
    for name, value in table.iloc[index].items():
        absent = bool(missing(pd.Series([value], dtype=object)).iloc[0])
        row[str(name)] = None if absent else value.item() if hasattr(value, "item") else value
    return row
