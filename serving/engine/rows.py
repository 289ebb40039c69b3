"""Rows by feature name or position: the Pydantic types that check them, and the arrays made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from pydantic_core import CoreConfig, CoreSchema, SchemaValidator, core_schema
from typing_extensions import TypedDict

from serving.engine.signature import Feature, Signature
from serving.errors import SignatureMismatch
from serving.tensors import FLOATS, INTEGERS, NUMPY, Array, Tensors, limits

STRICT = ConfigDict(strict=True, extra="forbid")
_CORE_STRICT = CoreConfig(strict=True, extra_fields_behavior="forbid")


def cell_type(feature: Feature) -> Any:
    """Make the type of one feature's value in one row: strict, described, nested lists where it has a shape."""
    kind = _scalar(feature)
    if feature.nullable:
        kind = kind | None
    for dim in reversed(feature.shape):
        length = {} if dim == -1 else {"min_length": dim, "max_length": dim}
        kind = Annotated[list[kind], Field(**length)]  # type: ignore[valid-type,call-overload]
    return Annotated[kind, Field(description=described(feature) or None)]


def _scalar(feature: Feature) -> Any:
    if feature.categories is not None and feature.unknown_category == "refuse":
        return Literal[tuple(feature.categories)]
    if feature.datatype in FLOATS:
        return Annotated[float, Field(allow_inf_nan=False)]  # JSON has neither; NaN is written as null
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
    """Types, validators and conversions for the rows of one signature.

    Types, for documentation: `named` is a TypedDict of all features, `single` the value itself where the model has one
    feature, else None, `columns` a TypedDict of lists. Validators check the same, and `positional`, a fixed list; they
    are put together of Pydantic's parts, since a type of a thousand features takes it a tenth of a second.
    """

    def __init__(self, signature: Signature, title: str) -> None:
        self.signature = signature
        self._title = title
        self._matrix = signature.layout == "matrix"
        self._dtype = NUMPY[signature.inputs[0].datatype] if self._matrix else None
        self.names = [feature.name for feature in signature.features]

    @cached_property
    def _types(self) -> dict[str, Any]:
        return {feature.name: cell_type(feature) for feature in self.signature.features}

    @property
    def named(self) -> Any:
        """The type of a row by feature name."""
        return with_config(STRICT)(TypedDict(f"{self._title} row", self._types))  # type: ignore[operator]

    @property
    def columns(self) -> Any:
        """The type of columns by feature name."""
        columns = {name: list[cell] for name, cell in self._types.items()}  # type: ignore[valid-type]
        return with_config(STRICT)(TypedDict(f"{self._title} columns", columns))  # type: ignore[operator]

    @property
    def single(self) -> Any:
        """The type of a row that is its only feature's value."""
        return next(iter(self._types.values())) if len(self.names) == 1 else None

    @cached_property
    def _cells(self) -> list[CoreSchema]:
        """What checks each feature's value: one for all features of a kind."""
        made: dict[tuple[Any, ...], CoreSchema] = {}
        cells = []
        for f in self.signature.features:
            kind = (f.datatype, f.shape, f.nullable, f.unknown_category, f.categories)
            if kind not in made:
                made[kind] = TypeAdapter(cell_type(f), config=STRICT).core_schema
            cells.append(made[kind])
        return cells

    def one(self, form: str, *, fail_fast: bool = False) -> SchemaValidator:
        """Make what checks one row of a form (named, positional, single), or all columns (columns).

        fail_fast: of a column with a wrong cell it says no more than that.
        """
        return SchemaValidator(self._schema(form, fail_fast=fail_fast), _CORE_STRICT)

    def all(self, form: str) -> SchemaValidator:
        """Make what checks a whole body of rows of a form, {"instances": [...]}, and stops at the first wrong row."""
        rows = core_schema.list_schema(self._schema(form), fail_fast=True)
        return SchemaValidator(_object({"instances": rows}), _CORE_STRICT)

    def _schema(self, form: str, *, fail_fast: bool = False) -> CoreSchema:
        if form == "named":
            return _object(dict(zip(self.names, self._cells, strict=True)))
        if form == "columns":
            columns = [core_schema.list_schema(cell, fail_fast=fail_fast) for cell in self._cells]
            return _object(dict(zip(self.names, columns, strict=True)))
        return core_schema.tuple_schema(self._cells) if form == "positional" else self._cells[0]

    def arrays(self, rows: Sequence[Sequence[Any]]) -> Tensors:
        """Make the feeds of validated rows, each a sequence of cells in feature order; null is NaN or ''."""
        if self._dtype is not None:
            if self._dtype.hasobject:
                return (np.array([["" if c is None else c for c in row] for row in rows], dtype=object),)
            return (_numbers(rows, self._dtype),)
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
        array: Array = _numbers(values, NUMPY[spec.datatype])
        if array.dtype.hasobject and array.size and isinstance(array.flat[0], list):
            # numpy refuses ragged numbers, and takes ragged strings as a column of lists.
            raise ValueError("rows have different shapes")
        if self._matrix:
            return array
        if self.signature.batch == "none":
            array = array.reshape(array.shape[1:])
        elif array.ndim == 1 and len(spec.shape) == 2:
            array = array.reshape(-1, 1)  # a scalar feature is a [batch, 1] column for most exporters, [batch] for some
        if not array.size and array.ndim < len(spec.shape):
            array = array.reshape(*array.shape, *self._behind_an_empty_one(index, spec.shape[array.ndim :]))
        return array

    def _behind_an_empty_one(self, index: int, dims: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the dimensions behind one of size 0, which lists do not show."""
        if -1 in dims:
            name = self.names[index]
            raise SignatureMismatch(f"{name}: is empty, and its shape can't be told from lists: send a tensor over /v2")
        return dims


def _numbers(values: Any, dtype: np.dtype[Any]) -> Array:
    """Make an array of what JSON has; numpy knows of None as a number that is missing, and BF16 does not."""
    if dtype == NUMPY["BF16"]:
        return np.array(values, dtype=np.float64).astype(dtype)
    return np.array(values, dtype=dtype)


def _object(fields: dict[str, Any]) -> CoreSchema:
    parts = {name: core_schema.typed_dict_field(schema, required=True) for name, schema in fields.items()}
    return core_schema.typed_dict_schema(parts, extra_behavior="forbid", config=_CORE_STRICT)
