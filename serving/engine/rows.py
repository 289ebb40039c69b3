"""Rows by feature name or position: the Pydantic types that check them, and the arrays made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from serving.engine.signature import Feature, Signature
from serving.tensors import FLOATS, INTEGERS, NUMPY, Array, Tensors, limits

STRICT = ConfigDict(strict=True, extra="forbid")


def cell_type(feature: Feature) -> Any:
    """Make the type of one feature's value in one row: strict, described, nested lists where it has a shape."""
    kind = _scalar(feature)
    for dim in reversed(feature.shape):
        length = {} if dim == -1 else {"min_length": dim, "max_length": dim}
        kind = Annotated[list[kind], Field(**length)]  # type: ignore[valid-type,call-overload]
    if feature.nullable:
        kind = kind | None
    return Annotated[kind, Field(description=described(feature) or None)]


def _scalar(feature: Feature) -> Any:
    if feature.categories is not None and feature.unknown_category == "refuse":
        return Literal[tuple(feature.categories)]
    if feature.datatype in FLOATS:
        return Annotated[float, Field(allow_inf_nan=feature.allow_non_finite)]
    if feature.datatype in INTEGERS:
        least, greatest = limits(feature.datatype)
        return Annotated[int, Field(ge=least, le=greatest)]
    return bool if feature.datatype == "BOOL" else str


def described(feature: Feature) -> str:
    """Say in one line what a value means: description, range or categories seen in training, missing values."""
    parts = [feature.description.rstrip(".")] if feature.description else []
    if feature.minimum is not None and feature.maximum is not None:
        parts.append(f"training saw {feature.minimum:g} to {feature.maximum:g}")
    if feature.categories:
        parts.append("one of " if feature.unknown_category == "refuse" else "training saw ")
        parts[-1] += ", ".join(str(c) for c in feature.categories[:50])
    if feature.nullable:
        parts.append("null where missing")
    return "; ".join(parts)


class Rows:
    """Types and conversions for the rows of one signature.

    `named` is a TypedDict of all features; `positional` a fixed list of them; `single` the value itself where the
    model has one feature, else None; `columns` a TypedDict of lists.
    """

    def __init__(self, signature: Signature, title: str) -> None:
        self.signature = signature
        cells = {feature.name: cell_type(feature) for feature in signature.features}
        self.named: Any = with_config(STRICT)(TypedDict(f"{title} row", cells))  # type: ignore[operator]
        self.columns: Any = with_config(STRICT)(
            TypedDict(f"{title} columns", {name: list[cell] for name, cell in cells.items()})  # type: ignore[operator,valid-type]
        )
        kinds = list(cells.values())
        self.single: Any = kinds[0] if len(kinds) == 1 else None
        self.positional: Any = tuple[tuple(kinds)]  # type: ignore[misc]
        self._matrix = signature.layout == "matrix"
        self._dtype = NUMPY[signature.inputs[0].datatype]
        self._checked = [f.datatype in FLOATS - {"FP64"} and not f.allow_non_finite for f in signature.features]
        self.names = [feature.name for feature in signature.features]

    def arrays(self, rows: Sequence[Sequence[Any]]) -> Tensors:
        """Make the feeds of validated rows, each a sequence of cells in feature order; null is NaN or ''."""
        if self._matrix:
            if self._dtype.hasobject:
                return (np.array([["" if c is None else c for c in row] for row in rows], dtype=object),)
            return (np.array(rows, dtype=self._dtype),)
        return self.feeds([[row[i] for row in rows] for i in range(len(self.names))])

    def feeds(self, columns: Sequence[Sequence[Any]]) -> Tensors:
        """Make the feeds of validated columns, in feature order, each with one cell a row."""
        if self._matrix:
            return self.arrays(list(zip(*columns, strict=True)))
        return tuple(self.column(index, values) for index, values in enumerate(columns))

    def column(self, index: int, values: Sequence[Any]) -> Array:
        """Make the array of one feature's validated cells, one a row: of a matrix its column, else a whole feed."""
        spec = self.signature.inputs[0 if self._matrix else index]
        if spec.datatype == "BYTES":
            values = ["" if v is None else v for v in values]
        array: Array = np.array(values, dtype=NUMPY[spec.datatype])
        if array.dtype.hasobject and array.size and isinstance(array.flat[0], list):
            # numpy refuses ragged numbers, and takes ragged strings as a column of lists.
            raise ValueError("rows have different shapes")
        if self._matrix:
            return array
        if self.signature.batch == "none":
            return array[0] if array.dtype != object else np.array(values[0], dtype=object)
        # A scalar feature is a [batch, 1] column for most exporters and [batch] for some.
        return array.reshape(-1, 1) if array.ndim == 1 and len(spec.shape) == 2 else array


def row_adapter(kind: Any) -> TypeAdapter[Any]:
    """Make the strict adapter of one row, for looking at rows one by one when something is wrong."""
    return TypeAdapter(kind) if hasattr(kind, "__pydantic_config__") else TypeAdapter(kind, config=STRICT)
