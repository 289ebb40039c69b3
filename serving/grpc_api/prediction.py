"""One prediction over gRPC, from message to message: what `http_api.prediction` is for HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from serving.engine.admission import Bodies
from serving.engine.model import Model
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, ServingError
from serving.fleet.fleet import Fleet
from serving.fleet.split import Split
from serving.grpc_api.tensors import Codec, Decoded
from serving.metrics import Metrics
from serving.tensors import Tensors

log = logging.getLogger("serving.grpc")

PROTOCOL = "grpc"
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
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


def codec_of(model: Model) -> Codec:
    """Return the codec of a model; made once."""
    made: Codec | None = model.codecs.get(PROTOCOL)
    if made is None:
        made = model.codecs[PROTOCOL] = Codec(model)
    return made


class Predictor:
    """Answers ModelInfer for all models of a fleet; deadline in seconds."""

    def __init__(self, fleet: Fleet, metrics: Metrics | None, *, deadline: float, bodies: Bodies) -> None:
        self._bodies = bodies
        self._fleet = fleet
        self._metrics = metrics
        self._deadline = deadline

    async def answer(self, request: Any, remaining: float | None, metadata: Metadata = ()) -> Any:
        """Return the ModelInferResponse; `remaining` is the client's own deadline in seconds.

        Raises ServingError. Where the caller is cancelled, rows that still wait are not run.
        """
        began = time.monotonic()
        size = request.ByteSize()
        if size <= Bodies.FREE:
            return await self._answer(request, began, remaining, metadata)
        self._bodies.hold(size)
        try:
            return await self._answer(request, began, remaining, metadata)
        finally:
            self._bodies.held -= size

    async def _answer(self, request: Any, began: float, remaining: float | None, metadata: Metadata) -> Any:
        model = self._fleet.get(request.model_name, request.model_version or None)
        shadow = None
        if not request.model_version:
            served = self._fleet.models[request.model_name]
            if served.canary is not None and await self._takes(served.canary, model, request, metadata):
                model = served.canary.candidate
            else:
                shadow = served.shadow
        metrics = self._metrics.model(model.name, model.version) if self._metrics is not None else None
        try:
            response, decoded, outputs = await self._run(model, request, began, remaining)
        except ServingError as error:
            if metrics is not None:
                metrics.refused(PROTOCOL, error, time.monotonic() - began)
            raise
        except asyncio.CancelledError:
            if metrics is not None:
                metrics.failed(PROTOCOL, "gone", time.monotonic() - began)
            raise
        if metrics is not None:
            metrics.answered(PROTOCOL, decoded.rows, time.monotonic() - began)
        if shadow is not None:
            shadow.offer(decoded.inputs, decoded.rows, outputs)
        return response

    async def _takes(self, split: Split, stable: Model, request: Any, metadata: Metadata) -> bool:
        """Tell whether the canary answers."""
        if split.feature is not None:
            try:
                return split.takes(split.feature((await self._decode(stable, request)).inputs))
            except ServingError:
                return False  # stable says what is wrong with it
        if split.header is None:
            return split.takes(None)
        name = split.header.decode()
        given = next((value for found, value in metadata if found == name), None)
        return split.takes(given.encode() if isinstance(given, str) else given)

    async def _decode(self, model: Model, request: Any) -> Decoded:
        codec = codec_of(model)
        # Raw numbers are views and cost nothing; anything else is read element by element.
        if not request.raw_input_contents and request.ByteSize() > INLINE_BYTES:
            return await asyncio.get_running_loop().run_in_executor(_decoders, codec.decode, request)
        return codec.decode(request)

    async def _run(
        self, model: Model, request: Any, began: float, remaining: float | None
    ) -> tuple[Any, Decoded, Tensors]:
        codec = codec_of(model)
        loop = asyncio.get_running_loop()
        decoded = await self._decode(model, request)
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
            return codec.encode(outcome, request.id, decoded), decoded, outcome
        except Exception as error:  # the reason is for the log: a caller learns nothing of our insides
            log.exception("an answer could not be encoded")
            raise InferenceFailed("the model's answer could not be written") from error
