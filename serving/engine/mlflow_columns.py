"""The inputs of a signature as MLflow writes them (JSON), and what they add to what a graph says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from serving.engine.signature import Feature, Signature
from serving.errors import ModelInvalid
from serving.tensors import FLOATS, Datatype

METADATA_KEY = "mlflow.signature.inputs"
"""Under which a file has them in its metadata, where it was made of a folder of MLflow's."""

_TYPES: dict[str, Datatype] = {
    "boolean": "BOOL",
    "integer": "INT64",
    "long": "INT64",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}


@dataclass(frozen=True, slots=True)
class Column:
    """An input of MLflow's signature: its name, its type where it is one value a row, and whether it may be missing."""

    name: str
    datatype: Datatype | None
    optional: bool = False


def read(inputs: str | None) -> tuple[Column, ...]:
    """Read them; none where there are none, or one unnamed tensor. Raises ModelInvalid for types nobody can send."""
    columns = [_column(entry) for entry in json.loads(inputs or "[]")]
    named = tuple(column for column in columns if column.name)
    return named if len(named) == len(columns) else ()


def _column(entry: dict[str, Any]) -> Column:
    name, kind = entry.get("name", ""), entry["type"]
    if kind == "tensor":
        return Column(name, None)
    if kind not in _TYPES:
        raise ModelInvalid(f"input {name!r} of MLmodel is of type {kind}")
    return Column(name, _TYPES[kind], not entry.get("required", True))


def describe(signature: Signature, columns: tuple[Column, ...]) -> Signature:
    """Give a graph's own signature their names, types and missing values. Raises ModelInvalid where they don't fit."""
    if not columns:
        return signature
    if signature.layout == "matrix":
        width = signature.inputs[0].shape[-1]
        if width not in (-1, len(columns)):
            raise ModelInvalid(f"MLmodel names {len(columns)} inputs, and its file takes {width} columns")
        known = Feature(name="", datatype=signature.inputs[0].datatype)
        return signature.model_copy(update={"features": tuple(_feature(known, column) for column in columns)})
    by_name = {column.name: column for column in columns}
    absent = [feature.name for feature in signature.features if feature.name not in by_name]
    if absent:
        raise ModelInvalid(f"MLmodel names no input {', '.join(absent[:10])}, which its file takes")
    features = tuple(_feature(feature, by_name[feature.name]) for feature in signature.features)
    return signature.model_copy(update={"features": features})


def _feature(known: Feature, column: Column) -> Feature:
    whole = column.datatype in ("INT64", "BOOL") and known.datatype in FLOATS and not known.shape
    datatype = column.datatype if whole else known.datatype
    nullable = column.optional and (datatype in FLOATS or (datatype == "BYTES" and not known.shape))
    return known.model_copy(update={"name": column.name, "datatype": datatype, "nullable": nullable})
