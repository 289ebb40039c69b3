"""The Open Inference Protocol as a client speaks it: requests and answers over HTTP (binary tensors) and gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from serving.client.tensors import Tensor
from serving.errors import InvalidRequest
from serving.tensor_bytes import read, write
from serving.tensors import Array

LENGTH = "inference-header-content-length"


class Outputs(NamedTuple):
    """Tensors by output name, and who made them."""

    version: str
    tensors: dict[str, Array]


def binary(tensors: Sequence[Tensor]) -> tuple[dict[str, str], bytes]:
    """Write a request for all outputs, every tensor as bytes: headers and body. Raises InvalidRequest."""
    blobs = [_bytes(tensor) for tensor in tensors]
    head = orjson.dumps(
        {
            "inputs": [
                {
                    "name": tensor.name,
                    "datatype": tensor.datatype,
                    "shape": tensor.array.shape,
                    "parameters": {"binary_data_size": len(blob)},
                }
                for tensor, blob in zip(tensors, blobs, strict=True)
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    headers = {"content-type": "application/octet-stream", LENGTH: str(len(head))}
    return headers, b"".join((head, *blobs))


def read_binary(headers: Mapping[str, str], body: bytes) -> Outputs:
    """Read an answer. Raises ValueError, KeyError or TypeError, and InvalidRequest, where it is none."""
    length = int(headers.get(LENGTH, len(body)))
    document = orjson.loads(body[:length])
    tensors = {}
    place = length
    for output in document["outputs"]:
        size = int(output["parameters"]["binary_data_size"])
        tensors[output["name"]] = _read(memoryview(body)[place : place + size], output["datatype"], output["shape"])
        place += size
    return Outputs(document["model_version"], tensors)


def message(kind: Any, model: str, version: str | None, tensors: Sequence[Tensor], identity: str) -> Any:
    """Make a ModelInferRequest, of the class `kind`. Raises InvalidRequest."""
    made = kind(model_name=model, model_version=version or "", id=identity)
    for tensor in tensors:
        made.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
        made.raw_input_contents.append(_bytes(tensor))
    return made


def read_message(response: Any) -> Outputs:
    """Read a ModelInferResponse with raw contents."""
    tensors = {
        output.name: _read(raw, output.datatype, output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    return Outputs(response.model_version, tensors)


def _bytes(tensor: Tensor) -> bytes:
    try:
        return write(np.ascontiguousarray(tensor.array))
    except UnicodeEncodeError:
        raise InvalidRequest(f"{tensor.name}: has a string that is no text: it can't be written as UTF-8") from None


def _read(raw: bytes | memoryview, datatype: str, shape: Sequence[int]) -> Array:
    # A copy: the caller may write to it, and it does not keep the whole answer.
    return read(raw, datatype, tuple(int(size) for size in shape), "the answer").copy()
