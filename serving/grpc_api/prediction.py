"""One prediction over gRPC, from message to message: what `http_api.prediction` is for HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving.engine.admission import Bodies
from serving.engine.model import Model
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, ServingError
from serving.fleet.fleet import Fleet
from serving.grpc_api.tensors import Codec, Decoded
from serving.metrics import Metrics

log = logging.getLogger("serving.grpc")

PROTOCOL = "grpc"
INLINE_BYTES = 64 * 1024
"""Messages with more typed contents or strings than this are read on a thread, so that the event loop turns."""

_decoders = ThreadPoolExecutor(1, thread_name_prefix="grpc-decode")


class _Awaited(Request):
    """Rows whose outcome a coroutine waits for."""

    __slots__ = ("answered",)

    def __init__(self, loop: asyncio.AbstractEventLoop, decoded: Decoded, deadline: float) -> None:
        self.answered: asyncio.Future[Outcome] = loop.create_future()
        self.inputs, self.rows = decoded.inputs, decoded.rows
        self.priority = decoded.priority
        self.deadline = deadline
        self.gone = False

    def reply(self, outcome: Outcome) -> None:
        if not self.answered.done():
            self.answered.set_result(outcome)


class Predictor:
    """Answers ModelInfer for all models of a fleet; deadline in seconds."""

    def __init__(self, fleet: Fleet, metrics: Metrics | None, *, deadline: float, bodies: Bodies) -> None:
        self._bodies = bodies
        self._fleet = fleet
        self._metrics = metrics
        self._deadline = deadline
        self._codecs: dict[Model, Codec] = {}

    def _codec(self, model: Model) -> Codec:
        made = self._codecs.get(model)
        if made is None:
            live = {m for served in self._fleet.models.values() for m in served.versions.values()}
            self._codecs = {m: codec for m, codec in self._codecs.items() if m in live}
            made = self._codecs[model] = Codec(model)
        return made

    async def answer(self, request: Any, remaining: float | None) -> Any:
        """Return the ModelInferResponse; `remaining` is the client's own deadline in seconds.

        Raises ServingError. Where the caller is cancelled, rows that still wait are not run.
        """
        began = time.monotonic()
        size = request.ByteSize()
        if size <= Bodies.FREE:
            return await self._answer(request, began, remaining)
        self._bodies.hold(size)
        try:
            return await self._answer(request, began, remaining)
        finally:
            self._bodies.held -= size

    async def _answer(self, request: Any, began: float, remaining: float | None) -> Any:
        model = self._fleet.get(request.model_name, request.model_version or None)
        metrics = self._metrics.model(model.name, model.version) if self._metrics is not None else None
        try:
            response, rows = await self._run(model, request, began, remaining)
        except ServingError as error:
            if metrics is not None:
                metrics.refused(PROTOCOL, error, time.monotonic() - began)
            raise
        except asyncio.CancelledError:
            if metrics is not None:
                metrics.failed(PROTOCOL, "gone", time.monotonic() - began)
            raise
        if metrics is not None:
            metrics.answered(PROTOCOL, rows, time.monotonic() - began)
        return response

    async def _run(self, model: Model, request: Any, began: float, remaining: float | None) -> tuple[Any, int]:
        codec = self._codec(model)
        loop = asyncio.get_running_loop()
        # Raw numbers are views and cost nothing; anything else is read element by element.
        if not request.raw_input_contents and request.ByteSize() > INLINE_BYTES:
            decoded = await loop.run_in_executor(_decoders, codec.decode, request)
        else:
            decoded = codec.decode(request)
        seconds = min(s for s in (self._deadline, remaining, decoded.timeout) if s is not None)
        waiting = _Awaited(loop, decoded, began + seconds)
        model.submit(waiting)
        try:
            outcome = await waiting.answered
        except asyncio.CancelledError:
            waiting.gone = True
            raise
        if isinstance(outcome, ServingError):
            try:
                raise outcome
            finally:
                del outcome  # or the error would hold this frame, and the frame the error
        try:
            return codec.encode(outcome, request.id, decoded), decoded.rows
        except Exception as error:  # the reason is for the log: a caller learns nothing of our insides
            log.exception("an answer could not be encoded")
            raise InferenceFailed("the model's answer could not be written") from error
