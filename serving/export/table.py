"""Takes rows in the forms that people have them in, and makes one table of named columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from serving.export.refusal import CannotExport


def table_of(rows: Any, *, what: str, like: pd.DataFrame | None = None) -> pd.DataFrame:
    """Make a table of a DataFrame (pandas, polars or another that can make a dict), an array or a Series.

    An array's columns are called f0, f1, ... `like` gives names and order: columns that have the same names in another
    order are put in it. Raises CannotExport, which says what is wrong with `what`.
    """
    if isinstance(rows, pd.DataFrame):
        table = rows
    elif isinstance(rows, pd.Series):
        table = rows.to_frame("text" if rows.name is None else str(rows.name))
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # polars
        table = pd.DataFrame(rows.to_dict(as_series=False))
    elif hasattr(rows, "to_list") and hasattr(rows, "name"):  # a polars Series
        table = pd.DataFrame({rows.name or "text": rows.to_list()})
    else:
        rows = rows.toarray() if hasattr(rows, "toarray") else rows  # a sparse matrix
        table = _of_array(np.asarray(rows, dtype=object if isinstance(rows, list) else None), what)
        if like is not None and table.shape[1] == like.shape[1]:
            table.columns = like.columns
    if table.shape[0] == 0 or table.shape[1] == 0:
        raise CannotExport(
            what, "has no rows" if table.shape[1] else "has no columns", "give the rows it was fitted on"
        )
    names = [str(name) for name in table.columns]
    if "" in names:
        raise CannotExport(what, "has a column without a name", "give each column a name of its own")
    if len(set(names)) < len(names):
        raise CannotExport(what, "has two columns of the same name", "give each column a name of its own")
    if like is not None:
        return _ordered(table, like, what)
    for name in table.columns:
        _served(table[name], what)
    return table


def _of_array(array: Any, what: str) -> pd.DataFrame:
    if array.ndim not in (1, 2):
        raise CannotExport(what, f"is an array of {array.ndim} dimensions", "give rows and columns")
    columns = ["text"] if array.ndim == 1 else [f"f{i}" for i in range(array.shape[1])]
    table = pd.DataFrame(array if array.ndim == 2 else array.reshape(-1, 1), columns=columns)
    return table.infer_objects() if array.dtype == object else table


def _ordered(table: pd.DataFrame, like: pd.DataFrame, what: str) -> pd.DataFrame:
    if list(table.columns) == list(like.columns):
        return table
    absent = [str(name) for name in like.columns if name not in table.columns]
    if absent:
        raise CannotExport(what, f"lacks columns that train has: {', '.join(absent[:10])}", "give the same columns")
    return table[list(like.columns)]


def _served(column: pd.Series[Any], what: str) -> None:
    """Refuse a column of which no caller could send a value as JSON."""
    kind = column.dtype
    values = kind.categories.dtype if isinstance(kind, pd.CategoricalDtype) else kind
    place = f"column {str(column.name)!r} of {what}"
    if pd.api.types.is_datetime64_any_dtype(values) or pd.api.types.is_timedelta64_dtype(values):
        raise CannotExport(
            place, "holds times, which no ONNX input carries", "fit on numbers, such as days since a date"
        )
    if pd.api.types.is_complex_dtype(values):
        raise CannotExport(place, "holds complex numbers", "split it into two columns of real numbers")
    if not is_number(column):
        odd = [
            v for v in column.dropna().head(1000) if not isinstance(v, str | bool | np.bool_ | int | float | np.number)
        ]
        if odd:
            raise CannotExport(place, f"holds {type(odd[0]).__name__}", "fit on strings or numbers made of it")


def is_number(column: pd.Series[Any]) -> bool:
    """Tell whether a column holds numbers or booleans, and not strings or pandas' categories."""
    return pd.api.types.is_numeric_dtype(column)
