"""Stand-ins for parts of uvicorn on a connection where the fast path and uvicorn's own line of requests take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from serving.protocols.headers import header


class Busy:
    """Stands for the answer that the fast path still owes, so that uvicorn queues what comes behind it."""

    response_complete = False
    expected_content_length = 0
    message_event = asyncio.Event()  # for nobody; uvicorn sets it when the client leaves


class Writer:
    """The transport as uvicorn's answers use it: uvloop raises on a write to a connection that is already gone.

    uvicorn tells only the last request of a line that the client has left.
    """

    __slots__ = ("_transport", "close", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.close = transport.close
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:  # noqa: D102
        if not self._transport.is_closing():
            self._transport.write(data)


class Flow(FlowControl):
    """Reads on only when no request waits in line.

    uvicorn alone reads on with every answer, so that a client that pipelines and reads nothing fills the memory.
    """

    def __init__(self, transport: asyncio.Transport, line: deque[Any]) -> None:
        super().__init__(transport)
        self._line = line

    def resume_reading(self) -> None:  # noqa: D102
        if not self._line:
            super().resume_reading()


def adapt(cycle: RequestResponseCycle, transport: asyncio.Transport) -> None:
    """Have uvicorn write an answer by a Writer, and to HTTP/1.0 as that knows it."""
    cycle.transport = Writer(transport)  # type: ignore[assignment]
    if cycle.scope["http_version"] == "1.0":
        cycle.waiting_for_100_continue = False
        cycle.send = _without_chunks(cycle)  # type: ignore[assignment,method-assign]


def _without_chunks(cycle: RequestResponseCycle) -> Callable[[Any], Awaitable[None]]:
    """Return how to send an answer that ends with its connection where its length is not known."""
    send = cycle.send
    endless = False

    async def sent(message: Any) -> None:
        nonlocal endless
        if endless and not cycle.disconnected:
            cycle.transport.write(message.get("body", b""))
        elif message["type"] == "http.response.start" and cycle.scope["method"] != "HEAD":
            endless = header(message["headers"], b"content-length") is None
            if endless:  # to HEAD uvicorn writes head and end, and nothing between
                cycle.scope = {**cycle.scope, "method": "HEAD"}
        await send(message)

    return sent
