"""The gRPC side of one worker: its socket, its connections, and every method that they may call."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serving.access.access import Access
from serving.bodies.codec_pool import CodecPool
from serving.engine.admission import Bodies
from serving.fleet.fleet import Fleet
from serving.grpc_api.call import Call
from serving.grpc_api.connection import Connection
from serving.grpc_api.frames import INTERNAL_ERROR
from serving.grpc_api.guard import Guard, Patience
from serving.grpc_api.head import Head, Method, head_of
from serving.grpc_api.hpack import Pairs
from serving.grpc_api.messages import SERVICE, pool, reader
from serving.grpc_api.service import Service
from serving.metrics.metrics import Metrics

_SWEEP_S = 0.25
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class GrpcServer:
    """`start` once models are loaded, `stop` to drain; both on the event loop.

    address: "host:port", shared by all workers with SO_REUSEPORT. deadline, grace (for calls in progress when it
    stops): seconds. max_bytes: of one message. patience: with clients.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics | None,
        *,
        access: Access,
        bodies: Bodies,
        pool: CodecPool,
        address: str,
        deadline: float,
        grace: float,
        max_bytes: int,
        patience: Patience | None = None,
    ) -> None:
        self._fleet = fleet
        self._service = Service(fleet, metrics, access, pool, deadline=deadline)
        self._address = address
        self._grace = grace
        self._max_bytes = max_bytes
        self._bodies = bodies
        self.in_progress = 0
        self.guard = Guard(patience or Patience())
        if metrics is not None:
            self.guard.cut = metrics.cut
        self._methods: dict[bytes, Method] = {}
        self._watching: Method | None = None  # it never ends by itself
        self._health: Any = health.aio.HealthServicer()
        self._following: asyncio.Task[None] | None = None
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop
        self._sweeping: asyncio.TimerHandle | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._quiet = asyncio.Event()
        self.port = 0

    async def start(self) -> None:
        """Listen. Raises OSError where the address can't be had."""
        self._loop = asyncio.get_running_loop()
        said = self._fleet.ready
        await self._tell_health(said)
        self._methods = self._all_methods()
        host, _, port = self._address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections inherit these: clients that have gone without a word are found out within 80 s.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.bind((host.strip("[]"), int(port)))
        self.port = sock.getsockname()[1]
        self._server = await self._loop.create_server(lambda: Connection(self), sock=sock, backlog=2048)
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)
        self._following = self._loop.create_task(self._follow(said))

    async def _follow(self, said: bool) -> None:
        """Let health say what ServerReady says: models come and go, and watchers are told."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            if said is not (ready := self._fleet.ready):
                said = ready
                await self._tell_health(ready)

    async def _tell_health(self, ready: bool) -> None:
        state = health_pb2.HealthCheckResponse.ServingStatus.Value("SERVING" if ready else "NOT_SERVING")
        for service in ("", SERVICE):
            await self._health.set(service, state)

    def _all_methods(self) -> dict[bytes, Method]:
        made = {f"/{SERVICE}/{name}".encode(): method for name, method in self._service.methods().items()}
        checked, status = reader(health_pb2.HealthCheckRequest), health_pb2.HealthCheckResponse.SerializeToString
        made[f"/{_HEALTH}/Check".encode()] = Method(checked, status, unary=self._health.Check, always=True)
        self._watching = made[f"/{_HEALTH}/Watch".encode()] = Method(checked, status, streaming=self._watch)
        servicer: Any = reflection.aio.ReflectionServicer((SERVICE, _HEALTH, reflection.SERVICE_NAME), pool=pool)
        made[f"/{reflection.SERVICE_NAME}/ServerReflectionInfo".encode()] = Method(
            reader(reflection_pb2.ServerReflectionRequest),
            reflection_pb2.ServerReflectionResponse.SerializeToString,
            streaming=servicer.ServerReflectionInfo,
        )
        return made

    async def _watch(self, requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
        async for request in requests:
            await self._health.Watch(request, call)
        return
        yield

    # What connections ask

    def gone(self) -> None:
        """Take note that a connection has ended."""
        if not self.guard.connections:
            self._quiet.set()

    def head(self, headers: Pairs) -> Head:
        """Read the headers of a call."""
        return head_of(
            headers, self._methods, loop=self._loop, most_bytes=self._max_bytes, bodies=self._bodies, begin=Call
        )

    def _sweep(self) -> None:
        self.guard.sweep()
        self._sweeping = self._loop.call_later(_SWEEP_S, self._sweep)

    async def stop(self) -> None:
        """Take no more calls, and let those in progress finish within the grace time."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await self._stopping

    async def _stop(self) -> None:
        if self._server is None:
            return
        if self._following is not None:
            self._following.cancel()
        self._server.close()
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(0)  # who watches is told before the connection goes
        self._quiet.clear()
        for connection in list(self.guard.connections):
            for stream in list(connection.streams.values()):
                if isinstance(stream, Call) and stream.head.method is self._watching:
                    stream.fail(grpc.StatusCode.UNAVAILABLE, "the server is going away")
            connection.drain()
        if self.guard.connections:
            try:
                await asyncio.wait_for(self._quiet.wait(), self._grace)
            except TimeoutError:
                for connection in list(self.guard.connections):
                    connection.end(INTERNAL_ERROR, "the time to finish is over")
                    connection.transport.abort()
        if self._sweeping is not None:
            self._sweeping.cancel()
