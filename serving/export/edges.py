"""Rows at the edge of what a model takes: missing values, categories that training did not see, ends of ranges."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from serving.engine.signature import Feature

MOST_COLUMNS = 200
"""Columns that get rows of their own; all get their ends in rows together."""

Kind = Literal["ends", "missing", "unseen", "between"]


class Edge(NamedTuple):
    """One changed cell: its row is like a held-out one but for this. `column` is "" where all were changed."""

    kind: Kind
    column: str


def edge_rows(
    train: pd.DataFrame, held_out: pd.DataFrame, features: tuple[Feature, ...]
) -> tuple[list[Edge], pd.DataFrame]:
    """Make the rows, as objects: a caller may send what the table's own types could not hold."""
    edges: list[Edge] = []
    rows: list[dict[Any, Any]] = []
    base = {name: held_out[name].iloc[len(held_out) // 2] for name in train.columns}

    def add(kind: Kind, column: str, values: dict[Any, Any]) -> None:
        edges.append(Edge(kind, column))
        rows.append(base | values)

    least: dict[Any, Any] = {}
    most: dict[Any, Any] = {}
    for index, (name, feature) in enumerate(zip(train.columns, features, strict=True)):
        least[name], most[name] = _ends(train[name], feature, base[name])
        if index >= MOST_COLUMNS:
            continue
        for value in (least[name], most[name]):
            add("ends", str(name), {name: value})
        if feature.nullable:
            add("missing", str(name), {name: _missing_of(train[name])})
        unseen = _unseen(feature)
        if unseen is not None:
            add("unseen", str(name), {name: unseen})
        if feature.datatype in ("FP32", "FP64") and feature.minimum is not None and feature.maximum is not None:
            between = np.float32(feature.minimum + 0.382 * (feature.maximum - feature.minimum))
            halves = train[name].dtype == np.float16
            add("between", str(name), {name: float(np.float16(between) if halves else between)})
    add("ends", "", least)
    add("ends", "", most)
    return edges, pd.DataFrame(rows, columns=train.columns, dtype=object)


def _ends(column: pd.Series[Any], feature: Feature, otherwise: Any) -> tuple[Any, Any]:
    if feature.datatype == "BOOL":
        return False, True
    if feature.categories:
        return feature.categories[0], feature.categories[-1]
    if feature.minimum is None or feature.maximum is None:
        return otherwise, otherwise
    kind = int if feature.datatype == "INT64" else float
    return kind(feature.minimum), kind(feature.maximum)


def _missing_of(column: pd.Series[Any]) -> Any:
    """Return a missing value as this column has it: NaN, None, pandas' NA, or the empty string."""
    absent = column[column.isna()]
    return absent.iloc[0] if len(absent) else ""


def _unseen(feature: Feature) -> Any:
    if feature.datatype == "BYTES":
        return "Ünseen-value 8"
    if feature.datatype == "INT64":
        return max(feature.categories) + 1 if feature.categories else int(feature.maximum or 0) + 1  # type: ignore[operator]
    return None


def typed(rows: pd.DataFrame, train: pd.DataFrame) -> pd.DataFrame:
    """Give rows of objects the types of the training table, as the original wants them."""
    columns = {}
    for name in train.columns:
        try:
            columns[name] = rows[name].astype(train[name].dtype)
        except (TypeError, ValueError):  # a missing value among what were whole numbers in training
            columns[name] = pd.to_numeric(rows[name].map(lambda v: np.nan if pd.isna(v) else v))
    return pd.DataFrame(columns)
