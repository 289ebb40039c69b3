"""Columns as Arrow has them, and the feeds that they make: all rows at once, where there is no doubt about any."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from serving.engine.signature import Feature, Signature
from serving.errors import DETAILS_SHOWN, Detail, listed
from serving.protocols.predict_v1_validation import meant
from serving.protocols.strict_json import pointer
from serving.tensors import FLOATS, HALVES, INTEGERS, NUMPY, Array, Tensors, limits

_DUE = {"BYTES": "strings", "BOOL": "booleans"}
_PROBLEM = "the columns do not fit the model's signature"


def arrow_type(feature: Feature) -> Any:
    """Return the type that a feature's text is read as; doubles for all floats, as JSON has them."""
    return column_type("FP64" if feature.datatype in FLOATS else feature.datatype, len(feature.shape))


class ColumnBinder:
    """The columns of one signature, and the feeds made of them."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.features = signature.features
        self.names = [feature.name for feature in signature.features]
        self.types = {feature.name: arrow_type(feature) for feature in signature.features}
        self.at_once = signature.batch != "none" and bool(self.features)
        """Whether many rows make one feed."""

    def check_names(self, names: Sequence[str], hint: str = "") -> None:
        """Refuse columns that are not the model's features, in whatever order. Raises SignatureMismatch."""
        known, given = set(self.names), set(names)
        missing = [name for name in self.names if name not in given]
        details = [Detail(pointer(name), "is missing") for name in missing]
        for name in dict.fromkeys(names):
            if name not in known:
                close = meant(name, set(missing) or known) if len(details) < DETAILS_SHOWN else ""
                details.append(Detail(pointer(name[:256]), f"is not a feature of this model{close}"))
            elif list(names).count(name) > 1:
                details.append(Detail(pointer(name), "occurs twice"))
        if details:
            raise listed(_PROBLEM + hint, details)

    def fitted(self, schema: Any) -> Any:
        """Leave out of a schema what the model does not have, and add what may be missing."""
        kept = [field for field in schema if field.name in self.types]
        added = [feature for feature in self.features if feature.nullable and feature.name not in schema.names]
        return pa.schema(kept + [pa.field(feature.name, self.types[feature.name]) for feature in added])

    def check_types(self, schema: Any) -> None:
        """Refuse columns whose type is none of their feature's. Raises SignatureMismatch."""
        index = _index_names(schema.metadata or {})
        self.check_names([name for name in schema.names if name not in index or name in self.types])
        details = []
        for feature in self.features:
            kind = schema.field(feature.name).type
            if not _takes(feature, kind):
                due = _DUE.get(feature.datatype, "numbers")
                lists = "lists of " * len(feature.shape)
                details.append(
                    Detail(pointer(feature.name), f"is a column of {str(kind)[:100]}, and should be of {lists}{due}")
                )
        if details:
            raise listed(_PROBLEM, details)

    def text_bytes(self, table: Any) -> int:
        """Return how long a RecordBatch's texts are, each by itself: many cells may share one."""
        total = 0
        for feature in self.features:
            if feature.datatype == "BYTES":
                column = table.column(feature.name)
                for _ in feature.shape:
                    column = column.flatten()
                total += _text_bytes(column)
        return total

    def feeds(self, table: Any, *, nan_is_missing: bool = True) -> Tensors | None:
        """Make the feeds of a RecordBatch; None where a cell may be bad, and the rows are to be looked at singly.

        nan_is_missing: else a NaN that stands there is no value.
        """
        arrays = []
        for feature in self.features:
            array = _array(table.column(feature.name), feature, nan_is_missing)
            if array is None:
                return None
            arrays.append(array)
        inputs = self.signature.inputs
        if self.signature.layout == "columns":
            return tuple(
                array.reshape(-1, 1) if array.ndim == 1 and len(spec.shape) == 2 else array
                for array, spec in zip(arrays, inputs, strict=True)
            )
        dtype = NUMPY[inputs[0].datatype]
        matrix: Array = np.empty((len(arrays[0]), len(arrays)), dtype)
        for index, array in enumerate(arrays):
            matrix[:, index] = array
        return (matrix,)


