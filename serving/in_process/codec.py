"""What a program gives and gets in the server's own process: rows, frames and arrays, without a wire between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.client import given
from serving.client.given import BINARY_CELLS, Given, cells
from serving.client.tensors import Tensor, answered, tensors_of
from serving.engine.signature import Described
from serving.engine.tensor_binder import TensorBinder
from serving.protocols import predict_v1
from serving.protocols.codec import Decoded, Elsewhere, Later, Spare
from serving.protocols.headers import Headers
from serving.protocols.http_codec import NO_HEADERS, Encoded
from serving.protocols.strict_json import lenient
from serving.tensors import Array, Tensors

PROTOCOL = "python"


class Codec(predict_v1.Codec):
    """Reads what was given as V1 reads it, with the same errors; arrays and frames, and many rows, by their columns."""

    protocol = PROTOCOL

    def __init__(self, model: Described) -> None:
        super().__init__(model)
        self._binder = TensorBinder(model.signature, together=model.together)
        self._names = [feature.name for feature in model.signature.features]

    def begin(self, headers: Headers, body: Given, spare: Spare, most_text: int) -> Decoded | Elsewhere | Later:  # type: ignore[override]
        """Take rows as they were given. Raises as V1 does."""
        if body.rows is None or cells(body.rows) >= BINARY_CELLS:
            made = tensors_of(body, self.signature)
            if made is not None:
                return self._bound(made, by_column=body.rows is None)
        return super().begin(NO_HEADERS, given.body(body, self._names), spare, most_text)

    def _bound(self, tensors: Sequence[Tensor], *, by_column: bool) -> Decoded:
        arrays: list[Array | None] = [None] * len(self._binder.slots)
        for tensor in tensors:
            position = self._binder.input(tensor.name, tensor.datatype, tensor.name)
            self._binder.shape(position, tensor.array.shape, tensor.name)
            self._binder.check(position, tensor.array, tensor.name)
            # A copy: the caller may write to its own while the rows wait.
            arrays[position] = np.array(tensor.array, order="C")
        inputs, rows = self._binder.assemble(arrays)
        return Decoded(inputs, rows, by_column)

    def begin_answer(self, outputs: Tensors, context: Any, headers: Headers, spare: Spare) -> Any:
        """Leave arrays as they are; rows become what V1 says of them, the same numbers digit by digit."""
        return outputs if context else super().begin_answer(outputs, context, NO_HEADERS, spare)

    def in_kind(self, asked: Given, response: Encoded | Tensors) -> Any:
        """Give an answer back in the kind of what was asked."""
        if asked.rows is None:
            # Copies: a shadow, or a cache, may have these arrays too.
            outputs = {spec.name: np.array(a) for spec, a in zip(self.signature.outputs, response, strict=True)}
            columns = answered(outputs, self.signature)
            return given.in_kind(asked, columns, self.signature.classes or ())
        body: Any = response[0]
        predictions = lenient(body if isinstance(body, bytes) else b"".join(body.parts))["predictions"]
        return predictions[0] if asked.kind == "row" else predictions
