"""ONNX models in MLServer: a custom runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxRuntime(MLModel):
    """One ONNX file."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {}
        for tensor in payload.inputs:
            if tensor.datatype == "BYTES":
                array = np.array(StringCodec.decode_input(tensor), dtype=object).reshape(tensor.shape)
            else:
                array = NumpyCodec.decode_input(tensor)
            feeds[tensor.name] = array
        names = [output.name for output in payload.outputs or ()] or [o.name for o in self._session.get_outputs()]
        outputs = []
        for name, array in zip(names, self._session.run(names, feeds), strict=True):
            if array.dtype == object:
                output = StringCodec.encode_output(name, array.ravel().tolist())
            else:
                output = NumpyCodec.encode_output(name, array)
            output.shape = list(array.shape)
            outputs.append(output)
        return InferenceResponse(model_name=self.name, model_version=self.version, id=payload.id, outputs=outputs)
