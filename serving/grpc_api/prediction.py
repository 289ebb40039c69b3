"""Predictions over gRPC: which endpoint a message names, and where its answer goes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from serving.bodies.codec_pool import CodecPool
from serving.errors import ServingError
from serving.grpc_api.call import Call
from serving.grpc_api.connection import MOST_LENT_BYTES
from serving.grpc_api.status import FAULT, status_of
from serving.prediction.direct import DirectPrediction
from serving.prediction.endpoint import Endpoint
from serving.prediction.endpoints import EndpointTable
from serving.prediction.prediction import Prediction
from serving.prediction.request_log import Ended
from serving.prediction.request_options import DEFAULTS, RequestOptions
from serving.prediction.socket_loan import SocketLoan
from serving.protocols.codec import INLINE_BYTES, SMALL_BYTES
from serving.protocols.infer_codec import InferCodec, Message, cut_up, opening_of, parsed
from serving.protocols.protobuf_wire import Parts
from serving.tensor_bytes import Buffer

log = logging.getLogger("serving.grpc")

# With a slash in any case: a model's name has none, so that no name passes for another's version.
ROUTES = {("grpc", "name"): "{model}/", ("grpc", "version"): "{model}/{version}"}
CODECS = {"grpc": InferCodec}
_MOST_NAMES = 1024

Finish: TypeAlias = Callable[["bytes | Parts | ServingError"], None]


class StreamPrediction(Prediction):
    """One request of a stream; `finish` gets the response or the error, once, unless `cancel` came before."""

    __slots__ = ("call", "finish")

    def __init__(self, call: Call, finish: Finish) -> None:
        self.call = call
        self.finish = finish

    @property
    def sender(self) -> int:  # noqa: D102
        return id(self.call.connection)  # no reference: who is remembered may have gone

    def answer(self, response: bytes | Parts) -> None:  # noqa: D102
        if self.endpoint.told:
            self.size = _size(response)
        self.finish(response)

    def ended(self, error: ServingError | None, *, gone: bool) -> Ended:  # noqa: D102
        return _ended(self, "ModelStreamInfer", error, gone=gone)

    def refuse(self, error: ServingError) -> None:  # noqa: D102
        self.finish(error)


class UnaryPrediction(DirectPrediction):
    """The only request of its call."""

    __slots__ = ("_bytes", "call")

    def __init__(self, call: Call) -> None:
        self._bytes = 0
        self.call = call

    @property
    def sender(self) -> int:  # noqa: D102
        return id(self.call.connection)  # no reference: who is remembered may have gone

    # The call and this would hold each other, and with them the rows and the model.

    def answer(self, response: bytes | Parts) -> None:  # noqa: D102
        if self.endpoint.told:
            self.size = _size(response)
        self.call.prediction = None
        self.call.answer(response)

    def ended(self, error: ServingError | None, *, gone: bool) -> Ended:  # noqa: D102
        return _ended(self, "ModelInfer", error, gone=gone)

    def refuse(self, error: ServingError) -> None:  # noqa: D102
        self.call.prediction = None
        self.call.refuse(error)

    def lend_socket(self) -> SocketLoan | None:  # noqa: D102
        return self.call.connection.lend(self.call, self)

    def render(self, response: Any) -> bytes | None:  # noqa: D102
        if not isinstance(response, bytes) or len(response) > MOST_LENT_BYTES:
            return None
        self.size = len(response)
        rendered, self._bytes = self.call.rendered(response)
        return rendered

    def recovered(self, rest: bytes | None) -> None:  # noqa: D102
        if rest is not None:
            self.call.prediction = None
            self.call.answered()
        self.call.connection.recovered(self.call, rest, self._bytes)


def _size(response: bytes | Parts) -> int:
    return len(response) if isinstance(response, bytes) else sum(map(len, response))


def _ended(prediction: Prediction, method: str, error: ServingError | None, *, gone: bool) -> Ended:
    identity = prediction.request_id()
    if error is not None:
        return Ended(identity, method, status_of(error).name, 0, None)
    return Ended(identity, method, "CANCELLED" if gone else "OK", 0 if gone else prediction.size, None)


class Predictor:
    """Answers ModelInfer for all models that have endpoints in a table, where they are called as in ROUTES."""

    def __init__(self, endpoints: EndpointTable, pool: CodecPool) -> None:
        self._table = endpoints
        self._endpoints = endpoints.paths
        self._pool = pool
        self._names: dict[bytes, bytes] = {}

    def start(self, request: Buffer, prediction: StreamPrediction | UnaryPrediction) -> None:
        """Begin a prediction; a bad request is answered before this returns."""
        call = prediction.call
        remaining = call.time_remaining()
        options = DEFAULTS if remaining is None else RequestOptions(timeout=remaining)
        try:
            endpoint, message = self._find(request)
        except Exception as error:
            prediction.done = True
            if isinstance(error, ServingError):
                prediction.refuse(error.bare())
            else:  # a fault of ours must be answered, or the caller hangs
                log.exception("a request could not be read")
                prediction.refuse(ServingError(FAULT))
        else:
            prediction.start(endpoint, call.head.headers, message, options)

    def _find(self, request: Buffer) -> tuple[Endpoint, Message]:
        """Find whom a message asks. Raises InvalidRequest, ModelNotFound or NotReady."""
        cut = cut_up(request)
        known = self._names.get(cut.head) if cut is not None else None
        if known is not None and (endpoint := self._endpoints.get(known)) is not None:
            return endpoint, Message(request, cut, None)
        message = None
        if cut is not None or self._is_short(len(request)):
            message = parsed(request, cut)
            name, version = message.model_name, message.model_version
        else:
            name, version, _ = opening_of(request)
        endpoint = self._table.find("grpc", name, version or None)
        if cut is not None:
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            self._names[cut.head] = f"{name}/{version}".encode()
        return endpoint, Message(request, cut, message)

    def _is_short(self, size: int) -> bool:
        """Tell whether so many bytes of typed contents are read on the event loop."""
        return size <= SMALL_BYTES or (size <= INLINE_BYTES and self._pool.may_work_here(2 * size))
