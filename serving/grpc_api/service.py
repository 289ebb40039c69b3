"""`inference.GRPCInferenceService` for one worker: every call of the protocol, on the worker's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.json_format import ParseDict

from serving.access.access import Access
from serving.access.principal import Scope
from serving.bodies.codec_pool import CodecPool
from serving.deploy import description
from serving.deploy.fleet import Fleet
from serving.errors import InvalidRequest, ModelNotFound, NotReady, QueueFull, ServingError
from serving.grpc_api.call import Call
from serving.grpc_api.head import Method
from serving.grpc_api.prediction import Predictor, StreamPrediction, UnaryPrediction
from serving.http2.hpack import Headers
from serving.metrics.metrics import Metrics
from serving.prediction.authorization import authorize
from serving.prediction.endpoints import EndpointTable
from serving.protocols.infer_codec import opening_of
from serving.protocols.messages import SERVICE, STREAM, UNARY, message, reader
from serving.protocols.messages import pool as descriptors
from serving.protocols.protobuf_wire import Parts, field, field_head
from serving.repository import transitions
from serving.tensor_bytes import Buffer

MOST_IN_FLIGHT = 256
"""Requests of one stream that are answered at the same time; further ones are read when one is done."""
_RESPONSE = 0x12  # the tag of ModelStreamInferResponse.infer_response
# Models answer once: clients that take streams of answers learn from this parameter that it was all.
_FINAL = field(0x22, field(0x0A, b"triton_final_response"), field(0x12, b"\x08\x01"))


class Service:
    """The calls; each takes a request message and returns a response message, or raises ServingError."""

    def __init__(
        self, fleet: Fleet, metrics: Metrics | None, access: Access, endpoints: EndpointTable, pool: CodecPool
    ) -> None:
        self._access = access
        self._fleet = fleet
        self._metrics = metrics
        self._predictor = Predictor(endpoints, pool)
        self._responses = {method: message(f"{method}Response") for method in UNARY}
        self._stream_response = message(f"{STREAM}Response")

    def _made(self, method: str, facts: dict[str, Any]) -> Any:
        # HTTP says more of some things than the messages of gRPC have fields for.
        return ParseDict(facts, self._responses[method](), ignore_unknown_fields=True, descriptor_pool=descriptors)

    async def server_live(self, request: Any, context: Any) -> Any:
        """Answer that the event loop turns."""
        return self._responses["ServerLive"](live=True)

    async def server_ready(self, request: Any, context: Any) -> Any:
        """Answer whether this worker should get requests."""
        return self._responses["ServerReady"](ready=self._fleet.ready)

    async def model_ready(self, request: Any, context: Any) -> Any:
        """Answer whether a model can predict; one that there is not can't."""
        try:
            self._fleet.get(request.name, request.version or None)
        except (ModelNotFound, NotReady):  # clients ask until a model has come: no is an answer, not a failure
            return self._responses["ModelReady"](ready=False)
        return self._responses["ModelReady"](ready=not self._fleet.draining)

    async def server_metadata(self, request: Any, context: Any) -> Any:
        """Describe the server."""
        return self._made("ServerMetadata", description.server())

    async def model_metadata(self, request: Any, context: Any) -> Any:
        """Describe a model's tensors."""
        return self._made("ModelMetadata", description.metadata(self._fleet, request.name, request.version or None))

    async def model_config(self, request: Any, context: Any) -> Any:
        """Describe how a model is run."""
        config = description.config(self._fleet, request.name, request.version or None)
        return self._made("ModelConfig", {"config": config})

    async def model_statistics(self, request: Any, context: Any) -> Any:
        """Count and time what models did."""
        found = await description.statistics(self._fleet, self._metrics, request.name or None, request.version or None)
        return self._made("ModelStatistics", {"model_stats": found})

    async def repository_index(self, request: Any, context: Any) -> Any:
        """List the repository."""
        return self._made("RepositoryIndex", {"models": description.index(self._fleet, ready=request.ready)})

    async def repository_model_load(self, request: Any, context: Any) -> Any:
        """Load a model, or load it anew from the folder."""
        _refuse_parameters(request, ())
        await self._fleet.changes.make(request.model_name, transitions.load, who=self._who(context), what="load")
        return self._responses["RepositoryModelLoad"]()

    async def repository_model_unload(self, request: Any, context: Any) -> Any:
        """Unload a model after its last request."""
        _refuse_parameters(request, ("unload_dependents",))  # tritonclient always sends it; no model has any
        await self._fleet.changes.make(request.model_name, transitions.unload, who=self._who(context), what="unload")
        return self._responses["RepositoryModelUnload"]()

    def _who(self, call: Call) -> str:
        return authorize(self._access, call.head.headers, "deploy").name

    def infer(self, call: Call, request: Buffer) -> None:
        """Predict, without a coroutine."""
        prediction = UnaryPrediction(call)
        self._predictor.start(request, prediction)
        if not prediction.done:
            call.prediction = prediction

    async def stream(self, requests: AsyncIterator[Buffer], call: Call) -> AsyncIterator[bytes | Parts]:
        """Predict for each request of a stream, several at a time; answers carry the ids and come as they are done."""
        answers: asyncio.Queue[tuple[bytes | Parts, int] | None] = asyncio.Queue()
        room = asyncio.Semaphore(MOST_IN_FLIGHT)
        running: dict[int, StreamPrediction] = {}

        async def read() -> None:
            number = 0
            refusal = None
            try:
                async for request in requests:
                    await room.acquire()
                    one(number, request)
                    number += 1
            except ServingError as error:  # the caller's key was withdrawn: what was asked before is still answered
                refusal = error
            for _ in range(MOST_IN_FLIGHT):  # all of it is free once all answers are taken
                await room.acquire()
            if refusal is not None:
                raise refusal

        def one(number: int, request: Buffer) -> None:
            def finish(made: bytes | Parts | ServingError) -> None:
                running.pop(number, None)
                call.release(len(request))
                size = 0
                if not isinstance(made, ServingError):
                    size = len(made) if isinstance(made, bytes) else sum(map(len, made))
                    try:
                        call.hold(size)  # until the client has taken it
                    except QueueFull as error:
                        made = error.bare()
                if isinstance(made, bytes):
                    answers.put_nowait((field(_RESPONSE, made, _FINAL), size))
                elif isinstance(made, ServingError):
                    answers.put_nowait((self._failed(request, made), 0))
                else:
                    answers.put_nowait(([field_head(_RESPONSE, size + len(_FINAL)), *made, _FINAL], size))

            prediction = StreamPrediction(call, finish)
            self._predictor.start(request, prediction)
            if not prediction.done:
                running[number] = prediction

        reading = asyncio.create_task(read())
        reading.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (answer := await answers.get()) is not None:
                yield answer[0]
                call.release(answer[1])
                room.release()
            reading.result()
        finally:
            reading.cancel()
            for prediction in running.values():
                prediction.cancel()
            running.clear()

    def _failed(self, request: Buffer, error: ServingError) -> bytes:
        """Write the answer on a stream to a request that failed: the stream goes on."""
        response = self._stream_response(error_message=error.message)
        response.infer_response.parameters["triton_final_response"].bool_param = True
        with contextlib.suppress(ServingError):
            opening = opening_of(request)
            response.infer_response.id = opening.identity.decode()
            response.infer_response.model_name = opening.name
        failed: bytes = response.SerializeToString()
        return failed

    def methods(self) -> list[Method]:
        """Return every call of the protocol; those that require nothing are answered though all else is refused."""
        unary: dict[str, tuple[Callable[[Any, Any], Awaitable[Any]], Scope | None]] = {
            "ServerLive": (self.server_live, None),
            "ServerReady": (self.server_ready, None),
            "ModelReady": (self.model_ready, "predict"),
            "ServerMetadata": (self.server_metadata, "predict"),
            "ModelMetadata": (self.model_metadata, "predict"),
            "ModelConfig": (self.model_config, "predict"),
            "ModelStatistics": (self.model_statistics, "predict"),
            "RepositoryIndex": (self.repository_index, "predict"),
            "RepositoryModelLoad": (self.repository_model_load, "deploy"),
            "RepositoryModelUnload": (self.repository_model_unload, "deploy"),
        }
        made = [
            Method(
                f"{SERVICE}/{name}",
                reader(message(f"{name}Request")),
                message(f"{name}Response").SerializeToString,
                unary=call,
                admit=self._admit(scope),
                always=scope is None,
            )
            for name, (call, scope) in unary.items()
        ]
        predict = self._admit("predict")
        made.append(Method(f"{SERVICE}/ModelInfer", bytes, bytes, whole=self.infer, admit=predict))
        made.append(Method(f"{SERVICE}/{STREAM}", bytes, bytes, streaming=self.stream, admit=predict))
        return made

    def _admit(self, scope: Scope | None) -> Callable[[Headers], object] | None:
        """Return what judges calls before a message of them is read, and each time anew, for keys are withdrawn."""
        if scope is None or (scope == "predict" and not self._access.configured):
            return None
        return lambda headers: authorize(self._access, headers, scope)


def _refuse_parameters(request: Any, harmless: tuple[str, ...]) -> None:
    for name in request.parameters:
        if name not in harmless:
            raise InvalidRequest("/parameters: files and configurations are not taken from requests: leave them out")
