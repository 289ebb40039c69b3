"""What a request says by the text of the Open Inference Protocol: a second reading, by code of its own.

Each reader returns the model's feeds and the names of the outputs asked for, and raises Invalid for what is none.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from tests.drills.differential import TYPED
from tests.drills.direct import DTYPES, Direct, Port
from tests.drills.wire import LENGTH

MOST_ROWS = 4096
"""What one model's queue holds unless it is told otherwise."""


class Invalid(Exception):
    """It should be refused."""


def check(fact: object, why: str) -> None:
    if not fact:
        raise Invalid(why)


def http(model: Direct, headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], list[str]]:
    """Read a v2 request over HTTP from its headers (lower case) and its body as it came."""
    coding = headers.get("content-encoding", "").strip().lower() or "identity"
    check(coding in ("identity", "gzip", "x-gzip", "deflate"), "coding")
    if coding != "identity":
        inflater = zlib.decompressobj(15 if coding == "deflate" else 31)
        try:
            body = inflater.decompress(body)
        except zlib.error as error:
            raise Invalid("coding") from error
        check(inflater.eof and not inflater.unused_data, "the end of a coding")
    if LENGTH not in headers:
        return _document(model, body, b"")
    said = headers[LENGTH].strip()
    check(said.isascii() and said.isdigit() and len(said) <= 12 and int(said) <= len(body), "length of the JSON")
    if int(said):
        return _document(model, body[: int(said)], body[int(said) :])
    return _bare(model, body)


