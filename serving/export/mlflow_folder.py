"""Reads a model folder of MLflow that has the onnx flavour: its file, its signature, its example."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from serving.engine.signature import Feature, Signature
from serving.export.refusal import CannotExport
from serving.tensors import FLOATS, Datatype

MLMODEL = "MLmodel"
_TYPES: dict[str, Datatype] = {
    "boolean": "BOOL",
    "integer": "INT64",
    "long": "INT64",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}
_LOG = "log it with mlflow.onnx.log_model, or export the fitted model itself"


@dataclass(frozen=True, slots=True)
class Column:
    """An input of MLflow's signature: its name, its type where it is one value a row, and whether it may be missing."""

    name: str
    datatype: Datatype | None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class MLflowFolder:
    """What a folder says. columns: empty where it was logged without a signature, or with one unnamed tensor."""

    model: Path
    columns: tuple[Column, ...]
    example: list[Any]
    """Its example's rows, each by name, or as a list of values, or a tensor; empty where it has none."""

    def describe(self, signature: Signature) -> Signature:
        """Give a graph's own signature the names, types and missing values of MLflow's. Raises CannotExport."""
        if not self.columns:
            return signature
        if signature.layout == "matrix":
            width = signature.inputs[0].shape[-1]
            if width not in (-1, len(self.columns)):
                raise CannotExport(
                    MLMODEL, f"names {len(self.columns)} inputs, and {self.model.name} takes {width} columns", _LOG
                )
            features = tuple(
                self._feature(Feature(name="", datatype=signature.inputs[0].datatype), c) for c in self.columns
            )
        else:
            by_name = {column.name: column for column in self.columns}
            absent = [feature.name for feature in signature.features if feature.name not in by_name]
            if absent:
                raise CannotExport(MLMODEL, f"names no input {', '.join(absent[:10])}, which its file takes", _LOG)
            features = tuple(self._feature(feature, by_name[feature.name]) for feature in signature.features)
        return signature.model_copy(update={"features": features})

    @staticmethod
    def _feature(known: Feature, column: Column) -> Feature:
        whole = column.datatype in ("INT64", "BOOL") and known.datatype in FLOATS and not known.shape
        datatype = column.datatype if whole else known.datatype
        nullable = column.optional and (datatype in FLOATS or (datatype == "BYTES" and not known.shape))
        return known.model_copy(update={"name": column.name, "datatype": datatype, "nullable": nullable})

    def rows(self, signature: Signature) -> list[dict[str, Any]]:
        """Return the example's rows by feature name, as a caller sends them."""
        names = [feature.name for feature in signature.features]
        found = []
        for row in self.example:
            if isinstance(row, dict):
                found.append({name: row.get(name) for name in names})
            elif len(names) == 1:
                found.append({names[0]: row})
            else:
                found.append(dict(zip(names, row, strict=True)))
        return found


def is_one(path: Path) -> bool:
    """Tell whether a path is a model folder of MLflow."""
    return (path / MLMODEL).is_file()


def read(folder: Path) -> MLflowFolder:
    """Read a folder. Raises CannotExport where it has no onnx flavour, or types that no caller can send."""
    said = yaml.safe_load((folder / MLMODEL).read_text())
    flavors = said.get("flavors", {})
    if "onnx" not in flavors:
        others = ", ".join(sorted(flavors)) or "none"
        raise CannotExport(str(folder), f"has no onnx flavour, but {others}", _LOG)
    columns = [_column(entry) for entry in json.loads((said.get("signature") or {}).get("inputs") or "[]")]
    named = tuple(column for column in columns if column.name)
    return MLflowFolder(
        folder / flavors["onnx"].get("data", "model.onnx"),
        named if len(named) == len(columns) else (),
        _example(folder, said.get("saved_input_example_info") or {}),
    )


def _column(entry: dict[str, Any]) -> Column:
    name, kind = entry.get("name", ""), entry["type"]
    if kind == "tensor":
        return Column(name, None)
    if kind not in _TYPES:
        raise CannotExport(f"input {name!r} of {MLMODEL}", f"is of type {kind}", "make strings or numbers of it")
    return Column(name, _TYPES[kind], not entry.get("required", True))


def _example(folder: Path, told: dict[str, Any]) -> list[Any]:
    path = folder / told.get("artifact_path", "")
    if told.get("type") not in ("dataframe", "ndarray") or not path.is_file():
        return []
    found = json.loads(path.read_text())
    if told["type"] == "dataframe":
        if isinstance(found, dict) and "columns" in found:
            return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]
        return found if isinstance(found, list) else []
    tensors = found.get("inputs", found) if isinstance(found, dict) else found
    if isinstance(tensors, dict):  # several tensors by name, rows first
        names = list(tensors)
        return [dict(zip(names, row, strict=True)) for row in zip(*(tensors[n] for n in names), strict=True)]
    return list(np.asarray(tensors).tolist())
