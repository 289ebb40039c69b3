"""The forest in BentoML. MODEL names the file."""

import os
from typing import Annotated

import bentoml
import numpy as np
import onnxruntime
from bentoml.validators import DType, Shape


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Forest:
    """One ONNX file."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["MODEL"], options)

    @bentoml.api(batchable=True, max_batch_size=1024, max_latency_ms=10_000)
    def predict(self, rows: Annotated[np.ndarray, Shape((-1, 30)), DType("float32")]) -> np.ndarray:
        """Return the probabilities, float32 [rows, classes]."""
        return self._session.run(["probabilities"], {"features": rows})[0]
