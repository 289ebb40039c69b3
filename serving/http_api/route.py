"""The ASGI route of predictions: reads and inflates a body under the limit, and awaits the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable

from fastapi import APIRouter, Request, Response
from starlette.types import Message, Receive, Scope, Send

from serving.bodies.buffer import BodyBuffer
from serving.bodies.byte_budget import ByteBudget
from serving.bodies.inflation import Inflation, inflaters
from serving.bulk.formats import bulk_format
from serving.errors import PayloadTooLarge, ServingError, UnsupportedMediaType
from serving.http_api.answer import refusal
from serving.http_api.bulk_route import answer_stream
from serving.http_api.own_route import OwnRoute
from serving.http_api.prediction_paths import ROUTES
from serving.http_api.services import Services, services_of
from serving.http_api.upload import ClientLeft
from serving.prediction.authorization import authorize
from serving.prediction.endpoint import Endpoint
from serving.prediction.prediction import Prediction
from serving.prediction.request_log import server_timing
from serving.prediction.request_options import RequestOptions, request_options
from serving.protocols.codec import Blobs
from serving.protocols.headers import JSON, HeaderList, Headers, header
from serving.protocols.http_codec import LENGTH, USE_BINARY, Encoded
from serving.tensor_bytes import Buffer

WATCH_AFTER_S = 0.05
IDENTITY = "serving.request_id"
"""Where a scope has what its request is called."""
PREDICTION = "serving.prediction"
"""Where a scope has the prediction that it asked for, while it is answered and if requests are logged."""


class PredictionResponse(Response):
    """The answer to a request whose body nobody has read: it reads it, and answers, once FastAPI lets it.

    So all that an application asks of a request before (dependencies of its routers) has been asked. only: names the
    model where the path does not; raises a ServingError.
    """

    def __init__(self, protocol: str, services: Services, only: Callable[[], str] | None = None) -> None:
        self._protocol = protocol
        self._services = services
        self._only = only
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Errors are answered here, so that no framework text reaches a client."""
        services = self._services
        try:
            authorize(services.access, scope["headers"], "predict")  # before a stranger learns which models there are
            # Of an application's prefix too.
            given = scope["path_params"] if self._only is None else {"model": self._only()}
            endpoint = services.endpoints.find(self._protocol, given["model"], given.get("version"), given.get("label"))
        except ServingError as error:
            await respond(send, *refusal(error, self._protocol))
        else:
            await answer(endpoint, scope, receive, send, services.bodies)
        if self.background is not None:
            await self.background()


def _endpoint(protocol: str) -> Callable[[Request], Awaitable[Response]]:
    async def predict(request: Request) -> Response:
        return PredictionResponse(protocol, services_of(request))

    return predict


router = APIRouter(route_class=OwnRoute)
for (_protocol, _kind), _template in ROUTES.items():
    router.add_api_route(
        _template,
        _endpoint(_protocol),
        methods=["POST"],
        name=f"{_protocol}_{_kind}_prediction",
        include_in_schema=False,
    )


async def answer(endpoint: Endpoint, scope: Scope, receive: Receive, send: Send, bodies: ByteBudget) -> None:
    """Read a body under the limit and answer the prediction that it asks for; or a stream of rows."""
    headers = scope["headers"]
    kind = bulk_format(header(headers, b"content-type") or b"") if endpoint.protocol == "v1" else None
    lease = Reservation(bodies)
    try:
        if kind is not None:
            await answer_stream(endpoint, kind, scope, receive, send, bodies)
            return
        if endpoint.access is not None:
            # Before a stranger's body takes memory.
            authorize(endpoint.access, headers, "predict", endpoint.model.limits.callers)
        options = request_options(headers)
        body = await _read(endpoint, headers, receive, lease)
    except ServingError as error:
        await respond(send, *refusal(error, endpoint.protocol))
    except ClientLeft:
        return
    else:
        await predict(endpoint, scope, body, options, receive, send)
    finally:
        lease.end()


async def _read(endpoint: Endpoint, headers: Headers, receive: Receive, lease: Reservation) -> Buffer:
    """Read a body under the limit of its kind."""
    if endpoint.codec.raw_tensors and header(headers, LENGTH) is not None:
        return await read_body(headers, receive, endpoint.max_body_bytes, lease)
    try:
        return await read_body(headers, receive, endpoint.max_text_bytes, lease)
    except PayloadTooLarge as error:
        raise PayloadTooLarge(f"{error.message}; {USE_BINARY}") from None


class Reservation:
    """The part of one request in the bytes that the process holds; nothing while it is small."""

    def __init__(self, bodies: ByteBudget) -> None:
        self._bodies = bodies
        self._held = 0

    def grow_to(self, size: int) -> None:
        """Hold so many bytes in all. Raises QueueFull where the process holds too many."""
        if size > ByteBudget.FREE and size > self._held:
            self._bodies.hold(size - self._held)
            self._held = size

    def end(self) -> None:
        """Hold nothing any more."""
        self._bodies.held -= self._held
        self._held = 0


