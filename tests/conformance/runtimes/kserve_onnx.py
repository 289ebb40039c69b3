"""ONNX models in KServe's Python model server: a custom model."""

from __future__ import annotations

import argparse
import json
from typing import Any

import kserve
import numpy as np
import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse
from kserve.utils.utils import generate_uuid


class OnnxModel(kserve.Model):
    """One ONNX file."""

    def __init__(self, described: dict[str, Any]) -> None:
        super().__init__(described["name"])
        self._described = described
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(described["path"], options, providers=["CPUExecutionProvider"])
        self.ready = True

    async def get_input_types(self) -> list[dict[str, Any]]:
        return list(self._described["inputs"])

    async def get_output_types(self) -> list[dict[str, Any]]:
        return list(self._described["outputs"])

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        feeds = {}
        for tensor in payload.inputs:
            array = tensor.as_numpy()
            if array.dtype == object:
                array = np.array([v.decode() if isinstance(v, bytes) else v for v in array.ravel()], dtype=object)
                array = array.reshape(tensor.shape)
            feeds[tensor.name] = array
        wanted = [output.name for output in payload.request_outputs or ()]
        names = wanted or [o.name for o in self._session.get_outputs()]
        types = {t["name"]: t["datatype"] for t in self._described["outputs"]}
        outputs = []
        for name, array in zip(names, self._session.run(names, feeds), strict=True):
            output = InferOutput(name, list(array.shape), types[name])
            output.set_data_from_numpy(array, binary_data=payload.use_binary_outputs)
            outputs.append(output)
        return InferResponse(
            response_id=payload.id or generate_uuid(),
            model_name=self.name,
            infer_outputs=outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[kserve.model_server.parser])
    parser.add_argument("models")
    given = parser.parse_args()
    with open(given.models, encoding="utf-8") as file:
        models = [OnnxModel(one) for one in json.load(file)]
    kserve.ModelServer(http_port=given.http_port, grpc_port=given.grpc_port, workers=1).start(models)
