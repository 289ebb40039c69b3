"""Reads ModelInferRequest into feeds and writes ModelInferResponse from outputs.

Raw and typed contents are both read, never mixed in one request; an answer has the kind that its request had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from serving.engine.signature import Described
from serving.engine.tensor_binder import RequestedOutput, TensorBinder
from serving.errors import InvalidRequest
from serving.protocols.codec import CONTRIBUTIONS, Decoded
from serving.protocols.messages import message
from serving.protocols.request_parameters import classes_of, options_of, refuse_shared
from serving.tensor_bytes import Buffer, read, strings, text, write
from serving.tensors import HALVES, INTEGERS, NUMPY, Array, Tensors, count, limits

Response = message("ModelInferResponse")
_Contents = message("InferTensorContents")

CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Context(NamedTuple):
    """What the answer must know: the outputs that are asked for, whether contents are raw, and the request's id."""

    wanted: tuple[RequestedOutput, ...]
    raw: bool
    identity: bytes = b""


class Codec:
    """Decodes and encodes gRPC for one version of a model."""

    def __init__(self, model: Described) -> None:
        self._name, self._version = model.name, model.version
        self._binder = TensorBinder(model.signature, together=model.together)

    def decode(self, request: Any, raws: Sequence[Buffer] = ()) -> Decoded:
        """Read a request; `raws` are the raw contents that were taken out of it. Raises as `TensorBinder` does."""
        raws = raws or list(request.raw_input_contents)
        _, timeout, priority, explain = options_of(_plain(request.parameters))
        arrays: list[Array | None] = [None] * len(self._binder.slots)
        if raws and len(raws) != len(request.inputs):
            raise InvalidRequest(f"raw_input_contents: has {len(raws)} tensors, and inputs has {len(request.inputs)}")
        for index, tensor in enumerate(request.inputs):
            at = f"/inputs/{index}"
            refuse_shared(tensor.parameters, at)
            position = self._binder.input(tensor.name, tensor.datatype, at)
            if arrays[position] is not None:
                raise InvalidRequest(f"{at}/name: input {tensor.name!r} occurs twice")
            shape = self._binder.shape(position, list(tensor.shape), at)
            if raws:
                if tensor.HasField("contents"):
                    raise InvalidRequest(f"{at}/contents: raw_input_contents is there too: send one of them")
                array = read(raws[index], tensor.datatype, shape, f"/raw_input_contents/{index}")
            else:
                array = _typed(tensor.contents, tensor.datatype, shape, f"{at}/contents")
            self._binder.check(position, array, at)
            arrays[position] = array
        inputs, rows = self._binder.assemble(arrays)
        wanted = self._wanted(request.outputs) if request.outputs else self._binder.all_outputs(binary=True)
        # Of a graph without inputs nothing tells: raw is what clients read.
        context = Context(wanted, bool(raws) or not inputs, request.id.encode())
        return Decoded(inputs, rows, context, timeout, priority, explain)

    def _wanted(self, outputs: Any) -> tuple[RequestedOutput, ...]:
        asked = []
        # One more than the model has is one too many already, whatever it is.
        for index, output in enumerate(outputs[: len(self._binder.outputs) + 1]):
            refuse_shared(output.parameters, f"/outputs/{index}")
            asked.append((output.name, True, classes_of(_plain(output.parameters), f"/outputs/{index}")))
        return self._binder.requested(asked)

    def encode(self, outputs: Tensors, context: Context) -> Any:
        """Write the answer."""
        response = Response(model_name=self._name, model_version=self._version, id=context.identity.decode())
        specs = self._binder.outputs
        raw = context.raw or self.only_raw(context.wanted)
        for position, _, classes in context.wanted:
            array = outputs[position]
            datatype: str = specs[position].datatype
            if classes:
                array, datatype = self._binder.classified(position, array, classes), "BYTES"
            tensor = response.outputs.add(name=specs[position].name, datatype=datatype, shape=array.shape)
            if raw:
                response.raw_output_contents.append(write(array))
                continue
            tensor.contents.CopyFrom(contents_of(array, datatype))
        for array in outputs[len(specs) :]:
            tensor = response.outputs.add(name=CONTRIBUTIONS, datatype="FP64", shape=array.shape)
            if raw:
                response.raw_output_contents.append(write(array))
            else:
                tensor.contents.CopyFrom(contents_of(array, "FP64"))
        return response

    def only_raw(self, wanted: tuple[RequestedOutput, ...]) -> bool:
        """Tell whether an answer can't be typed: halves have no typed contents, and the two kinds are never mixed."""
        return any(self._binder.outputs[w.position].datatype in HALVES and not w.classes for w in wanted)


def contents_of(array: Array, datatype: str) -> Any:
    """Make the typed contents of an array."""
    values = array.ravel().tolist()
    if datatype == "BYTES":
        values = [value.encode() for value in values]
    return _Contents(**{CONTENTS[datatype]: values})


def _typed(contents: Any, datatype: str, shape: tuple[int, ...], at: str) -> Array:
    """Make the array of typed contents."""
    field = CONTENTS.get(datatype)
    if field is None:
        raise InvalidRequest(f"{at}: {datatype} has no typed contents: send raw_input_contents")
    others = [found.name for found, _ in contents.ListFields() if found.name != field]
    if others:
        raise InvalidRequest(f"{at}/{others[0]}: {datatype} goes into {field}")
    values = getattr(contents, field)
    if len(values) != count(shape):
        raise InvalidRequest(f"{at}: has {len(values)} elements, and shape {list(shape)} holds {count(shape)}")
    if datatype == "BYTES":
        return strings([text(value, f"{at}: element {i}") for i, value in enumerate(values)], shape)
    if datatype in INTEGERS and values:
        least, greatest = limits(datatype)
        if min(values) < least or max(values) > greatest:
            raise InvalidRequest(f"{at}: an element does not fit {datatype} ({least} to {greatest})")
    array: Array = np.array(values, dtype=NUMPY[datatype])
    return array.reshape(shape)


def _plain(parameters: Any) -> dict[str, Any]:
    """Return parameters as they are in JSON."""
    kinds = ((name, value, value.WhichOneof("parameter_choice")) for name, value in parameters.items())
    return {name: getattr(value, kind) for name, value, kind in kinds if kind}