class AsgiPrediction(Prediction):
    """A prediction whose answer a coroutine waits for."""

    __slots__ = ("client", "finished", "identity")

    def __init__(self, loop: asyncio.AbstractEventLoop, client: Hashable, identity: bytes) -> None:
        self.client = client
        self.identity = identity
        self.finished: asyncio.Future[tuple[int, HeaderList, bytes | Blobs, bytes]] = loop.create_future()

    @property
    def sender(self) -> Hashable:  # noqa: D102
        return self.client

    def request_id(self) -> bytes:  # noqa: D102
        return self.identity

    def answer(self, response: Encoded) -> None:  # noqa: D102
        if not self.finished.done():
            body, headers, kind = response
            if self.endpoint.timing:
                headers = [*headers, server_timing(self)]
            self.finished.set_result((200, headers, body, kind))

    def refuse(self, error: ServingError) -> None:  # noqa: D102
        if not self.finished.done():
            self.finished.set_result((*refusal(error, self.endpoint.protocol), JSON))


async def predict(  # noqa: PLR0917  an ASGI call and what was read of it
    endpoint: Endpoint, scope: Scope, body: Buffer, options: RequestOptions, receive: Receive, send: Send
) -> None:
    """Answer one prediction whose body is read; drop its rows if the client leaves before they run."""
    client = scope.get("client")  # address and port: its connection
    call = AsgiPrediction(endpoint.loop, tuple(client) if client else None, scope[IDENTITY])
    if endpoint.log is not None:
        scope[PREDICTION] = call
    call.start(endpoint, scope["headers"], body, options)
    if not call.finished.done():
        # A task that listens for the client's leaving costs as much as the rest: only slow answers get one.
        watch = endpoint.loop.call_later(WATCH_AFTER_S, _watch, call, receive)
        try:
            await call.finished
        except asyncio.CancelledError:
            call.cancel()
            if not call.finished.cancelled():
                raise
            return
        finally:
            watch.cancel()
    await respond(send, *call.finished.result())


def _watch(call: AsgiPrediction, receive: Receive) -> None:
    leaving = call.endpoint.loop.create_task(_left(receive))
    leaving.add_done_callback(lambda _: call.finished.cancel())
    call.finished.add_done_callback(lambda _: leaving.cancel())


async def _left(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(send: Send, status: int, extra: HeaderList, body: bytes | Blobs, kind: bytes = JSON) -> None:
    """Send a whole answer."""
    size = len(body) if isinstance(body, bytes) else body.size
    headers = [
        (b"content-type", kind),
        (b"content-length", b"%d" % size),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if isinstance(body, Blobs):
        for piece in body.pieces():
            await send({"type": "http.response.body", "body": bytes(piece), "more_body": True})
        body = b""
    await send({"type": "http.response.body", "body": body})


async def read_body(headers: Headers, receive: Receive, limit: int, lease: Reservation | None = None) -> Buffer:
    """Read and inflate a body; `limit` bounds it before and after inflation, `lease` counts what is held.

    Raises PayloadTooLarge (judged from Content-Length before anything is read, and again while reading),
    UnsupportedMediaType for a coding other than gzip, InvalidRequest where the coding is broken.
    """
    declared = header(headers, b"content-length")
    if declared is not None and int(declared) > limit:
        raise PayloadTooLarge(f"the body has {int(declared)} bytes, and the limit is {limit}")
    coding = (header(headers, b"content-encoding") or b"identity").strip().lower()
    if coding not in (b"identity", b"gzip", b"x-gzip", b"deflate"):
        raise UnsupportedMediaType("the body's Content-Encoding is not one of gzip, deflate, identity")
    if lease is not None and declared is not None:
        lease.grow_to(int(declared))
    message = await receive()
    if not message.get("more_body") and coding == b"identity" and len(message.get("body", b"")) <= limit:
        if message["type"] == "http.disconnect":
            raise ClientLeft
        whole: bytes = message["body"]
        return whole
    body = await _gather(message, receive, limit if declared is None else int(declared), lease)
    if coding == b"identity":
        return body
    inflation = Inflation(body, coding.decode().removeprefix("x-"), limit)
    made: Buffer | None = inflation.at_once()
    if made is None:
        if lease is not None:
            lease.grow_to(len(body) + inflation.size)
        made = await asyncio.get_running_loop().run_in_executor(inflaters, inflation.inflate)
    return made


async def _gather(message: Message, receive: Receive, most: int, lease: Reservation | None) -> Buffer:
    """Read a body of `most` bytes at the most."""
    gathered = BodyBuffer(most)
    while True:
        if message["type"] == "http.disconnect":
            raise ClientLeft
        piece: bytes = message.get("body", b"")
        size = len(gathered) + len(piece)
        if size > most:
            raise PayloadTooLarge(f"the body has over {most} bytes, which is the limit")
        gathered.add(piece)
        if lease is not None:
            lease.grow_to(size)
        if not message.get("more_body"):
            return gathered.received()
        message = await receive()
