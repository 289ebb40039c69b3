"""One prediction over gRPC, from message bytes to message bytes: what `http_api.prediction` is for HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from serving.engine.model import Model
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, ServingError
from serving.fleet.fleet import Fleet
from serving.grpc_api.infer_wire import Split, Wire, parsed, split
from serving.grpc_api.tensors import Decoded
from serving.metrics import Metrics, ModelMetrics
from serving.tensor_bytes import Buffer

log = logging.getLogger("serving.grpc")

PROTOCOL = "grpc"
INLINE_BYTES = 64 * 1024
"""Messages with more typed contents or strings than this are read on a thread, so that the event loop turns."""
_MOST_NAMES = 1024

_decoders = ThreadPoolExecutor(1, thread_name_prefix="grpc-decode")

Finish: TypeAlias = Callable[["bytes | ServingError"], None]


class Prediction(Request):
    """Rows on their way; `finish` gets the response or the error, once, unless `cancel` came before."""

    __slots__ = ("began", "decoded", "finish", "finished", "identity", "metrics", "wire")

    decoded: Decoded

    def __init__(self, finish: Finish) -> None:
        self.began = time.monotonic()
        self.finish = finish
        self.finished = False
        self.gone = False
        self.identity = b""
        self.metrics: ModelMetrics | None = None

    def submit(self, model: Model, wire: Wire, decoded: Decoded, seconds: float) -> None:
        """Queue the rows; they are dropped where they still wait after `seconds`. Raises ServingError."""
        self.wire = wire
        self.decoded = decoded
        self.inputs, self.rows, _, _, timeout = decoded
        self.deadline = self.began + (seconds if timeout is None else min(seconds, timeout))
        model.submit(self)

    def reply(self, outcome: Outcome) -> None:
        """Encode and finish."""
        if isinstance(outcome, ServingError):
            self.refuse(outcome)
            return
        try:
            response = self.wire.encode(outcome, self.identity, self.decoded)
        except Exception:  # the reason is for the log: a caller learns nothing of our insides
            log.exception("an answer could not be encoded")
            self.refuse(InferenceFailed("the model's answer could not be written"))
            return
        if self.metrics is not None:
            self.metrics.answered(PROTOCOL, self.rows, time.monotonic() - self.began)
        self.finished = True
        self.finish(response)

    def refuse(self, error: ServingError) -> None:
        """Count and finish."""
        if self.metrics is not None:
            self.metrics.refused(PROTOCOL, error, time.monotonic() - self.began)
        self.finished = True
        self.finish(error)

    def cancel(self) -> None:
        """Tell that the caller has left: rows that still wait are not run."""
        if not (self.gone or self.finished):
            self.gone = True
            if self.metrics is not None:
                self.metrics.failed(PROTOCOL, "gone", time.monotonic() - self.began)


class Predictor:
    """Answers ModelInfer for all models of a fleet; deadline in seconds."""

    def __init__(self, fleet: Fleet, metrics: Metrics | None, *, deadline: float) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._deadline = deadline
        self._wires: dict[Model, tuple[Wire, ModelMetrics | None]] = {}
        self._names: dict[bytes, tuple[str, str | None]] = {}

    def _wire(self, model: Model) -> tuple[Wire, ModelMetrics | None]:
        made = self._wires.get(model)
        if made is None:
            live = {m for served in self._fleet.models.values() for m in served.versions.values()}
            self._wires = {m: wire for m, wire in self._wires.items() if m in live}
            metrics = self._metrics.model(model.name, model.version) if self._metrics is not None else None
            made = self._wires[model] = Wire(model), metrics
        return made

    def start(self, request: Buffer, remaining: float | None, finish: Finish) -> Prediction:
        """Begin a prediction; a bad request is finished before this returns. `remaining`: the client's seconds."""
        prediction = Prediction(finish)
        seconds = self._deadline if remaining is None else min(self._deadline, remaining)
        try:
            self._start(prediction, request, seconds)
        except ServingError as error:
            prediction.refuse(error)
        except Exception:  # a fault of ours must be answered, or the caller hangs
            log.exception("a request could not be decoded")
            prediction.refuse(ServingError("the server failed on this request; its log has the reason"))
        return prediction

    def _start(self, prediction: Prediction, request: Buffer, seconds: float) -> None:
        cut = split(request)
        if cut is not None:
            prediction.identity = cut.identity
            named = self._names.get(cut.head)
            if named is not None:
                model = self._fleet.get(*named)
                wire, prediction.metrics = self._wire(model)
                plan = wire.plan(cut)
                if plan is not None and not (wire.slow_bytes and len(request) > INLINE_BYTES):
                    prediction.submit(model, wire, wire.planned(request, cut, plan), seconds)
                    return
        if len(request) > INLINE_BYTES:
            loop = asyncio.get_running_loop()
            parsing = loop.run_in_executor(_decoders, _parsed, request)
            parsing.add_done_callback(lambda done: self._parsed(prediction, done.result(), cut, seconds, loop))
            return
        message = parsed(request)
        model, wire = self._named(prediction, message, cut)
        prediction.submit(model, wire, wire.decode(message, cut), seconds)

    def _named(self, prediction: Prediction, message: Any, cut: Split | None) -> tuple[Model, Wire]:
        """Find the model that a message names."""
        prediction.identity = message.id.encode()
        name, version = message.model_name, message.model_version or None
        model = self._fleet.get(name, version)
        wire, prediction.metrics = self._wire(model)
        if cut is not None:
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            self._names[cut.head] = name, version
        return model, wire

    def _parsed(
        self,
        prediction: Prediction,
        message: Any,
        cut: Split | None,
        seconds: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Go on with a long message once it is read: find the model here, read the tensors on the thread."""
        if prediction.gone:
            return
        if isinstance(message, ServingError):
            prediction.refuse(message)
            return
        try:
            model, wire = self._named(prediction, message, cut)
        except ServingError as error:
            prediction.refuse(error)
            return
        decoding = loop.run_in_executor(_decoders, _decoded, wire, message, cut)
        decoding.add_done_callback(lambda done: _submit(prediction, model, wire, done.result(), seconds))


def _parsed(request: Buffer) -> Any:
    try:
        return parsed(request)
    except ServingError as error:
        return error


def _decoded(wire: Wire, message: Any, cut: Split | None) -> Decoded | ServingError:
    try:
        return wire.decode(message, cut)
    except ServingError as error:
        return error
    except Exception:  # a fault of ours must be answered, or the caller hangs
        log.exception("a request could not be decoded")
        return ServingError("the server failed on this request; its log has the reason")


def _submit(prediction: Prediction, model: Model, wire: Wire, decoded: Decoded | ServingError, seconds: float) -> None:
    if prediction.gone:
        return
    if isinstance(decoded, ServingError):
        prediction.refuse(decoded)
        return
    try:
        prediction.submit(model, wire, decoded, seconds)
    except ServingError as error:
        prediction.refuse(error)
