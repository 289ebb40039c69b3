"""What tests of the library share: a folder of two models, and what one of them answers by onnxruntime itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.conftest import MODELS

ROWS: list[dict[str, Any]] = [
    {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2},
    {"sepal_length": 6.3, "sepal_width": 2.8, "petal_length": 5.1, "petal_width": 1.5},
]
TRAFFIC = {"stable": "1", "canary": {"version": "2", "percent": 50, "sticky": {"header": "x-user"}}}
MATRIX = np.array([list(row.values()) for row in ROWS], np.float32)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iris alone: version 1 is stable, and half of the users get version 2, by their header."""
    folder = tmp_path_factory.mktemp("library") / "models"
    shutil.copytree(MODELS / "iris", folder / "iris", ignore=shutil.ignore_patterns(".*", "*.json*"))
    (folder / "iris" / "traffic.json").write_text(json.dumps(TRAFFIC))
    return folder


def expected(version: str, matrix: Any = MATRIX) -> Any:
    """Return the probabilities that onnxruntime computes with the shipped file."""
    session = onnxruntime.InferenceSession(MODELS / "iris" / version / "model.onnx")
    return session.run(None, {session.get_inputs()[0].name: matrix})[1]
