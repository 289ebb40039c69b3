"""ModelInfer from message bytes to message bytes, for one version of a model.

Most clients send the same request again and again with other numbers in it. So what the message says in front of its
raw contents is read once, through protobuf, and kept as a plan; answers are written from templates. Everything else
(typed contents, what has not been seen before, what is wrong) goes through the protobuf messages of `tensors`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from serving.engine.signature import Described
from serving.engine.tensor_binder import RequestedOutput, TensorBinder
from serving.errors import InvalidRequest
from serving.protocols.codec import (
    INLINE_ANSWER_BYTES,
    INLINE_BYTES,
    RAW_INLINE_BYTES,
    SMALL_ANSWER_BYTES,
    Decoded,
    Elsewhere,
    Spare,
)
from serving.protocols.headers import Headers
from serving.protocols.infer_tensors import Codec, Context
from serving.protocols.messages import message, reader
from serving.protocols.protobuf_wire import Parts, field, field_head, length_at
from serving.tensor_bytes import Buffer, as_it_lies, read, write
from serving.tensors import Array, Tensors

_RAW_INLINE_ANSWER_BYTES = 1024 * 1024
"""Raw numbers above it are sent as they lie."""
_MOST_PLANS = 256
_LONGEST_PLAN = 1024
_MOST_TENSORS = 64
# Field numbers of ModelInferRequest and Response as tags of length-delimited fields.
_NAME, _VERSION, _ID, _RAW_INPUT, _RAW_OUTPUT, _LAST = 0x0A, 0x12, 0x1A, 0x3A, 0x32, 0x3A
_OUTPUT = 0x2A

Response = message("ModelInferResponse")
Output = message("ModelInferResponse.InferOutputTensor")
_read = reader(message("ModelInferRequest"))


class RawRequest(NamedTuple):
    """A request cut up: what stands in front of the raw contents but the id, the id, and where the contents lie."""

    head: bytes
    identity: bytes
    raws: tuple[tuple[int, int], ...]


class Message(NamedTuple):
    """A request as bytes.

    cut: it cut up, where its contents are raw. parsed: what was read of it to find the model, but raw contents; None
    where it looks like one before, or is long.
    """

    request: Buffer
    cut: RawRequest | None
    parsed: Any


class Plan(NamedTuple):
    """What a head means: (position, datatype, shape, bytes) of each input, in the order of the raw contents."""

    inputs: tuple[tuple[int, str, tuple[int, ...], int], ...]
    rows: int
    context: Context
    priority: int | None


def cut_up(request: Buffer) -> RawRequest | None:
    """Cut up a request whose contents are all raw; None for any other, wrong or right."""
    place, end = 0, len(request)
    identity = b""
    first = second = 0  # where the id stands
    try:
        while place < end and (tag := request[place]) != _RAW_INPUT:
            if place > 2 * _LONGEST_PLAN:  # or millions of empty tensors would hold the event loop for seconds
                return None
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
    return RawRequest(head, identity, tuple(raws)) if place == end else None


def parsed(request: Buffer, cut: RawRequest | None) -> Any:
    """Read the protobuf message; of one that was cut up without its raw contents. Raises InvalidRequest."""
    return _read(bytes(request) if cut is None else cut.head + field(_ID, cut.identity))


class Opening(NamedTuple):
    """What stands at the beginning of every request."""

    name: str
    version: str
    identity: bytes


def opening_of(request: Buffer) -> Opening:
    """Read the model and the id that a long request begins with, which is where all but odd clients write them.

    Raises InvalidRequest.
    """
    found = {_NAME: b"", _VERSION: b"", _ID: b""}
    place = 0
    try:
        for _ in range(len(found)):  # no more: they may come millions of times
            if (tag := request[place]) not in found:
                break
            size, start = length_at(request, place + 1)
            place = start + size
            found[tag] = bytes(request[start:place])
        found[_ID].decode()
        return Opening(found[_NAME].decode(), found[_VERSION].decode(), found[_ID])
    except (IndexError, UnicodeDecodeError):
        raise InvalidRequest("the bytes are no ModelInferRequest") from None


class InferCodec:
    """Reads requests and writes responses, for one version of a model."""

    protocol = "grpc"
    raw_tensors = True

    def __init__(self, model: Described) -> None:
        self._made_of = model
        self._codec = Codec(model)
        self._binder = TensorBinder(model.signature, together=model.together)
        self._plans: dict[bytes, Plan] = {}
        self._opening = field(_NAME, model.name.encode()) + field(_VERSION, model.version.encode())
        self._outputs: dict[tuple[Any, ...], bytes] = {}
        self.slow_bytes = any(spec.datatype == "BYTES" for spec in model.signature.inputs)
        self._texts = frozenset(i for i, spec in enumerate(self._binder.outputs) if spec.datatype == "BYTES")

    def __reduce__(self) -> tuple[Any, ...]:
        return InferCodec, (self._made_of,)

    def begin(self, headers: Headers, body: Message, spare: Spare, most_text: int) -> Decoded | Elsewhere:
        """Read a message here where that takes little. Raises InvalidRequest or SignatureMismatch."""
        request, cut, message = body
        if cut is not None and not len(request) <= (INLINE_BYTES if self.slow_bytes else RAW_INLINE_BYTES):
            if not self.slow_bytes:
                return Elsewhere(InferCodec.read, (request, cut, message), on_thread=True)
        elif cut is not None or message is not None:
            return self.read(request, cut, message)
        return Elsewhere(_decode_long, (pickle.PickleBuffer(request),))

    def begin_answer(
        self, outputs: Tensors, context: Context, headers: Headers, spare: Spare
    ) -> bytes | Parts | Elsewhere:
        """Write a response here where it is short, or raw numbers, which are sent as they lie where they are many."""
        size = sum([array.nbytes for array in outputs])
        if size > SMALL_ANSWER_BYTES:
            if self._slow_answer(context):
                if size > INLINE_ANSWER_BYTES or not spare(2 * size):
                    return Elsewhere(_encode_long, (outputs, context))
            elif size > _RAW_INLINE_ANSWER_BYTES and len(outputs) == len(self._binder.outputs):
                return self._raw(outputs, context, as_it_lies)
        return self.encode(outputs, context)

    def read(self, request: Buffer, cut: RawRequest | None, message: Any = None) -> Decoded:
        """Read a request; numbers are views of `request`. Raises InvalidRequest or SignatureMismatch."""
        plan = self._plans.get(cut.head) if cut is not None else None
        if cut is None or plan is None or len(plan.inputs) != len(cut.raws):
            return self._decode(message if message is not None else parsed(request, cut), request, cut)
        view = memoryview(request)
        context = plan.context if not cut.identity else plan.context._replace(identity=cut.identity)
        if len(plan.inputs) == 1:
            array = self._tensor(view, cut.raws[0], plan.inputs[0], 0)
            return Decoded((array,), plan.rows, context, None, plan.priority)
        arrays: list[Any] = [None] * len(plan.inputs)
        for index, place in enumerate(cut.raws):
            arrays[plan.inputs[index][0]] = self._tensor(view, place, plan.inputs[index], index)
        return Decoded(tuple(arrays), plan.rows, context, None, plan.priority)

    def _tensor(
        self, view: memoryview, place: tuple[int, int], due: tuple[int, str, tuple[int, ...], int], index: int
    ) -> Array:
        position, datatype, shape, _ = due
        array = read(view[place[0] : place[1]], datatype, shape, f"/raw_input_contents/{index}")
        self._binder.check(position, array, f"/inputs/{index}")
        return array

    def _decode(self, message: Any, request: Buffer, cut: RawRequest | None) -> Decoded:
        """Read a request from its protobuf message, with the raw contents that were cut off it, and keep the plan.

        Raises InvalidRequest or SignatureMismatch.
        """
        view = memoryview(request)
        decoded = self._codec.decode(message, [view[start:end] for start, end in cut.raws] if cut is not None else ())
        positions = {spec.name: i for i, spec in enumerate(self._binder.inputs)}
        usual = decoded.context.raw and decoded.timeout is None and not decoded.explain
        usual = usual and all(t.name in positions for t in message.inputs)
        if cut is not None and usual and len(cut.head) <= _LONGEST_PLAN:
            inputs = tuple(
                (positions[t.name], t.datatype, decoded.inputs[positions[t.name]].shape, e - s)
                for t, (s, e) in zip(message.inputs, cut.raws, strict=True)
            )
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[cut.head] = Plan(inputs, decoded.rows, decoded.context._replace(identity=b""), decoded.priority)
        return decoded

    def _slow_answer(self, context: Context) -> bool:
        """Tell whether a large answer takes time to write: raw numbers are only put together."""
        return not (context.raw or self._codec.only_raw(context.wanted)) or any(
            wanted.classes or wanted.position in self._texts for wanted in context.wanted
        )

    def encode(self, outputs: Tensors, context: Context) -> bytes:
        """Write the response."""
        if not context.raw or len(outputs) > len(self._binder.outputs):
            response: bytes = self._codec.encode(outputs, context).SerializeToString()
            return response
        return b"".join(self._raw(outputs, context, write))

    def _raw(self, outputs: Tensors, context: Context, contents: Callable[[Array], bytes | memoryview]) -> Parts:
        """Write a response that is raw altogether."""
        blobs: Parts = []
        shapes: list[Any] = [context.wanted]
        for position, _, classes in context.wanted:
            array = outputs[position]
            if classes:
                array = self._binder.classified(position, array, classes)
            shapes.append(array.shape)
            blob = contents(array)
            blobs += (field_head(_RAW_OUTPUT, len(blob)), blob)
        opening = self._opening + field(_ID, context.identity) if context.identity else self._opening
        return [opening, self._described(context.wanted, shapes), *blobs]

    def _described(self, wanted: tuple[RequestedOutput, ...], shapes: list[Any]) -> bytes:
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

    def _output(self, one: RequestedOutput, shape: tuple[int, ...]) -> bytes:
        spec = self._binder.outputs[one.position]
        described: bytes = Output(
            name=spec.name, datatype="BYTES" if one.classes else spec.datatype, shape=shape
        ).SerializeToString()
        return described


def _decode_long(codec: InferCodec, request: Buffer) -> Decoded:
    """Read a long request. Raises InvalidRequest or SignatureMismatch. For the codec process."""
    cut = cut_up(request)
    message = parsed(request, cut)
    if cut is None and (message.model_name, message.model_version, message.id.encode()) != opening_of(request):
        raise InvalidRequest("model_name, model_version and id stand before all else in a message of this size")
    return codec.read(request, cut, message)


def _encode_long(codec: InferCodec, outputs: Tensors, context: Context) -> list[Any]:
    """Write a long response. For the codec process."""
    return [pickle.PickleBuffer(codec.encode(outputs, context))]
