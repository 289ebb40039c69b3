"""ModelInfer from message bytes to message bytes, for one version of a model.

Most clients send the same request again and again with other numbers in it. So what the message says in front of its
raw contents is read once, through protobuf, and kept as a plan; answers are written from templates. Everything else
(typed contents, what has not been seen before, what is wrong) goes through the protobuf messages of `tensors`.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from serving.engine.model import Model
from serving.engine.ports import Ports, Wanted
from serving.grpc_api.fields import Parts, field, field_head, length_at
from serving.grpc_api.long_message import PACKED, Bulk
from serving.grpc_api.messages import message
from serving.grpc_api.tensors import Codec, Decoded, contents_of
from serving.tensor_bytes import HANDOVER_S, Buffer, in_parts, read, string_pieces, write
from serving.tensors import Array, Tensors

_MOST_PLANS = 256
_LONGEST_PLAN = 1024
_MOST_TENSORS = 64
# Field numbers of ModelInferRequest and Response as tags of length-delimited fields.
_NAME, _VERSION, _ID, _RAW_INPUT, _RAW_OUTPUT, _LAST = 0x0A, 0x12, 0x1A, 0x3A, 0x32, 0x3A
_OUTPUT, _CONTENTS, _BYTES = 0x2A, 0x2A, 0x42
_PIECE = 4096
"""Elements that are written at a time, in about a quarter of a millisecond."""

Response = message("ModelInferResponse")
Output = message("ModelInferResponse.InferOutputTensor")
Contents = message("InferTensorContents")


class Cut(NamedTuple):
    """A request cut up: what stands in front of the raw contents but the id, the id, and where the contents lie."""

    head: bytes
    identity: bytes
    raws: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """What a head means: (position, datatype, shape, bytes) of each input, in the order of the raw contents."""

    inputs: tuple[tuple[int, str, tuple[int, ...], int], ...]
    rows: int
    wanted: tuple[Wanted, ...]
    priority: int


def cut_up(request: Buffer) -> Cut | None:
    """Cut up a request whose contents are all raw; None for any other, wrong or right."""
    place, end = 0, len(request)
    identity = b""
    first = second = 0  # where the id stands
    try:
        while place < end and (tag := request[place]) != _RAW_INPUT:
            size = request[place + 1]
            start = place + 2
            if size > 0x7F:
                size, start = length_at(request, place + 1)
            if tag > _LAST or tag & 7 != 2 or size > _LONGEST_PLAN:
                return None
            if tag == _ID:
                if second:
                    return None
                first, second = place, start + size
                identity = bytes(request[start:second])
            place = start + size
        if not place < end or place > 2 * _LONGEST_PLAN:
            return None
        head = bytes(request[:place]) if not second else bytes(request[:first]) + bytes(request[second:place])
        raws: list[tuple[int, int]] = []
        while place < end:
            if request[place] != _RAW_INPUT or len(raws) == _MOST_TENSORS:
                return None
            size = request[place + 1]
            start = place + 2
            if size > 0x7F:
                size, start = length_at(request, place + 1)
            place = start + size
            raws.append((start, place))
    except IndexError:
        return None
    return Cut(head, identity, tuple(raws)) if place == end else None


class Wire:
    """Reads requests and writes responses."""

    def __init__(self, model: Model) -> None:
        self._codec = Codec(model)
        self._ports = Ports(model.signature)
        self._plans: dict[bytes, Plan] = {}
        self._opening = field(_NAME, model.name.encode()) + field(_VERSION, model.version.encode())
        self._outputs: dict[tuple[Any, ...], bytes] = {}
        self.slow_bytes = any(spec.datatype == "BYTES" for spec in model.signature.inputs)
        self._texts = frozenset(i for i, spec in enumerate(self._ports.outputs) if spec.datatype == "BYTES")

    def plan(self, cut: Cut) -> Plan | None:
        """Return the plan of a request that looks like one before."""
        plan = self._plans.get(cut.head)
        return plan if plan is not None and len(plan.inputs) == len(cut.raws) else None

    def planned(self, request: Buffer, cut: Cut, plan: Plan) -> Decoded:
        """Read a request by its plan; numbers are views of `request`. Raises InvalidRequest or SignatureMismatch."""
        view = memoryview(request)
        if len(plan.inputs) == 1:
            array = self._tensor(view, cut.raws[0], plan.inputs[0], 0)
            return Decoded((array,), plan.rows, plan.wanted, True, None, plan.priority)
        arrays: list[Any] = [None] * len(plan.inputs)
        for index, place in enumerate(cut.raws):
            arrays[plan.inputs[index][0]] = self._tensor(view, place, plan.inputs[index], index)
        return Decoded(tuple(arrays), plan.rows, plan.wanted, True, None, plan.priority)

    def _tensor(
        self, view: memoryview, place: tuple[int, int], due: tuple[int, str, tuple[int, ...], int], index: int
    ) -> Array:
        position, datatype, shape, _ = due
        array = read(view[place[0] : place[1]], datatype, shape, f"/raw_input_contents/{index}")
        self._ports.check(position, array, f"/inputs/{index}")
        return array

    def decode(self, request: Any, bulk: Bulk | None, cut: Cut | None) -> Decoded:
        """Read a request from its protobuf message and what was taken out of it, and keep the plan.

        Raises InvalidRequest or SignatureMismatch.
        """
        decoded = self._codec.decode(request, bulk)
        if cut is not None and decoded.raw and decoded.timeout is None and len(cut.head) <= _LONGEST_PLAN:
            positions = {spec.name: i for i, spec in enumerate(self._ports.inputs)}
            inputs = tuple(
                (positions[t.name], t.datatype, tuple(t.shape), e - s)
                for t, (s, e) in zip(request.inputs, cut.raws, strict=True)
            )
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[cut.head] = Plan(inputs, decoded.rows, decoded.wanted, decoded.priority)
        return decoded

    def slow_answer(self, decoded: Decoded) -> bool:
        """Tell whether a large raw answer takes time to write: numbers are only put together."""
        return any(wanted.classes or wanted.position in self._texts for wanted in decoded.wanted)

    def encode(self, outputs: Tensors, identity: bytes, decoded: Decoded) -> bytes:
        """Write the response."""
        if not decoded.raw:
            response: bytes = self._codec.encode(outputs, identity.decode(), decoded).SerializeToString()
            return response
        blobs: list[bytes] = []
        shapes: list[Any] = [decoded.wanted]
        for position, _, classes in decoded.wanted:
            array = outputs[position]
            if classes:
                array = self._ports.classified(position, array, classes)
            shapes.append(array.shape)
            blob = write(array)
            blobs += (field_head(_RAW_OUTPUT, len(blob)), blob)
        return b"".join((self._opened(identity), self._described(decoded.wanted, shapes), *blobs))

    def _opened(self, identity: bytes) -> bytes:
        return self._opening + field(_ID, identity) if identity else self._opening

    def _described(self, wanted: tuple[Wanted, ...], shapes: list[Any]) -> bytes:
        """Write the outputs of an answer that is raw, without contents; `shapes` stand behind what is wanted."""
        key = tuple(shapes)
        described = self._outputs.get(key)
        if described is None:
            if len(self._outputs) >= _MOST_PLANS:
                self._outputs.clear()
            described = self._outputs[key] = b"".join(
                field(_OUTPUT, self._output(one, shape)) for one, shape in zip(wanted, shapes[1:], strict=True)
            )
        return described

    def _output(self, one: Wanted, shape: tuple[int, ...]) -> bytes:
        spec = self._ports.outputs[one.position]
        described: bytes = Output(
            name=spec.name, datatype="BYTES" if one.classes else spec.datatype, shape=shape
        ).SerializeToString()
        return described

    def encode_long(self, outputs: Tensors, identity: bytes, decoded: Decoded) -> Parts:
        """Write what `encode` writes, in parts, numbers as they lie: for another thread than the loop's."""
        chosen = [
            self._ports.classified(w.position, outputs[w.position], w.classes) if w.classes else outputs[w.position]
            for w in decoded.wanted
        ]
        parts: Parts = [self._opened(identity)]
        if decoded.raw or self._codec.only_raw(decoded.wanted):
            parts.append(self._described(decoded.wanted, [decoded.wanted, *[array.shape for array in chosen]]))
            for array in chosen:
                blob = in_parts(array)
                parts += (field_head(_RAW_OUTPUT, sum(map(len, blob))), *blob)
            return parts
        for one, array in zip(decoded.wanted, chosen, strict=True):
            datatype = "BYTES" if one.classes else self._ports.outputs[one.position].datatype
            contents = _contents(array, datatype)
            size = sum(map(len, contents))
            described = self._output(one, array.shape) + field_head(_CONTENTS, size)
            parts += (field_head(_OUTPUT, len(described) + size) + described, *contents)
        return parts


def _contents(array: Array, datatype: str) -> Parts:
    """Write typed contents: packed numbers lie as they do in memory, whole ones and strings are written in pieces."""
    if datatype in PACKED:
        packed = in_parts(array)
        return [field_head(PACKED[datatype], array.nbytes), *packed] if array.nbytes else []
    parts: Parts = []
    if datatype == "BYTES":
        for texts in string_pieces(array):
            encoded = [text.encode() for text in texts]
            if len(encoded) == 1:  # it may be long
                parts += (field_head(_BYTES, len(encoded[0])), encoded[0])
            else:
                parts.append(Contents(bytes_contents=encoded).SerializeToString())
        return parts
    flat = array.ravel()
    for at in range(0, flat.size, _PIECE):
        if at:
            time.sleep(HANDOVER_S)
        parts.append(contents_of(flat[at : at + _PIECE], datatype).SerializeToString())
    return parts
