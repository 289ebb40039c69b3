"""Asks one model through the codecs and onnxruntime in this process: a thousand models a minute."""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np

from serving.engine.session import OnnxSession
from serving.engine.signature import Described, TensorSpec
from serving.errors import ServingError
from serving.http_api.openapi.document import operations
from serving.http_api.openapi.documents import InferResponse
from serving.http_api.openapi.prediction_schemas import schemas
from serving.protocols import open_inference, predict_v1
from serving.protocols.codec import Mixed
from serving.protocols.http_codec import HttpCodec
from serving.protocols.infer_tensors import Codec as GrpcCodec
from serving.tensors import Tensors


class Answer:
    """What an HTTP client sees of an answer."""

    def __init__(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.status_code, self.content, self.headers = status, content, headers

    @property
    def text(self) -> str:
        """The body as text."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.content)


class Direct:
    """One model: `post` answers as HTTP does, `ModelInfer` as a stub of gRPC does. Raises ModelInvalid."""

    def __init__(self, path: Path, *, together: bool = False) -> None:
        logging.getLogger("serving.session").setLevel(logging.ERROR)  # inputs are made up, and many refused
        self.session = OnnxSession(path)
        self.signature, self.example = self.session.signature, self.session.example
        self.name, self.version, self.default = "m", "1", self  # as a model, and as all versions of one
        self.versions, self.labels = {"1": self}, {"stable": self}
        model = Described(self.name, self.version, self.signature, together)
        self._codecs: dict[str, HttpCodec] = {"v1": predict_v1.Codec(model), "v2": open_inference.Codec(model)}
        self._grpc = GrpcCodec(model)

    @property
    def described(self) -> dict[str, Any]:
        """What /v2/models/m says."""

        def ports(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]

        return {"inputs": ports(self.signature.inputs), "outputs": ports(self.signature.outputs)}

    @cached_property
    def _documented(self) -> dict[str, Any]:
        """What checks a 200 of each protocol against what the OpenAPI document says of it."""
        described = schemas(self)  # type: ignore[arg-type]
        v1 = {"anyOf": [described["m_1_predictions"], described["m_1_columns"]]}
        made = {"v1": v1, "v2": InferResponse.model_json_schema()}
        return {protocol: jsonschema_rs.Draft202012Validator(schema) for protocol, schema in made.items()}

    def get(self, path: str) -> Answer:
        """Answer what /v1/models/m does, as far as it is asked for here."""
        features = [feature.model_dump(exclude_none=True) for feature in self.signature.features]
        return Answer(200, json.dumps({"features": features}).encode(), {})

    def post(self, path: str, content: str | bytes, headers: dict[str, str] | None = None) -> Answer:
        """Predict; what the server would answer with 500 is raised."""
        protocol = "v1" if path.startswith("/v1") else "v2"
        codec = self._codecs[protocol]
        given = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        try:
            decoded = codec.decode(given, content.encode() if isinstance(content, str) else content)
            made = codec.encode(self._run(decoded.inputs, decoded.rows), decoded.context)
        except ServingError as error:
            return Answer(400, json.dumps({"error": error.message}).encode(), {})
        if isinstance(made, Mixed):
            body = made.body if isinstance(made.body, bytes) else b"".join(made.body.parts)
            return Answer(200, body, {k.decode().title(): v.decode() for k, v in made.headers})
        answer = Answer(200, made, {})
        for fault in self._documented[protocol].iter_errors(answer.json()):
            raise AssertionError(f"the OpenAPI document says otherwise: {fault}")
        return answer

    def ModelInfer(self, request: Any, timeout: float = 0) -> Any:
        """Predict over gRPC. Raises AssertionError with a refusal."""
        try:
            decoded = self._grpc.decode(request)
            return self._grpc.encode(self._run(decoded.inputs, decoded.rows), decoded.context)
        except ServingError as error:
            raise AssertionError(error.message) from None

    def _run(self, inputs: Tensors, rows: int) -> Tensors:
        if self.signature.batch != "one" or rows < 2:
            return self.session.run(inputs)
        alone = [self.session.run(tuple(array[i : i + 1] for array in inputs)) for i in range(rows)]
        return tuple(np.concatenate(parts) for parts in zip(*alone, strict=True))

    def examples(self) -> dict[str, Any]:
        """Give what the documentation shows for each path: a body, or None."""
        made = dict(operations(self))  # type: ignore[arg-type]
        return {p: o["requestBody"]["content"]["application/json"].get("example") for p, o in made.items()}
