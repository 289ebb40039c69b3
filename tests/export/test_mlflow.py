"""Model folders of MLflow: what they were logged with is taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skl2onnx import to_onnx
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from serving.command_line import app
from serving.export import CannotExport, export
from tests.export.test_export import HELD_OUT, TARGET, TRAIN, served

pytestmark = pytest.mark.filterwarnings("ignore")  # the converters' own deprecations are not ours to mend

# As mlflow 3.17.2 writes it (mlflow.onnx.save_model), cut down to what says something of the model.
MLMODEL = """
flavors:
  onnx:
    code: null
    data: model.onnx
    onnx_version: 1.23.2
    providers:
    - CUDAExecutionProvider
    - CPUExecutionProvider
  python_function:
    data: model.onnx
    loader_module: mlflow.onnx
mlflow_version: 3.17.2
saved_input_example_info:
  artifact_path: input_example.json
  pandas_orient: split
  serving_input_path: serving_input_example.json
  type: %s
signature:
  inputs: '%s'
  outputs: null
  params: null
utc_time_created: '2026-11-28 20:26:26.614374'
"""
COLUMNS = ["length", "width", "petals", "leaf"]
FIT = LogisticRegression(max_iter=500).fit(TRAIN.to_numpy(), TARGET)


def folder(at: Path, inputs: list[dict[str, Any]], example: Any, kind: str = "dataframe") -> Path:
    at.mkdir()
    (at / "MLmodel").write_text(MLMODEL % (kind, json.dumps(inputs)))
    (at / "model.onnx").write_bytes(to_onnx(FIT, TRAIN.to_numpy()[:1]).SerializeToString())
    (at / "input_example.json").write_text(json.dumps(example))
    return at


def columns(at: Path) -> Path:
    inputs = [{"type": "double", "name": name, "required": name != "leaf"} for name in COLUMNS]
    inputs[2]["type"] = "long"
    return folder(at, inputs, {"columns": COLUMNS, "data": [[5.0, 3.5, 1, 0.25], [6.0, 3.0, 5, None]]})


def test_signature_and_example_are_taken_over(tmp_path: Path) -> None:
    """Names, whole numbers and missing values are the folder's; its example is tried, and is the served example."""
    exported = export(columns(tmp_path / "logged"), description="From MLflow", metrics={"f1": 0.9})
    found = {f.name: (f.datatype, f.nullable) for f in exported.signature.features}
    assert list(found) == COLUMNS
    assert found["petals"] == ("INT64", False)
    assert found["leaf"] == ("FP32", True)
    assert exported.signature.example == {"length": 5.0, "width": 3.5, "petals": 1, "leaf": 0.25}
    assert exported.signature.golden is not None
    assert "not compared" in repr(exported)
    (got,) = served(exported, tmp_path / "models", [exported.signature.example])
    row = np.array([[5.0, 3.5, 1, 0.25]])
    assert got["label"] == FIT.predict(row)[0]
    assert list(got["probabilities"].values()) == pytest.approx(FIT.predict_proba(row)[0], abs=1e-5)


def test_tensors_and_training_rows_do_too(tmp_path: Path) -> None:
    """A signature of one tensor keeps the graph's own; with `train` the rows describe the features."""
    tensor = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}]
    logged = folder(tmp_path / "logged", tensor, [[5.0, 3.5, 1.5, 0.25]], kind="ndarray")
    bare = export(logged).signature
    assert bare.example is not None
    assert list(bare.example.values()) == [5.0, 3.5, 1.5, 0.25]
    told = export(logged, train=TRAIN, held_out=HELD_OUT, reference=lambda rows: FIT.predict_proba(rows.to_numpy()))
    assert [f.name for f in told.signature.features] == list(TRAIN.columns)
    assert told.signature.parity is not None


def test_the_command_writes_a_folder_as_one_file(tmp_path: Path) -> None:
    """`serving export FOLDER` needs no Python of one's own; a folder that can't be is named with the reason."""
    to = tmp_path / "out.onnx"
    ended = CliRunner().invoke(app, ["export", str(columns(tmp_path / "logged")), "--to", str(to)])
    assert ended.exit_code == 0, ended.output
    assert "petals" in ended.output
    checked = CliRunner().invoke(app, ["check", str(to)])
    assert checked.exit_code == 0, checked.output
    other = tmp_path / "other"
    other.mkdir()
    (other / "MLmodel").write_text("flavors:\n  sklearn: {pickled_model: model.pkl}\n")
    refused = CliRunner().invoke(app, ["export", str(other), "--to", str(tmp_path / "no.onnx")])
    assert refused.exit_code == 1
    assert "has no onnx flavour, but sklearn" in refused.output
    with pytest.raises(CannotExport, match="train: is left out"):
        export(FIT)
