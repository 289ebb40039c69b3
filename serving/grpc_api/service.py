"""`inference.GRPCInferenceService` for one worker: every call of the protocol, on the worker's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from serving.access.access import Access
from serving.engine.admission import Bodies
from serving.errors import InvalidRequest, ModelNotFound, NotReady, ServingError
from serving.fleet import description, transitions
from serving.fleet.fleet import Fleet
from serving.grpc_api.messages import SERVICE, STREAM, UNARY, message, pool
from serving.grpc_api.prediction import Predictor
from serving.grpc_api.security import Guard, deployer
from serving.grpc_api.status import status_of, trailers
from serving.metrics import Metrics

log = logging.getLogger("serving.grpc")

MOST_IN_FLIGHT = 256
"""Requests of one stream that are answered at the same time; further ones are read when one is done."""
FAULT = "the server failed on this request; its log has the reason"
HEALTH_EVERY_S = 0.25
MOST_STREAMS = 1024
"""Calls in progress on one connection; further ones wait in the client."""
MOST_CALLS = 8192
"""Calls in progress in one worker; further ones are told RESOURCE_EXHAUSTED."""
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Service:
    """The calls; each takes a request message and returns a response message, or raises ServingError."""

    def __init__(
        self, fleet: Fleet, metrics: Metrics | None, access: Access, *, deadline: float, bodies: Bodies
    ) -> None:
        self._access = access
        self._fleet = fleet
        self._metrics = metrics
        self._predictor = Predictor(fleet, metrics, deadline=deadline, bodies=bodies)
        self._responses = {method: message(f"{method}Response") for method in UNARY}
        self._stream_response = message(f"{STREAM}Response")

    def _made(self, method: str, facts: dict[str, Any]) -> Any:
        return ParseDict(facts, self._responses[method](), descriptor_pool=pool)

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
        found = description.statistics(self._fleet, self._metrics, request.name or None, request.version or None)
        fields = self._responses["ModelStatistics"].DESCRIPTOR.fields_by_name["model_stats"].message_type.fields_by_name
        return self._made(
            "ModelStatistics", {"model_stats": [{k: v for k, v in f.items() if k in fields} for f in found]}
        )

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

    def _who(self, context: Any) -> str:
        return deployer(self._access, context.invocation_metadata())

    async def model_infer(self, request: Any, context: Any) -> Any:
        """Predict."""
        return await self._predictor.answer(request, context.time_remaining(), context.invocation_metadata())

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Predict for each request of a stream, several at a time; answers carry the ids and come as they are done."""
        answers: asyncio.Queue[Any] = asyncio.Queue()
        running: set[asyncio.Task[None]] = set()
        room = asyncio.Semaphore(MOST_IN_FLIGHT)
        metadata = context.invocation_metadata()

        async def one(request: Any) -> None:
            response = self._stream_response()
            answered = response.infer_response
            try:
                answer = await self._predictor.answer(_whole(request), context.time_remaining(), metadata)
                answered.CopyFrom(answer)
            except ServingError as error:
                response.error_message = error.message
            except Exception:  # whoever waits for this answer would wait for ever
                log.exception("a request of a stream failed")
                response.error_message = FAULT
            finally:
                if response.error_message and not isinstance(request, ServingError):
                    answered.id, answered.model_name = request.id, request.model_name
                # Models answer once: clients that take streams of answers learn from it that this was all.
                answered.parameters["triton_final_response"].bool_param = True
                room.release()
            answers.put_nowait(response)

        async def read() -> None:
            async for request in requests:
                await room.acquire()
                task = asyncio.create_task(one(request))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)

        reading = asyncio.create_task(read())
        reading.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
        finally:
            reading.cancel()
            for task in running:
                task.cancel()


_NAMES = {
    "ServerLive": Service.server_live,
    "ServerReady": Service.server_ready,
    "ModelReady": Service.model_ready,
    "ServerMetadata": Service.server_metadata,
    "ModelMetadata": Service.model_metadata,
    "ModelInfer": Service.model_infer,
    "ModelConfig": Service.model_config,
    "ModelStatistics": Service.model_statistics,
    "RepositoryIndex": Service.repository_index,
    "RepositoryModelLoad": Service.repository_model_load,
    "RepositoryModelUnload": Service.repository_model_unload,
}


