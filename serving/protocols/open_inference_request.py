"""Reads an Open Inference Protocol v2 request over HTTP: the JSON, and the raw tensors that may stand behind it.

Sources: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md and
Triton's extensions for binary tensors, classification, priority and timeout (schedule policy).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from serving.engine.tensor_binder import RequestedOutput, TensorBinder
from serving.errors import InvalidRequest
from serving.protocols import strict_json
from serving.protocols.codec import Decoded
from serving.protocols.request_parameters import classes_of, flag, options_of, refuse_shared
from serving.protocols.tensor_json import array_of
from serving.tensor_bytes import Buffer, read
from serving.tensors import NUMPY, Array, count

_MOST_PLANS = 256
_LONGEST_PLAN = 1024
_LARGEST_LONE = 4096
_LONE = frozenset(NUMPY) - {"BYTES", "BOOL", "FP16", "BF16"}


class Context(NamedTuple):
    """What the answer must know of its request: its id, and the outputs asked for (None: all, as JSON)."""

    identity: str | None
    wanted: tuple[RequestedOutput, ...] | None


class _Lone(NamedTuple):
    """The only input of a request, small, its numbers raw: what makes its array in one step.

    size: bytes of the whole body. zeros: as many as there are elements, where these must be finite, else None.
    """

    size: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    zeros: Array | None


class _Plan(NamedTuple):
    """A JSON head that was read before, whose inputs are all raw: (position, datatype, shape, bytes) of each."""

    inputs: tuple[tuple[int, str, tuple[int, ...], int], ...]
    rows: int
    context: Context
    timeout: float | None
    priority: int | None
    lone: _Lone | None


class Reader:
    """Reads requests for one signature. Raises InvalidRequest or SignatureMismatch; both are 400 in this protocol."""

    def __init__(self, binder: TensorBinder) -> None:
        self._binder = binder
        self._plans: dict[bytes, _Plan] = {}

    def json(self, body: Buffer) -> Decoded:
        """Read a body that is all JSON."""
        return self._document(strict_json.loads(body), memoryview(b""), b"")

    def binary(self, length: bytes, body: Buffer) -> Decoded:
        """Read a body whose first `length` bytes are JSON; what follows are raw tensors, in the order of the inputs."""
        if not length.isdigit() or len(length) > 12 or int(length) > len(body):
            raise InvalidRequest(
                f"Inference-Header-Content-Length should be the length of the JSON, 0 to {len(body)} for this body"
            )
        size = int(length)
        if size == 0:
            return self._raw(memoryview(body))
        head = bytes(body[:size])
        plan = self._plans.get(head)
        if plan is not None and plan.lone is not None and (array := _lone(plan.lone, body, size)) is not None:
            return Decoded((array,), plan.rows, plan.context, plan.timeout, plan.priority)
        blobs = memoryview(body)[size:]
        if plan is None:
            return self._document(strict_json.loads(head), blobs, head)
        arrays: list[Array | None] = [None] * len(plan.inputs)
        place = 0
        for index, (position, datatype, shape, size) in enumerate(plan.inputs):
            arrays[position] = self._read(blobs[place : place + size], position, datatype, shape, f"/inputs/{index}")
            place += size
        if place != len(blobs):
            raise InvalidRequest(f"the body has {len(blobs)} bytes behind its JSON, and the inputs take {place}")
        inputs = tuple(array for array in arrays if array is not None)
        return Decoded(inputs, plan.rows, plan.context, plan.timeout, plan.priority)

    def _read(self, raw: memoryview, position: int, datatype: str, shape: tuple[int, ...], at: str) -> Array:
        array = read(raw, datatype, shape, at)
        self._binder.check(position, array, at)
        return array

    def _raw(self, body: memoryview) -> Decoded:
        spec = self._binder.inputs[0]
        shape = self._binder.raw_shape(len(body))
        if spec.datatype == "BYTES":
            body = memoryview(len(body).to_bytes(4, "little") + bytes(body))
        inputs, rows = self._binder.assemble([self._read(body, 0, spec.datatype, shape, "the body")])
        return Decoded(inputs, rows, Context(None, self._binder.all_outputs(binary=True)))

    def _document(self, document: Any, blobs: memoryview, head: bytes) -> Decoded:
        if not isinstance(document, dict):
            raise InvalidRequest(f'the body is {strict_json.kind(document)}: send {{"inputs": [...]}}')
        identity = document.get("id")
        if identity is not None and not isinstance(identity, str):
            raise InvalidRequest(f'"id" is {strict_json.kind(identity)}: send a string')
        binary, timeout, priority, explain = options_of(_parameters(document, ""))
        given = document.get("inputs")
        if not isinstance(given, list):
            raise InvalidRequest('"inputs" is missing or no array: send one object for each input tensor')
        arrays: list[Array | None] = [None] * len(self._binder.slots)
        planned: list[tuple[int, str, tuple[int, ...], int]] = []
        place = 0
        for index, tensor in enumerate(given):
            position, shape, size = self._tensor(tensor, f"/inputs/{index}", len(blobs) - place)
            if arrays[position] is not None:
                raise InvalidRequest(f"/inputs/{index}/name: input {tensor['name']!r} occurs twice")
            if size is None:
                arrays[position] = self._data(tensor, position, shape, f"/inputs/{index}/data")
                continue
            raw = blobs[place : place + size]
            arrays[position] = self._read(raw, position, tensor["datatype"], shape, f"/inputs/{index}")
            planned.append((position, tensor["datatype"], shape, size))
            place += size
        if place != len(blobs):
            raise InvalidRequest(f"the body has {len(blobs)} bytes behind its JSON, and the inputs take {place}")
        inputs, rows = self._binder.assemble(arrays)
        context = Context(identity, self._wanted(document.get("outputs"), binary=binary))
        # A head with an id will hardly come again, and would push out one that does.
        usual = len(planned) == len(inputs) and planned and all(one[0] < len(inputs) for one in planned)
        if usual and len(head) <= _LONGEST_PLAN and not identity and not explain:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            lone = self._lone(len(head), *planned[0][1:]) if len(planned) == 1 else None
            self._plans[head] = _Plan(tuple(planned), rows, context, timeout, priority, lone)
        return Decoded(inputs, rows, context, timeout, priority, explain)

    def _lone(self, head: int, datatype: str, shape: tuple[int, ...], size: int) -> _Lone | None:
        """Prepare the only input of a request, behind `head` bytes of JSON; None where it is no small numbers."""
        elements = count(shape)
        if datatype not in _LONE or elements > _LARGEST_LONE:
            return None
        dtype = NUMPY[datatype]
        return _Lone(head + size, dtype, shape, np.zeros(elements, dtype) if self._binder.finite[0] else None)

    def _tensor(self, tensor: Any, at: str, left: int) -> tuple[int, tuple[int, ...], int | None]:
        """Read what an input says of itself: position, shape, and its raw bytes (None: its data is JSON)."""
        if not isinstance(tensor, dict):
            raise InvalidRequest(f"{at}: is {strict_json.kind(tensor)}: send an object")
        position = self._binder.input(tensor.get("name"), tensor.get("datatype"), at)
        dims = tensor.get("shape")
        if not isinstance(dims, list):
            raise InvalidRequest(f"{at}/shape: should be an array of whole numbers")
        shape = self._binder.shape(position, dims, at)
        size = _blob_size(tensor, at)
        if size is not None and size > left:
            raise InvalidRequest(f"{at}/parameters/binary_data_size: is {size}, and {left} bytes are left")
        return position, shape, size

    def _data(self, tensor: dict[str, Any], position: int, shape: tuple[int, ...], at: str) -> Array:
        if "data" not in tensor:
            raise InvalidRequest(f"{at}: is missing")
        array = array_of(tensor["data"], tensor["datatype"], shape, at, missing=self._binder.may_miss(position))
        self._binder.check(position, array, at)
        return array

    def _wanted(self, outputs: Any, *, binary: bool) -> tuple[RequestedOutput, ...] | None:
        """Read the `outputs` filter; `binary` is what holds for those that do not say."""
        if outputs is None or outputs == []:
            return self._binder.all_outputs(binary=True) if binary else None
        if not isinstance(outputs, list):
            raise InvalidRequest('"outputs" should be an array')
        return self._binder.requested(_asked(outputs, binary=binary))


def _lone(lone: _Lone, body: Buffer, start: int) -> Array | None:
    """Make the array of the only input, whose bytes begin at `start`; None for all that must be looked at closely."""
    if len(body) != lone.size:
        return None
    array: Array = np.ndarray(lone.shape, lone.dtype, body, start)
    if not array.flags.aligned:
        array = array.copy()
    # What is not finite makes no zero of a zero: a quarter of the time of summing, which may overflow.
    return array if lone.zeros is None or not np.vdot(array, lone.zeros) else None


def _asked(outputs: list[Any], *, binary: bool) -> Iterator[tuple[Any, bool, int]]:
    for index, output in enumerate(outputs):
        at = f"/outputs/{index}"
        if not isinstance(output, dict):
            raise InvalidRequest(f"{at}: is {strict_json.kind(output)}: send an object with a name")
        parameters = _parameters(output, at)
        refuse_shared(parameters, at)
        as_bytes = flag(parameters, "binary_data", f"{at}/parameters", default=binary)
        yield output.get("name"), as_bytes, classes_of(parameters, at)


def _parameters(owner: dict[str, Any], at: str) -> dict[str, Any]:
    parameters = owner.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{at}/parameters: should be an object")
    return parameters


def _blob_size(tensor: dict[str, Any], at: str) -> int | None:
    """Return how many raw bytes an input says that it has, or None where its data is JSON."""
    parameters = _parameters(tensor, at)
    refuse_shared(parameters, at)
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise InvalidRequest(f"{at}/parameters/binary_data_size: should be a whole number of bytes")
    if "data" in tensor:
        raise InvalidRequest(f"{at}: has both data and binary_data_size: send one of them")
    return size
