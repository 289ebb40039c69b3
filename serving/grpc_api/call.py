"""One gRPC call on an HTTP/2 stream: who may make it, its deadline, its answers and its status.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn
from urllib.parse import quote_from_bytes

import grpc

from serving.errors import QueueFull, ServingError
from serving.grpc_api.connection import Connection
from serving.grpc_api.fields import Parts
from serving.grpc_api.frames import END_HEADERS, END_STREAM, HEADERS, frame
from serving.grpc_api.head import Head, Method
from serving.grpc_api.hpack import literal
from serving.grpc_api.incoming import MOST_QUEUED, Incoming
from serving.grpc_api.status import FAULT, status_of, trailers

log = logging.getLogger("serving.grpc")

_LONGEST_MESSAGE = 1024

# `:status 200`, then literals: the same bytes on every connection.
OPENING = (
    b"\x88" + literal(b"content-type", b"application/grpc") + literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
)
_FINE = literal(b"grpc-status", b"0")


def _around_id(made: bytes) -> tuple[bytes, bytes]:
    return made[:5], made[9:]


_OPENING_FRAME = _around_id(frame(HEADERS, END_HEADERS, 0, OPENING))
_FINE_FRAME = _around_id(frame(HEADERS, END_HEADERS | END_STREAM, 0, _FINE))


class Aborted(Exception):
    """A call ended with a status by its own will."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...]) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.metadata = metadata


