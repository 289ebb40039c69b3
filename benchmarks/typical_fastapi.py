"""The typical FastAPI service around an ONNX model, as a good tutorial would write it: the contestant to beat.

Pydantic rows by name, `run_in_executor` for each request, a response model. MODEL names the ONNX file.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, create_model

options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
classes = ["malignant", "benign"]
executor = ThreadPoolExecutor(4)

MEASURED = ["radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity", "concave_points"]
MEASURED += ["symmetry", "fractal_dimension"]
NAMES = [name.format(what) for name in ("mean_{}", "{}_error", "worst_{}") for what in MEASURED]
Row: Any = create_model("Row", **dict.fromkeys(NAMES, (float, ...)))


class PredictRequest(BaseModel):
    """Rows by feature name."""

    instances: list[Row]


class Prediction(BaseModel):
    """One row's answer."""

    label: str
    probabilities: dict[str, float]


class PredictResponse(BaseModel):
    """Answers in row order."""

    predictions: list[Prediction]


class Tensor(BaseModel):
    """A tensor of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class InferRequest(BaseModel):
    """A v2 request."""

    inputs: list[Tensor]


class InferResponse(BaseModel):
    """A v2 answer."""

    model_config = ConfigDict(protected_namespaces=())
    model_name: str
    outputs: list[Tensor]


app = FastAPI()


def run(rows: np.ndarray) -> list[np.ndarray]:
    """Run the model."""
    return session.run(None, {"features": rows})


@app.get("/ready")
async def ready() -> str:
    """Answer once started."""
    return "ready"


@app.post("/predict", response_model=PredictResponse)
async def predict(request: PredictRequest) -> PredictResponse:
    """Predict named rows."""
    rows = np.array([[getattr(row, name) for name in NAMES] for row in request.instances], dtype=np.float32)
    labels, scores = await asyncio.get_running_loop().run_in_executor(executor, run, rows)
    return PredictResponse(
        predictions=[
            Prediction(label=classes[label], probabilities=dict(zip(classes, row, strict=True)))
            for label, row in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
    )


@app.post("/infer", response_model=InferResponse)
async def infer(request: InferRequest) -> InferResponse:
    """Infer one tensor."""
    tensor = request.inputs[0]
    rows = np.array(tensor.data, dtype=np.float32).reshape(tensor.shape)
    labels, scores = await asyncio.get_running_loop().run_in_executor(executor, run, rows)
    return InferResponse(
        model_name="forest",
        outputs=[
            Tensor(name="label", datatype="INT64", shape=list(labels.shape), data=labels.tolist()),
            Tensor(name="probabilities", datatype="FP32", shape=list(scores.shape), data=scores.ravel().tolist()),
        ],
    )
