"""The Open Inference Protocol v2 over REST: JSON and binary tensors, with short cuts for what most requests are.

Source: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import simdjson

from serving.engine.signature import Described
from serving.engine.tensor_binder import TensorBinder
from serving.protocols.codec import Decoded, Mixed
from serving.protocols.headers import Headers, header
from serving.protocols.http_codec import LENGTH, HttpCodec
from serving.protocols.open_inference_request import Context, Reader
from serving.protocols.open_inference_response import Writer
from serving.protocols.strict_json import lenient
from serving.tensor_bytes import Buffer
from serving.tensors import NUMPY, Tensors

PROTOCOL = "v2"
_SHORT_BYTES = 2048
_MOST_SHAPES = 256
_NUMBERS = frozenset({int, float})
_WHOLE = frozenset({int})


class Codec(HttpCodec):
    """Decodes and encodes v2 JSON for one version of a model."""

    protocol = PROTOCOL
    raw_tensors = True

    def __init__(self, model: Described) -> None:
        signature = model.signature
        self._made_of = model
        binder = TensorBinder(signature, together=model.together)
        self._reader = Reader(binder)
        self._writer = Writer(model, binder)
        self._batch = signature.batch
        self.slow_bytes = any(spec.datatype == "BYTES" for spec in signature.inputs)
        self._texts = frozenset(i for i, spec in enumerate(signature.outputs) if spec.datatype == "BYTES")
        self._fast = len(signature.inputs) == 1 and signature.inputs[0].datatype in ("FP32", "FP64")
        if self._fast:
            only = signature.inputs[0]
            self._fast_shape = only.shape
            self._fast_name, self._fast_datatype = only.name, only.datatype
            self._fast_dtype = NUMPY[only.datatype]
        self._parser = simdjson.Parser()
        self._packers: dict[tuple[int, ...], Callable[..., bytes]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Codec, (self._made_of,)

    def decode(self, headers: Headers, body: Buffer) -> Decoded:
        """Read a body into feeds. Raises InvalidRequest or SignatureMismatch; both are 400 in this protocol."""
        length = header(headers, LENGTH)
        if length is not None:
            return self._reader.binary(length, body)
        body = bytes(body)
        decoded = self._decode_short(body) if self._fast and len(body) < _SHORT_BYTES else self.quick(body)
        return self._reader.json(body) if decoded is None else decoded

    def quick(self, body: bytes) -> Decoded | None:
        """Read the usual request, one float tensor without options; None for anything else, wrong or right."""
        if not self._fast:
            return None
        return self._decode_short(body) if len(body) < _SHORT_BYTES else self._decode_plain(body)

    def _decode_short(self, body: bytes) -> Decoded | None:
        """Read the usual request where it is short. None for anything else, wrong or right.

        Does what `_decode_plain` does; up to some 2 KiB its fewer steps cost less than simdjson saves.
        """
        try:
            document = lenient(body)
            (tensor,) = document["inputs"]
            data, shape = tensor["data"], tensor["shape"]
            members = len(document)
            # As many colons as members: no key occurs twice.
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
            Context(identity, None),
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

    def _decode_plain(self, body: bytes) -> Decoded | None:
        """Read the usual request: one flat float tensor, no options. None for anything else, wrong or right."""
        document: Any = None
        tensor: Any = None
        try:
            document = self._parser.parse(body)
            tensor = document["inputs"][0]
            members = len(document)
            # Counting the marks tells, without a walk, that no key occurs twice and that no array is nested.
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
        with np.errstate(over="ignore", invalid="ignore"):
            array = data.astype(self._fast_dtype).reshape(shape)
            total = float(array.sum())
        # A sum is finite only if all of its terms are, and costs half of asking each one.
        if not math.isfinite(total) and not np.isfinite(array).all():
            return None
        return Decoded((array,), shape[0] if self._batch == "dynamic" else 1, Context(identity, None))

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

    def slow_answer(self, context: Context) -> bool:  # noqa: D102
        return context.wanted is None or any(
            not wanted.binary or wanted.classes or wanted.position in self._texts for wanted in context.wanted
        )

    def encode(self, outputs: Tensors, context: Any) -> bytes | Mixed:
        """Write the answer to a decoded request."""
        return self._writer.write(outputs, context)
