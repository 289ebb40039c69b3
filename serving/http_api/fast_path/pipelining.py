"""Stand-ins for parts of uvicorn on a connection where the fast path and uvicorn's own line of requests take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl


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
