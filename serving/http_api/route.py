"""The ASGI door to predictions: reads and inflates a body under the limit, and awaits the answer."""

from __future__ import annotations

import asyncio
import zlib

from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from serving.errors import InvalidRequest, ModelNotFound, PayloadTooLarge, ServingError, UnsupportedMediaType
from serving.fleet.fleet import Fleet
from serving.http_api.answer import (
    HeaderList,
    Headers,
    error_body,
    error_headers,
    header,
    status_of,
)
from serving.http_api.prediction import Call
from serving.http_api.targets import TEMPLATES, Targets


class ClientLeft(Exception):
    """The client closed the connection before its request was whole."""


def prediction_routes(fleet: Fleet, targets: Targets, *, max_body_bytes: int) -> list[BaseRoute]:
    """Make one route for each prediction path template."""
    return [
        Route(
            template,
            PredictionRoute(protocol, template, fleet, targets, max_body_bytes),
            methods=["POST"],
            include_in_schema=False,
        )
        for (protocol, _), template in TEMPLATES.items()
    ]


class PredictionRoute:
    """An ASGI application for one prediction path template."""

    def __init__(self, protocol: str, template: str, fleet: Fleet, targets: Targets, max_body_bytes: int) -> None:
        self._protocol = protocol
        self._template = template
        self._fleet = fleet
        self._targets = targets
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Errors are answered here, so that no framework text reaches a client."""
        headers: Headers = scope["headers"]
        try:
            parameters = scope["path_params"]
            model = self._fleet.get(parameters["model"], parameters.get("version"), parameters.get("label"))
            version = parameters.get("version", model.version)
            body = await read_body(headers, receive, self._max_body_bytes)
            path = self._template.format(**{**parameters, "version": version})
            target = self._targets.paths.get(path.encode())
            if target is None:  # unloaded while the body was on its way
                raise ModelNotFound(f"model {model.name!r} has just gone")
        except ServingError as error:
            status = status_of(error, self._protocol)
            await respond(send, status, error_headers(error), error_body(error))
            return
        except ClientLeft:
            return
        answered: asyncio.Future[tuple[int, HeaderList, bytes]] = asyncio.get_running_loop().create_future()
        call = Call(target, headers, body, lambda *answer: _resolve(answered, answer))
        leaving = asyncio.ensure_future(_left(receive)) if not answered.done() else None
        try:
            if leaving is not None:
                await asyncio.wait((answered, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                call.cancel()
                return
        finally:
            if leaving is not None:
                leaving.cancel()
        await respond(send, *answered.result())


def _resolve(future: asyncio.Future[tuple[int, HeaderList, bytes]], answer: tuple[int, HeaderList, bytes]) -> None:
    if not future.done():
        future.set_result(answer)


async def _left(receive: Receive) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(send: Send, status: int, extra: HeaderList, body: bytes) -> None:
    """Send a whole JSON answer."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """Read and inflate a body; `limit` bounds it before and after inflation.

    Raises PayloadTooLarge (judged from Content-Length before anything is read, and again while reading),
    UnsupportedMediaType for a coding other than gzip, InvalidRequest where the coding is broken.
    """
    declared = header(headers, b"content-length")
    if declared is not None and int(declared) > limit:
        raise PayloadTooLarge(f"the body has {int(declared)} bytes, and the limit is {limit}")
    coding = (header(headers, b"content-encoding") or b"identity").strip().lower()
    if coding not in (b"identity", b"gzip", b"x-gzip", b"deflate"):
        raise UnsupportedMediaType("the body's Content-Encoding is not one of gzip, deflate, identity")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > limit:
            raise PayloadTooLarge(f"the body has over {limit} bytes, which is the limit")
        if not message.get("more_body"):
            break
    return bytes(body) if coding == b"identity" else inflate(bytes(body), coding, limit)


def inflate(body: bytes, coding: bytes, limit: int) -> bytes:
    """Inflate gzip or deflate, never making more than `limit` bytes."""
    inflater = zlib.decompressobj(wbits=47 if coding != b"deflate" else 15)
    try:
        made = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise InvalidRequest(f"the body is not {coding.decode()}, as its Content-Encoding says") from None
    if len(made) > limit:
        raise PayloadTooLarge(f"the body inflates to over {limit} bytes, which is the limit")
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest(f"the {coding.decode()} body is cut short or has something behind it")
    return made
