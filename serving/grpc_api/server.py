"""The gRPC side of one worker: its socket, its connections, and every method that they may call."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

from serving.access.access import Access
from serving.bodies.byte_budget import ByteBudget
from serving.bodies.codec_pool import CodecPool
from serving.deploy.fleet import Fleet
from serving.grpc_api.call import Call
from serving.grpc_api.connection import LINGER_S, Connection
from serving.grpc_api.connection_reaper import ConnectionReaper
from serving.grpc_api.head import Head, Method, head_of
from serving.grpc_api.health import Health
from serving.grpc_api.prediction import CODECS, ROUTES
from serving.grpc_api.reflection import Reflection
from serving.grpc_api.service import Service
from serving.grpc_api.status import Status
from serving.http2.hpack import Headers
from serving.metrics.counts import Cells
from serving.metrics.metrics import Metrics
from serving.prediction.endpoints import EndpointTable
from serving.prediction.request_log import RequestLog
from serving.protocols.messages import HEALTH, REFLECTION, REFLECTION_ALPHA, SERVICE, message, reader
from serving.timeouts import Timeouts
from serving.tls import server_options

_SWEEP_S = 0.25


@dataclass(eq=False, repr=False)
class GrpcServer:
    """`start` once models are loaded, `stop` to drain; both on the event loop.

    address: "host:port", shared by all workers with SO_REUSEPORT. grace (for calls in progress when it stops): seconds.
    max_bytes: of one message. timeouts: of clients. tls: what connections are accepted with, None for plain ones.
    log: of predictions. in_progress: calls that are open, on all connections together.
    """

    fleet: Fleet
    metrics: Metrics | None
    _: KW_ONLY
    access: Access
    bodies: ByteBudget
    pool: CodecPool
    address: str
    grace: float
    max_bytes: int
    timeouts: Timeouts = field(default_factory=Timeouts)
    tls: ssl.SSLContext | None = None
    log: RequestLog | None = None
    in_progress: int = field(init=False, default=0)
    port: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        endpoints = EndpointTable(
            ROUTES,
            CODECS,
            metrics=self.metrics,
            access=self.access,
            pool=self.pool,
            max_text_bytes=self.max_bytes,
            max_body_bytes=self.max_bytes,
            log=self.log,
        )
        endpoints.follow(self.fleet)
        self._service = Service(self.fleet, self.metrics, self.access, endpoints, self.pool)
        self.reaper = ConnectionReaper(self.timeouts)
        self._ended: Cells[tuple[str, int]] | None = None
        if (metrics := self.metrics) is not None:
            self.reaper.cut = metrics.cut
            metrics.follow("serving_grpc_in_flight", lambda: self.in_progress)
            metrics.follow("serving_connections", lambda: len(self.reaper.connections), "grpc")
            self._ended = Cells(lambda ended: metrics.call(ended[0], Status(ended[1]).name))
        self._methods: dict[bytes, Method] = {}
        self._watching: Method | None = None  # it never ends by itself
        self._health = Health(SERVICE)
        self._server: asyncio.Server | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._quiet = asyncio.Event()

    async def start(self) -> None:
        """Listen. Raises OSError where the address can't be had."""
        loop = asyncio.get_running_loop()
        self._health.set(self.fleet.ready)
        self._methods = {b"/" + method.name.encode(): method for method in self._all_methods()}
        host, _, port = self.address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        # Connections that ended here keep the address for a minute, and a new server must have it at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections inherit these: clients that have gone without a word are found out within 80 s.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.bind((host.strip("[]"), int(port)))
        self.port = sock.getsockname()[1]
        options = server_options(self.tls, handshake_s=self.timeouts.head_s, end_s=self.timeouts.write_s)
        self._server = await loop.create_server(lambda: Connection(self), sock=sock, backlog=2048, **options)
        self._sweeping = loop.create_task(self._sweep())

    async def _sweep(self) -> None:
        """Enforce time-outs, and let health say what ServerReady says: models come and go, and watchers are told."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.reaper.sweep()
            if self._stopping is None:
                self._health.set(self.fleet.ready)

    def _all_methods(self) -> Iterator[Method]:
        yield from self._service.methods()
        checked = reader(message("HealthCheckRequest", "grpc.health.v1"))
        status = message("HealthCheckResponse", "grpc.health.v1").SerializeToString
        yield Method(f"{HEALTH}/Check", checked, status, unary=self._health.check, always=True)
        self._watching = Method(f"{HEALTH}/Watch", checked, status, streaming=self._health.watch)
        yield self._watching
        for service in (REFLECTION, REFLECTION_ALPHA):
            package = service.rpartition(".")[0]
            yield Method(
                f"{service}/ServerReflectionInfo",
                reader(message("ServerReflectionRequest", package)),
                message("ServerReflectionResponse", package).SerializeToString,
                streaming=Reflection(package, SERVICE, HEALTH, REFLECTION, REFLECTION_ALPHA).info,
            )

    # What connections ask

    def ended(self, call: Call) -> None:
        """Count a call that is open no more; those of methods that there are not, as one."""
        self.in_progress -= 1
        if self._ended is not None:
            name = call.head.method.name if call.head.method is not None else "other"
            self._ended[name, call.code][0] += 1

    def gone(self) -> None:
        """Take note that a connection has ended."""
        if not self.reaper.connections:
            self._quiet.set()

    def head(self, headers: Headers) -> Head:
        """Read the headers of a call."""
        return head_of(headers, self._methods)

    async def stop(self) -> None:
        """Take no more calls, and let those in progress finish within the grace time."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await self._stopping

    async def _stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        self._health.set(False)
        await asyncio.sleep(0)  # who watches is told before the connection goes
        self._quiet.clear()
        for connection in list(self.reaper.connections):
            for call in list(connection.calls.values()):
                if call.head.method is self._watching:
                    call.fail(Status.UNAVAILABLE, "the server is going away")
            connection.drain()
        if not await self._is_quiet_within(self.grace):
            self.cut_short()
            await self._quiet.wait()
        if self._sweeping is not None:
            self._sweeping.cancel()

    def cut_short(self) -> None:
        """End all calls with UNAVAILABLE, and connections once their clients have had time to read that."""
        for connection in list(self.reaper.connections):
            connection.cut_short()
            asyncio.get_running_loop().call_later(LINGER_S, connection.transport.abort)

    async def _is_quiet_within(self, seconds: float) -> bool:
        if self.reaper.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), seconds)
        return not self.reaper.connections