def _bare(model: Direct, body: bytes) -> tuple[dict[str, Any], list[str]]:
    check(len(model.inputs) == 1, "one input")
    (port,) = model.inputs
    names = [p.name for p in model.outputs]
    if port.datatype == "BYTES":
        body = struct.pack("<I", len(body)) + body
        return _whole(model, {port.name: _bytes(model, port, [1] * len(port.shape), body)}), names
    row = np.dtype(DTYPES[port.datatype]).itemsize * math.prod(d for d in port.shape if d != -1)
    check(body and len(body) % row == 0, "whole rows")
    return _whole(
        model, {port.name: _bytes(model, port, [d if d != -1 else len(body) // row for d in port.shape], body)}
    ), names


def _document(model: Direct, head: bytes, blobs: bytes) -> tuple[dict[str, Any], list[str]]:
    document = _json(head)
    check(isinstance(document, dict), "object")
    identity = document.get("id")
    check(identity is None or (isinstance(identity, str) and _is_text(identity)), "id")
    parameters = _object(document, "parameters")
    check(isinstance(parameters.get("binary_data_output", False), bool), "binary_data_output")
    check(isinstance(document.get("inputs"), list), "inputs")
    feeds: dict[str, Any] = {}
    for tensor in document["inputs"]:
        check(isinstance(tensor, dict), "input")
        port = _port(model, tensor.get("name"), tensor.get("datatype"), feeds)
        shape = _shape(port, tensor.get("shape"))
        size = _object(tensor, "parameters").get("binary_data_size")
        if size is None:
            check("data" in tensor, "data")
            feeds[port.name] = _from_json(model, port, shape, tensor["data"])
            continue
        check(type(size) is int and 0 <= size <= len(blobs) and "data" not in tensor, "binary_data_size")
        feeds[port.name] = _bytes(model, port, shape, blobs[:size])
        blobs = blobs[size:]
    check(not blobs, "left over")
    return _whole(model, feeds), _outputs(model, document.get("outputs"))


def _outputs(model: Direct, outputs: Any) -> list[str]:
    every = [p.name for p in model.outputs]
    if outputs is None or outputs == []:
        return every
    check(isinstance(outputs, list) and all(isinstance(o, dict) for o in outputs), "outputs")
    for output in outputs:
        check(isinstance(_object(output, "parameters").get("binary_data", False), bool), "binary_data")
    names = [o.get("name") for o in outputs]
    check(all(isinstance(n, str) and n in every for n in names) and len(set(names)) == len(names), "output names")
    return names


def _object(owner: dict[str, Any], name: str) -> dict[str, Any]:
    found = owner.get(name, {})
    check(isinstance(found, dict), name)
    return found  # type: ignore[no-any-return]


def _port(model: Direct, name: Any, datatype: Any, feeds: dict[str, Any]) -> Port:
    port = next((p for p in model.inputs if p.name == name), None)
    if port is None or port.datatype != datatype or port.name in feeds:
        raise Invalid("name or datatype")
    return port


def _shape(port: Port, shape: Any) -> list[int]:
    check(isinstance(shape, list) and all(type(d) is int and d > 0 for d in shape), "dims")
    if list(port.shape) == [-1, 1] and len(shape) == 1:
        shape = [*shape, 1]  # a column
    check(len(shape) == len(port.shape), "rank")
    check(all(d in (-1, s) for d, s in zip(port.shape, shape, strict=True)), "shape")
    return shape


def _json(head: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len({k for k, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    def number(text: str) -> float:
        check(math.isfinite(float(text)), "a double")
        return float(text)

    def whole(text: str) -> int:
        check(len(text) <= 400, "digits")
        return int(text)

    def constant(text: str) -> Any:
        raise Invalid(text)

    try:
        return json.loads(
            head.decode(), object_pairs_hook=unique, parse_float=number, parse_int=whole, parse_constant=constant
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Invalid("JSON") from error


def _is_text(value: str) -> bool:
    """Tell whether UTF-8 can hold it: half of a surrogate pair can stand in JSON."""
    return not any("\ud800" <= c <= "\udfff" for c in value)


def _from_json(model: Direct, port: Port, shape: list[int], data: Any) -> Any:
    check(isinstance(data, list) and port.datatype != "FP16", "data")
    if data and isinstance(data[0], list):
        check(len(data) == shape[0], "nesting")
        for dim in shape[1:]:
            check(all(isinstance(d, list) and len(d) == dim for d in data), "nesting")
            data = [cell for d in data for cell in d]
    kinds: Any = {"BYTES": (str,), "BOOL": (bool,)}.get(port.datatype, (int,))
    check(all(type(v) in ((*kinds, float) if port.datatype.startswith("FP") else kinds) for v in data), "elements")
    return _array(model, port, shape, data)


def _array(model: Direct, port: Port, shape: list[int], flat: list[Any]) -> Any:
    check(len(flat) == math.prod(shape), "count")
    if port.datatype == "BYTES":
        check(all(map(_is_text, flat)), "UTF-8")
    elif not port.datatype.startswith(("FP", "BOOL")):
        info = np.iinfo(DTYPES[port.datatype])
        check(all(info.min <= v <= info.max for v in flat), "range")
    array = np.empty(len(flat), DTYPES[port.datatype])
    try:
        with np.errstate(over="ignore"):
            array[:] = flat
    except OverflowError as error:
        raise Invalid("a double") from error
    if array.dtype.kind == "f" and np.isinf(array).any():
        check(any(isinstance(v, float) and math.isinf(v) for v in flat), "what its type holds")
    return _finite(model, port, array).reshape(shape)


def _bytes(model: Direct, port: Port, shape: list[int], blob: bytes) -> Any:
    if port.datatype == "BYTES":
        texts = []
        while blob:
            check(len(blob) >= 4, "a length")
            end = 4 + struct.unpack("<I", blob[:4])[0]
            check(len(blob) >= end, "an element")
            try:
                texts.append(blob[4:end].decode())
            except UnicodeDecodeError as error:
                raise Invalid("UTF-8") from error
            blob = blob[end:]
        return _array(model, port, shape, texts)
    dtype = np.dtype(DTYPES[port.datatype])
    check(len(blob) == math.prod(shape) * dtype.itemsize, "bytes")
    if port.datatype == "BOOL":
        check(set(blob) <= {0, 1}, "0 or 1")
    return _finite(model, port, np.frombuffer(blob, dtype)).reshape(shape)


def _finite(model: Direct, port: Port, array: Any) -> Any:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bare = "features" not in model.signature  # nothing says that they have no meaning to it
        check(bare or (model.may_be_missing(port) and not np.isinf(array).any()), "finite")
    return array


def _whole(model: Direct, feeds: dict[str, Any]) -> dict[str, Any]:
    check(len(feeds) == len(model.inputs), "all inputs")
    if model.batched:
        rows = {len(array) for array in feeds.values()}
        check(len(rows) == 1 and max(rows) <= MOST_ROWS, "rows")
    return feeds


def grpc(models: dict[str, Direct], message: bytes) -> tuple[Direct, dict[str, Any], list[str]]:
    """Read a ModelInferRequest as it came; also returns the model that it names."""
    try:
        request = service_pb2.ModelInferRequest.FromString(message)
    except DecodeError as error:
        raise Invalid("protobuf") from error
    check(request.model_name in models, "model")
    model = models[request.model_name]
    check(request.model_version in ("", *model.versions), "version")
    raws, feeds = list(request.raw_input_contents), {}
    check(not raws or len(raws) == len(request.inputs), "raw contents")
    for index, tensor in enumerate(request.inputs):
        port = _port(model, tensor.name, tensor.datatype, feeds)
        shape = _shape(port, list(tensor.shape))
        if raws:
            check(not tensor.HasField("contents"), "both contents")
            feeds[port.name] = _bytes(model, port, shape, raws[index])
            continue
        field = TYPED.get(port.datatype)
        check(field is not None and {f.name for f, _ in tensor.contents.ListFields()} <= {field}, "contents")
        values = list(getattr(tensor.contents, str(field)))
        try:
            values = [v.decode() for v in values] if port.datatype == "BYTES" else values
        except UnicodeDecodeError as error:
            raise Invalid("UTF-8") from error
        feeds[port.name] = _array(model, port, shape, values)
    names = [o.name for o in request.outputs] or [p.name for p in model.outputs]
    check(len(set(names)) == len(names) and {p.name for p in model.outputs}.issuperset(names), "output names")
    return model, _whole(model, feeds), names
