"""The Open Inference Protocol v2 over REST, in JSON.

Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import simdjson

from serving.engine.model import Model
from serving.engine.signature import TensorSpec
from serving.errors import Detail, InvalidRequest, SignatureMismatch, listed
from serving.http_api import strict_json
from serving.http_api.codec import INLINE_BYTES, Decoded
from serving.http_api.tensor_json import array_of
from serving.tensors import NUMPY, Array, Tensors

PROTOCOL = "v2"
_SHORT_BYTES = 2048
_MOST_SHAPES = 256
_NUMBERS = frozenset({int, float})
_WHOLE = frozenset({int})


class Codec:
    """Decodes and encodes v2 JSON for one version of a model."""

    protocol = PROTOCOL

    def __init__(self, model: Model) -> None:
        signature = model.signature
        self._specs = signature.inputs
        self._by_name = {spec.name: i for i, spec in enumerate(self._specs)}
        self._outputs = signature.outputs
        self._output_names = [spec.name for spec in self._outputs]
        self._batch = signature.batch
        self._finite = [
            spec.datatype in ("FP16", "FP32", "FP64") and not all(f.allow_non_finite for f in features)
            for spec, features in (
                (spec, signature.features if signature.layout == "matrix" else (signature.features[i],))
                for i, spec in enumerate(self._specs)
            )
        ]
        only = self._specs[0]
        self._fast = len(self._specs) == 1 and only.datatype in ("FP32", "FP64") and self._finite[0]
        self._fast_shape = only.shape
        self._fast_name, self._fast_datatype = only.name, only.datatype
        self._fast_dtype = NUMPY[only.datatype]
        self._parser = simdjson.Parser()
        self._packers: dict[tuple[int, ...], Callable[..., bytes]] = {}
        self._head = b'"model_name":%b,"model_version":%b,"outputs":[' % (
            orjson.dumps(model.name),
            orjson.dumps(model.version),
        )
        self._output_heads = [
            b'{"name":%b,"datatype":"%b","shape":' % (orjson.dumps(spec.name), spec.datatype.encode())
            for spec in self._outputs
        ]
        self._heads: list[dict[tuple[int, ...], bytes]] = [{} for _ in self._outputs]

    def decode(self, headers: Sequence[tuple[bytes, bytes]], body: bytes | bytearray) -> Decoded:
        """Read a body into feeds. Raises InvalidRequest or SignatureMismatch; both are 400 in this protocol."""
        if self._fast:
            decoded = self._decode_short(body) if len(body) < _SHORT_BYTES else self._decode_plain(body)
            if decoded is not None:
                return decoded
        return self._decode_whole(strict_json.loads(body))

    def _decode_short(self, body: bytes | bytearray) -> Decoded | None:
        """Read the usual request where it is short. None for anything else, wrong or right.

        Does what `_decode_plain` does; up to some 2 KiB its fewer steps cost less than simdjson saves.
        """
        try:
            document = orjson.loads(body)
            (tensor,) = document["inputs"]
            data, shape = tensor["data"], tensor["shape"]
            members = len(document)
            # As many colons as members: no key stands twice.
            if body.count(b":") != members + 4 or len(tensor) != 4 or members > 2:
                return None
            if tensor["name"] != self._fast_name or tensor["datatype"] != self._fast_datatype:
                return None
            identity = document["id"] if members == 2 else None
            if not (_NUMBERS.issuperset(map(type, data)) and _WHOLE.issuperset(map(type, shape))):
                return None
            pack = self._packers.get((len(data), *shape)) or self._packer(shape, len(data))
            if pack is None:
                return None
            packed = pack(*data)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error):
            return None
        if not (identity is None or isinstance(identity, str)):
            return None
        return Decoded(
            (np.ndarray(shape, self._fast_dtype, packed),),
            shape[0] if self._batch == "dynamic" else 1,
            (identity, None),
        )

    def _packer(self, shape: list[int], size: int) -> Callable[..., bytes] | None:
        """Make, and keep, what packs `size` numbers for a shape; None where they do not fit it."""
        if not self._fits(shape, size):
            return None
        if len(self._packers) >= _MOST_SHAPES:
            self._packers.clear()
        # Standard mode refuses what is too large for the model's float; native mode would make it an infinity.
        made = self._packers[size, *shape] = struct.Struct(f"<{size}{self._fast_dtype.char}").pack
        return made

    def _decode_plain(self, body: bytes | bytearray) -> Decoded | None:
        """Read the usual request: one flat float tensor, no options. None for anything else, wrong or right."""
        # A large body is decoded on another thread, where the loop's parser must not be touched.
        parser = self._parser if len(body) <= INLINE_BYTES else simdjson.Parser()
        document: Any = None
        tensor: Any = None
        try:
            document = parser.parse(body)
            tensor = document["inputs"][0]
            members = len(document)
            # Counting the marks tells, without a walk, that no key stands twice and that no array is nested.
            if body.count(b":") != members + 4 or body.count(b"[") != 3 or len(tensor) != 4:
                return None
            identity = document["id"] if members == 2 else None
            if members > 2 or tensor["name"] != self._fast_name or tensor["datatype"] != self._fast_datatype:
                return None
            shape = tensor["shape"].as_list()
            data = np.frombuffer(tensor["data"].as_buffer(of_type="d"))
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, AttributeError):
            return None
        finally:
            document = tensor = None  # the parser can't be used again while a part of its document lives
        if not self._fits(shape, data.size) or not (identity is None or isinstance(identity, str)):
            return None
        array = data.astype(self._fast_dtype).reshape(shape)
        # A sum is finite only if all of its terms are, and costs half of asking each one.
        if not math.isfinite(array.sum()) and not np.isfinite(array).all():
            return None
        return Decoded((array,), shape[0] if self._batch == "dynamic" else 1, (identity, None))

    def _fits(self, shape: list[Any], size: int) -> bool:
        """Tell whether a shape is one that the only input takes, and holds `size` elements."""
        if len(shape) != len(self._fast_shape):
            return False
        total = 1
        for given, declared in zip(shape, self._fast_shape, strict=True):
            if type(given) is not int or given < 1 or declared not in (-1, given):
                return False
            total *= given
        return total == size

    def _decode_whole(self, document: Any) -> Decoded:
        if not isinstance(document, dict):
            raise InvalidRequest(f'the body is {strict_json.kind(document)}: send {{"inputs": [...]}}')
        identity = document.get("id")
        if identity is not None and not isinstance(identity, str):
            raise InvalidRequest(f'"id" is {strict_json.kind(identity)}: send a string')
        if not isinstance(document.get("parameters", {}), dict):
            raise InvalidRequest('"parameters" should be an object')
        given = document.get("inputs")
        if not isinstance(given, list):
            raise InvalidRequest('"inputs" is missing or no array: send one object for each input tensor')
        arrays: list[Array | None] = [None] * len(self._specs)
        for index, tensor in enumerate(given):
            position, array = self._tensor(tensor, index)
            if arrays[position] is not None:
                raise InvalidRequest(f"/inputs/{index}/name: input {self._specs[position].name!r} stands twice")
            arrays[position] = array
        missing = [spec.name for spec, array in zip(self._specs, arrays, strict=True) if array is None]
        if missing:
            raise InvalidRequest(f"inputs are missing: {', '.join(missing)}"[:500])
        inputs = tuple(array for array in arrays if array is not None)
        return Decoded(inputs, self._rows(inputs), (identity, self._chosen(document.get("outputs"))))

    def _tensor(self, tensor: Any, index: int) -> tuple[int, Array]:
        at = f"/inputs/{index}"
        if not isinstance(tensor, dict):
            raise InvalidRequest(f"{at}: is {strict_json.kind(tensor)}: send an object")
        name = tensor.get("name")
        if not isinstance(name, str) or name not in self._by_name:
            known = ", ".join(self._by_name)
            shown = repr(name[:64]) if isinstance(name, str) else strict_json.kind(name)
            raise InvalidRequest(f"{at}/name: the model has no input {shown}; inputs: {known}"[:600])
        position = self._by_name[name]
        spec = self._specs[position]
        datatype = tensor.get("datatype")
        if datatype != spec.datatype:
            known_type = isinstance(datatype, str) and datatype in NUMPY
            said = datatype if known_type else "no datatype of the protocol"
            raise InvalidRequest(f"{at}/datatype: is {said}, and input {name!r} takes {spec.datatype}")
        if not isinstance(tensor.get("parameters", {}), dict):
            raise InvalidRequest(f"{at}/parameters: should be an object")
        shape = self._shape(tensor.get("shape"), spec, at)
        if "data" not in tensor:
            raise InvalidRequest(f"{at}/data: is missing")
        array = array_of(tensor["data"], spec.datatype, shape, f"{at}/data")
        if self._finite[position] and not np.isfinite(array).all():
            raise SignatureMismatch(f"{at}/data: a number is too large for {spec.datatype}")
        return position, array

    def _shape(self, shape: Any, spec: TensorSpec, at: str) -> tuple[int, ...]:
        if not isinstance(shape, list) or not all(type(dim) is int for dim in shape):
            raise InvalidRequest(f"{at}/shape: should be an array of whole numbers")
        declared = list(spec.shape)
        if len(shape) != len(declared):
            raise InvalidRequest(f"{at}/shape: has {len(shape)} dimensions, and input {spec.name!r} has {declared}")
        if any(dim < 0 for dim in shape):
            raise InvalidRequest(f"{at}/shape: has a negative dimension")
        if any(d not in (-1, g) for d, g in zip(declared, shape, strict=True)):
            raise InvalidRequest(f"{at}/shape: is {str(shape)[:200]}, and input {spec.name!r} has {declared}")
        if 0 in shape:
            raise InvalidRequest(f"{at}/shape: has no rows: send at least one")
        return tuple(shape)

    def _rows(self, inputs: Tensors) -> int:
        if self._batch != "dynamic":
            return 1
        rows = int(inputs[0].shape[0])
        for spec, array in zip(self._specs, inputs, strict=True):
            if array.shape[0] != rows:
                raise InvalidRequest(
                    f"inputs have different numbers of rows: {self._specs[0].name} {rows}, {spec.name} {array.shape[0]}"
                )
        return rows

    def _chosen(self, outputs: Any) -> list[int] | None:
        """Read the `outputs` filter: positions in the order asked for, or None for all."""
        if outputs is None or outputs == []:
            return None
        if not isinstance(outputs, list):
            raise InvalidRequest('"outputs" should be an array')
        details, chosen = [], []
        for index, output in enumerate(outputs):
            name = output.get("name") if isinstance(output, dict) else None
            if not isinstance(name, str) or name not in self._output_names:
                known = ", ".join(self._output_names)
                details.append(Detail(f"/outputs/{index}/name", f"the model has no such output; outputs: {known}"))
            elif (position := self._output_names.index(name)) in chosen:
                details.append(Detail(f"/outputs/{index}/name", f"output {name!r} stands twice"))
            else:
                chosen.append(position)
        if details:
            raise listed("the request does not fit the model", details)
        return chosen

    def encode(self, outputs: Tensors, context: Any) -> bytes:
        """Write the answer; numbers that are not finite become null, as in every JSON answer here."""
        identity, chosen = context
        parts = []
        for position in range(len(outputs)) if chosen is None else chosen:
            array = outputs[position]
            head = self._heads[position].get(array.shape) or self._output_head(position, array.shape)
            data = array.ravel().tolist() if array.dtype.hasobject else array.ravel()
            parts.append(b"%b%b}" % (head, orjson.dumps(data, None, orjson.OPT_SERIALIZE_NUMPY)))
        head = b"{" if identity is None else b'{"id":%b,' % orjson.dumps(identity)
        return b"%b%b%b]}" % (head, self._head, b",".join(parts))

    def _output_head(self, position: int, shape: tuple[int, ...]) -> bytes:
        heads = self._heads[position]
        if len(heads) >= _MOST_SHAPES:
            heads.clear()
        made = heads[shape] = b'%b%b,"data":' % (self._output_heads[position], orjson.dumps(shape))
        return made


def metadata(name: str, versions: Sequence[str], model: Model) -> dict[str, Any]:
    """Describe a model as `GET /v2/models/{name}` does."""

    def ports(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]

    return {
        "name": name,
        "versions": list(versions),
        "platform": "onnxruntime_onnx",
        "inputs": ports(model.signature.inputs),
        "outputs": ports(model.signature.outputs),
    }