def _answered(call: Callable[[Service, Any, Any], Awaitable[Any]], service: Service) -> Callable[..., Awaitable[Any]]:
    """Turn our errors into statuses, and faults of ours into INTERNAL without their text."""

    async def handle(request: Any, context: Any) -> Any:
        try:
            return await call(service, _whole(request), context)
        except ServingError as error:
            refusal = error.bare()
        except Exception:
            log.exception("a call failed")
            refusal = ServingError(FAULT)
        # Not in the handlers above: what abort raises would keep their error, its frames and so the whole request.
        del request
        return await context.abort(status_of(refusal), refusal.message, trailers(refusal))

    return handle


def _reader(name: str) -> Callable[[bytes], Any]:
    """Make the deserialiser of a message; what can't be read becomes the error, for grpc would answer UNKNOWN."""
    parse = message(name).FromString

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return InvalidRequest(f"the bytes are no {name}")

    return read


def _whole(request: Any) -> Any:
    """Return a request that could be read. Raises the error that stands for one that could not."""
    if isinstance(request, ServingError):
        raise request
    return request


def _refuse_parameters(request: Any, harmless: tuple[str, ...]) -> None:
    for name in request.parameters:
        if name not in harmless:
            raise InvalidRequest("/parameters: files and configurations are not taken from requests: leave them out")


class GrpcServer:
    """The gRPC side of one worker. `start` once models are loaded, `stop` to drain; both on the event loop.

    address: "host:port", shared by all workers with SO_REUSEPORT. deadline, grace (for calls in progress when it
    stops): seconds. max_bytes: of one message.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics | None,
        *,
        access: Access,
        bodies: Bodies,
        address: str,
        deadline: float,
        grace: float,
        max_bytes: int,
    ) -> None:
        self._fleet = fleet
        self._access = access
        self._service = Service(fleet, metrics, access, deadline=deadline, bodies=bodies)
        self._address = address
        self._grace = grace
        self._max_bytes = max_bytes
        self._stopping: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None
        self._following: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen. Raises RuntimeError where the address can't be had."""
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", self._max_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", 16 * 1024),
                ("grpc.max_concurrent_streams", MOST_STREAMS),
                ("grpc.server_handshake_timeout_ms", 5000),
                ("grpc.keepalive_time_ms", 60_000),  # finds clients that have gone without a word
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
            maximum_concurrent_rpcs=MOST_CALLS,
        )
        handlers: dict[str, Any] = {
            method: grpc.unary_unary_rpc_method_handler(
                _answered(call, self._service),
                _reader(f"{method}Request"),
                message(f"{method}Response").SerializeToString,
            )
            for method, call in _NAMES.items()
        }
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(
            self._service.stream,
            _reader("ModelInferRequest"),
            message(f"{STREAM}Response").SerializeToString,
        )
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((Guard(generic, self._access),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
            reflection.aio.ReflectionServicer((SERVICE, _HEALTH, reflection.SERVICE_NAME), pool=pool), server
        )
        self.port = server.add_insecure_port(self._address)
        await server.start()
        self._server = server
        self._following = asyncio.create_task(self._follow(self._health))

    async def _follow(self, servicer: health.aio.HealthServicer) -> None:
        """Let health say what ServerReady says: models come and go, and watchers are told."""
        said: bool | None = None
        while True:
            if said is not (ready := self._fleet.ready):
                said = ready
                state = health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING" if ready else "NOT_SERVING")
                for service in ("", SERVICE):
                    await servicer.set(service, state)
            await asyncio.sleep(HEALTH_EVERY_S)

    async def stop(self) -> None:
        """Take no more calls, and let those in progress finish within the grace time."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await self._stopping

    async def _stop(self) -> None:
        if self._server is not None and self._health is not None:
            if self._following is not None:
                self._following.cancel()
            await self._health.enter_graceful_shutdown()
            await self._server.stop(self._grace)
