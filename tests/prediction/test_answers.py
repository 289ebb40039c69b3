"""V1 answers of classifiers whose names have what templates are made of."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from serving.engine.signature import Described, Signature
from serving.protocols import predict_v1

CLASSES = {"texts": ("100%", "%b%%s", 'a"b'), "numbers": (0, 7, 9)}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_row_is_answered_by_the_names_of_its_classes(kind: str, rows: int) -> None:
    """Label and scores stand under the names of the classes, whatever these are made of; what is no number is null."""
    classes = CLASSES[kind]
    signature = Signature.model_validate(
        {
            "task": "classification",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}],
            "outputs": [
                {"name": "label", "datatype": "BYTES" if kind == "texts" else "INT64", "shape": [-1]},
                {"name": "scores", "datatype": "FP32", "shape": [-1, 3]},
            ],
            "layout": "matrix",
            "features": [{"name": "x", "datatype": "FP32"}],
            "label": "label",
            "scores": "scores",
            "classes": classes,
        }
    )
    codec = predict_v1.Codec(Described("m%b", "1", signature))
    labels = np.array(["unseen" if kind == "texts" else 3, classes[1]][2 - rows :], object if kind == "texts" else None)
    scores = np.array([[0.25, 0.5, math.nan], [0.125, math.inf, -1]], np.float32)[2 - rows :]
    answer = json.loads(codec.encode((labels, scores), None))
    assert answer == {
        "model_name": "m%b",
        "model_version": "1",
        "predictions": [
            {
                "label": label,
                "scores": {
                    str(name): float(score) if math.isfinite(score) else None
                    for name, score in zip(classes, row, strict=True)
                },
            }
            for label, row in zip(labels.tolist(), scores, strict=True)
        ],
    }