def _index_names(metadata: Any) -> list[Any]:
    """Return the columns that are names of the rows, which pandas writes beside the others."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        return list(json.loads(metadata[b"pandas"])["index_columns"])
    return []


def _text_bytes(column: Any) -> int:
    if pa.types.is_dictionary(column.type):
        return pc.sum(pc.take(_lengths(column.dictionary), column.indices)).as_py() or 0
    return pc.sum(_lengths(column)).as_py() or 0


def _lengths(column: Any) -> Any:
    if pa.types.is_string_view(column.type) and len(column):
        views = np.frombuffer(column.buffers()[1], np.int32)[::4]
        return pa.array(views[column.offset : column.offset + len(column)])
    return pc.binary_length(column.cast(pa.string()) if column.null_count == len(column) else column)


def _takes(feature: Feature, kind: Any) -> bool:
    types = pa.types
    for _ in feature.shape:
        if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            return False
        kind = kind.value_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_null(kind):
        return feature.nullable
    if feature.datatype == "BYTES":
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
    if feature.datatype == "BOOL":
        return bool(types.is_boolean(kind))
    return bool(
        types.is_integer(kind) or types.is_floating(kind) or (types.is_decimal(kind) and feature.datatype in FLOATS)
    )


def _array(column: Any, feature: Feature, nan_is_missing: bool) -> Array | None:
    """Make the array [rows, *shape] of one feature's cells, in its dtype; None in doubt."""
    shape = [len(column)]
    for dim in feature.shape:
        if column.null_count:
            return None
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        length = int(lengths[0]) if len(lengths) else 0
        if (lengths != length).any() or dim not in (-1, length):
            return None
        shape.append(length)
        column = column.flatten()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = feature.datatype == "BYTES"
    array = _texts(column, feature) if text else _numbers(column, feature, nan_is_missing)
    if array is None:
        return None
    refuse = feature.unknown_category == "refuse" and feature.categories is not None
    if refuse and not set(np.unique(array).tolist()) <= set(feature.categories or ()):
        return None
    return array.reshape(shape)


def _texts(column: Any, feature: Feature) -> Array | None:
    if column.null_count:
        if not feature.nullable:
            return None
        column = column.cast(pa.string()).fill_null("")
    made: Array = column.to_numpy(zero_copy_only=False)
    return made


def _numbers(column: Any, feature: Feature, nan_is_missing: bool) -> Array | None:
    missing = column.null_count
    if missing and not feature.nullable:
        return None
    if pa.types.is_decimal(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.float64())
    array: Array = column.to_numpy(zero_copy_only=False)
    if feature.datatype == "BOOL":
        return array
    dtype = NUMPY[feature.datatype]
    if feature.datatype in INTEGERS:
        least, greatest = limits(feature.datatype)
        if len(array) and not (least <= array.min() and array.max() <= greatest):
            return None
        made = array.astype(dtype)
        return made if array.dtype.kind in "iu" or bool((made == array).all()) else None
    with np.errstate(over="ignore", invalid="ignore"):
        made = array.astype(dtype)
    finite = np.isfinite(made)
    if finite.all() or (feature.allow_non_finite and bool((np.isinf(made) == np.isinf(array)).all())):
        return made
    others = len(made) - int(np.count_nonzero(finite))
    right = feature.nullable and int(np.count_nonzero(np.isnan(made))) == others
    return made if right and (nan_is_missing or others == missing) else None


def columns_of(signature: Signature, inputs: Tensors) -> Any:
    """Make a RecordBatch of feeds, a column for each feature: what `ColumnBinder.feeds` would make them of."""
    by_feature: Sequence[Array] = list(inputs[0].T) if signature.layout == "matrix" else inputs
    arrays = [
        column(array.reshape(array.shape[: 1 + len(f.shape)]), column_type(f.datatype, len(f.shape)))
        for f, array in zip(signature.features, by_feature, strict=True)
    ]
    return pa.record_batch(arrays, names=[feature.name for feature in signature.features])


def column_type(datatype: str, dims: int) -> Any:
    """Return the type of a column whose rows are arrays of so many dimensions."""
    kind = pa.float32() if datatype in HALVES else pa.string()
    if datatype != "BYTES" and datatype not in HALVES:
        kind = pa.from_numpy_dtype(NUMPY[datatype])
    for _ in range(dims):
        kind = pa.list_(kind)
    return kind


def column(array: Array, kind: Any) -> Any:
    """Make a column of an array [rows, ...]; of lists where rows have more than one value."""
    depth, leaf = 0, kind
    while pa.types.is_list(leaf):
        depth, leaf = depth + 1, leaf.value_type
    flat = np.ascontiguousarray(array).reshape(-1)
    made = pa.array(flat if flat.dtype.kind != "V" and flat.dtype != np.float16 else flat.astype(np.float32), leaf)
    for dim in range(depth, 0, -1):
        lists = int(np.prod(array.shape[:dim]))
        offsets = np.arange(lists + 1, dtype=np.int32) * np.int32(array.shape[dim])
        made = pa.ListArray.from_arrays(offsets, made)
    return made
