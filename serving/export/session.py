"""Runs a graph that is being made, and reads from it what it takes and answers."""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx
import onnxruntime as ort

from serving.engine.runtime import extended
from serving.engine.signature import Signature
from serving.engine.signature_inference import Port, describe
from serving.tensors import Array


class Session:
    """One graph, loaded once; `signature` is what the graph itself tells."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        content = proto.SerializeToString()
        make = partial(ort.InferenceSession, content, options, providers=["CPUExecutionProvider"])
        self._session = extended(make, options)
        inputs = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_inputs()]
        outputs = [Port(p.name, p.type, tuple(p.shape)) for p in self._session.get_outputs()]
        self._inputs = [port.name for port in inputs]
        self._outputs = [port.name for port in outputs]

        def probe(arrays: tuple[Array, ...]) -> list[Any] | None:
            try:
                return self._answers(arrays)
            except Exception:
                return None  # made-up rows may be refused; the held-out rows will tell

        self.signature: Signature = describe(inputs, outputs, probe)[0]

    def run(self, feeds: tuple[Array, ...]) -> dict[str, Array]:
        """Return every output by name. Raises what onnxruntime raises."""
        return dict(zip(self._outputs, self._answers(feeds), strict=True))

    def _answers(self, feeds: tuple[Array, ...]) -> list[Any]:
        return list(self._session.run(None, dict(zip(self._inputs, feeds, strict=True))))
