"""Reads a model folder of MLflow that has the onnx flavour: its file, its signature, its example."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from serving.engine import mlflow_columns
from serving.engine.mlflow_columns import Column
from serving.errors import ModelInvalid
from serving.export.refusal import CannotExport

MLMODEL = "MLmodel"
LOG = "log it with mlflow.onnx.log_model, or export the fitted model itself"


@dataclass(frozen=True, slots=True)
class MLflowFolder:
    """What a folder says. columns: empty where it was logged without a signature, or with one unnamed tensor."""

    model: Path
    columns: tuple[Column, ...]
    example: list[Any]
    """Its example's rows, each by name, or as a list of values, or a tensor; empty where it has none."""

    def rows(self, names: list[str]) -> list[dict[str, Any]]:
        """Return the example's rows by the names of the features, as a caller sends them."""
        found = []
        for row in self.example:
            if isinstance(row, dict):
                found.append({name: row.get(name) for name in names})
            else:
                found.append(dict(zip(names, [row] if len(names) == 1 else row, strict=True)))
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
        raise CannotExport(str(folder), f"has no onnx flavour, but {others}", LOG)
    try:
        columns = mlflow_columns.read((said.get("signature") or {}).get("inputs"))
    except ModelInvalid as error:
        raise CannotExport(str(folder), error.message, "make strings or numbers of it") from None
    return MLflowFolder(
        folder / flavors["onnx"].get("data", "model.onnx"),
        columns,
        _example(folder, said.get("saved_input_example_info") or {}),
    )


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