class Call(Incoming):
    """One call; also the context that its method gets."""

    __slots__ = ("_opened", "_owed", "_room", "_task", "prediction")

    connection: Connection

    def __init__(self, connection: Connection, identity: int, head: Head) -> None:
        super().__init__(connection, identity, head)
        self.prediction: Any = None
        """What answers this call without a coroutine; its `cancel` is called where the client leaves."""
        self._opened = False
        self._owed = 0  # messages of a stream that were taken, less its answers
        self._room: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        if head.refusal is not None:
            self.refused = True
            # Answered once the stream is known to the connection.
            head.loop.call_soon(self.fail, *head.refusal)
            return
        method = head.method
        try:
            if connection.endpoint.in_progress >= connection.most_calls and not (method and method.always):
                raise QueueFull("this server has all the calls in progress that it takes: come back later")
            if head.admit is not None:
                head.admit()
        except ServingError as error:
            self.refused = True
            head.loop.call_soon(self.refuse, error.bare())
            return
        if method is not None and method.streaming is not None:
            self._wake = asyncio.Event()
            self._task = head.loop.create_task(self._stream(method))

    # What the connection tells

    def complete(self) -> None:
        """Answer: nothing more will come."""
        if self._wake is not None:
            self._wake.set()
            return
        method = self.head.method
        if self.done or self.refused or method is None or self._inflating is not None:
            return
        if not self._messages or self._prefix or self._store is not None:
            self.fail(grpc.StatusCode.INVALID_ARGUMENT, "the request has no whole message")
            return
        if method.whole is not None:
            method.whole(self, self._messages[0])
        else:
            self._task = self.head.loop.create_task(self._unary(method))

    def emptied(self) -> None:
        """Write on."""
        if self.done:
            self._let_go()
        if self._room is not None:
            self._room.set()

    def left(self) -> None:
        """Cancel what goes on."""
        if not self.done:
            self.done = True
            self._drop()
            self._cancel_prediction()
        self._let_go()  # an answer may still have waited

    def is_quiet(self) -> bool:
        """Tell whether nothing is owed to the client: it has not sent a whole request, or has all its answers."""
        if self.done or self.out is not None or self._messages:
            return False
        return self._owed <= 0 if self._wake is not None else not self.ended

    def look(self, now: float) -> None:
        """End with DEADLINE_EXCEEDED where the client's time is over, or its message takes too long."""
        if self.done:
            return
        timeout = self.head.timeout
        if timeout is not None and now - self.began >= timeout:
            self._cancel_prediction()
            self.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
        elif self.is_late(now):
            self.connection.guard.cut["slow_body"] += 1
            self.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "the message did not arrive in time, or came too slowly")

    def _drop(self) -> None:
        super()._drop()
        if self._task is not None and self._task is not asyncio.current_task(self.head.loop):
            self._task.cancel()

    def _cancel_prediction(self) -> None:
        if self.prediction is not None:
            self.prediction.cancel()
            self.prediction = None

    # What methods use

    def time_remaining(self) -> float | None:
        """Return how many seconds the client still waits; None where it waits for ever."""
        timeout = self.head.timeout
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - self.began))

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> NoReturn:
        """End the call with a status."""
        raise Aborted(code, details, trailing_metadata)

    async def write(self, response: Any) -> None:
        """Send one of several responses; waits while the client takes none."""
        assert self.head.method is not None  # noqa: S101  only methods write
        self._owed -= 1
        self._send(response if isinstance(response, list) else [self.head.method.write(response)])
        if self.out is not None and not self.done:
            self._room = asyncio.Event()
            await self._room.wait()

    def _send(self, message: Parts) -> None:
        if self.done:
            return
        connection = self.connection
        if not self._opened:
            self._opened = True
            connection.transport.write(frame(HEADERS, END_HEADERS, self.id, OPENING))
        connection.send(self, b"\0" + sum(map(len, message)).to_bytes(4, "big") + message[0], *message[1:])

    def answer(self, message: bytes | Parts) -> None:
        """Send the only response, and status OK."""
        if self.done:
            return
        self.done = True
        if self._held:
            self._let_go()
        connection = self.connection
        size = 5 + (len(message) if isinstance(message, bytes) else sum(map(len, message)))
        if isinstance(message, bytes) and connection.fits(self, size):
            # Headers, one frame of DATA (type and flags 0), the message behind its flag and length, trailers.
            identity = self.id.to_bytes(4, "big")
            frames = b"%b%b%b%b\0\0%b\0%b%b%b%b%b" % (
                _OPENING_FRAME[0],
                identity,
                _OPENING_FRAME[1],
                size.to_bytes(3, "big"),
                identity,
                (size - 5).to_bytes(4, "big"),
                message,
                _FINE_FRAME[0],
                identity,
                _FINE_FRAME[1],
            )
            connection.answer(self, frames, size)
            return
        if size > min(connection.room, self.room):
            try:
                self.hold(size)  # until the client has taken it
            except QueueFull as error:
                self.done = False
                self.refuse(error.bare())
                return
        connection.transport.write(frame(HEADERS, END_HEADERS, self.id, OPENING))
        prefix = b"\0" + (size - 5).to_bytes(4, "big")
        connection.send(self, prefix, *([message] if isinstance(message, bytes) else message))
        connection.finish(self, _FINE)

    def fail(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        """End with a status other than OK."""
        if self.done:
            return
        self.done = True
        self._drop()
        block = b"" if self._opened else OPENING
        block += literal(b"grpc-status", b"%d" % code.value[0])
        block += literal(b"grpc-message", _escaped(details))
        for name, value in metadata:
            block += literal(name.encode(), value.encode())
        self.connection.finish(self, block)

    def refuse(self, error: ServingError) -> None:
        """End with the status of an error."""
        self.fail(status_of(error), error.message, trailers(error))

    # Coroutines

    async def _unary(self, method: Method) -> None:
        assert method.unary is not None  # noqa: S101  chosen by it
        unary = method.unary

        async def run() -> None:
            message = self._messages.popleft()
            self.answer(method.write(await unary(method.read(bytes(message)), self)))

        await self._guarded(run)

    async def _stream(self, method: Method) -> None:
        assert method.streaming is not None  # noqa: S101  chosen by it
        streaming = method.streaming

        async def run() -> None:
            async for response in streaming(self._requests(method), self):
                await self.write(response)
            if not self.done:
                self.done = True
                self._let_go()
                if not self._opened:
                    self.connection.transport.write(frame(HEADERS, END_HEADERS, self.id, OPENING))
                self.connection.finish(self, _FINE)

        await self._guarded(run)

    async def _guarded(self, run: Callable[[], Awaitable[None]]) -> None:
        """Turn our errors into statuses, and faults of ours into INTERNAL without their text."""
        try:
            await run()
        except ServingError as error:
            self.refuse(error)
        except Aborted as end:
            self.fail(end.code, end.details, end.metadata)
        except Exception:
            log.exception("a call failed")
            self.fail(grpc.StatusCode.INTERNAL, FAULT)

    async def _requests(self, method: Method) -> AsyncIterator[Any]:
        assert self._wake is not None  # noqa: S101  only streaming methods read
        while True:
            while self._messages:
                message = self._messages.popleft()
                self._owed += 1
                if self.window < len(message) or len(self._messages) == MOST_QUEUED // 2:
                    self.connection.refill(self)
                if self.head.admit is not None:
                    self.head.admit()  # a stream may outlive the key that it began with
                if method.read is bytes:
                    yield message  # the method lets go of it
                else:
                    yield method.read(bytes(message))
                    self.release(len(message))
            if (self.ended and self._inflating is None) or self.done:
                return
            self.connection.refill(self)
            self._wake.clear()
            await self._wake.wait()


def _escaped(text: str) -> bytes:
    """Write a grpc-message: percent-encoded, and short enough for any client's limit on headers."""
    safe = "".join(chr(c) for c in range(0x20, 0x7F) if c != 0x25)
    return quote_from_bytes(text.encode("utf-8", "replace")[:_LONGEST_MESSAGE], safe).encode()
