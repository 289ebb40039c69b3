"""One gRPC call on an HTTP/2 stream: who may make it, its deadline, its answers and its status.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes

from serving.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServingError
from serving.grpc_api.head import Head, Method
from serving.grpc_api.message_reader import MessageReader
from serving.grpc_api.status import FAULT, Aborted, Status, status_of, trailers
from serving.http2.frames import ResponseTemplate
from serving.http2.hpack import literal
from serving.protocols.protobuf_wire import Parts
from serving.tensor_bytes import Buffer

if TYPE_CHECKING:
    from serving.grpc_api.connection import Connection

log = logging.getLogger("serving.grpc")

_LONGEST_MESSAGE = 1024
_FREE_BYTES = 4096
"""Messages of calls with one message that are not counted: the bound on calls bounds them."""

# `:status 200`, then literals: the same bytes on every connection.
OPENING = (
    b"\x88" + literal(b"content-type", b"application/grpc") + literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
)
_OK = literal(b"grpc-status", b"0")
_ANSWER = ResponseTemplate(OPENING, _OK)


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """One call; also the context that its method gets."""

    connection: Connection
    id: int
    head: Head
    began: float = field(default_factory=time.monotonic)
    code: int = Status.CANCELLED
    """How it ended, as it is counted; as it stands where the client leaves."""
    done: bool = False
    """Whether it was answered, or its client has left."""
    ended: bool = False
    """Whether the client has sent all that it will."""
    prediction: Any = None
    """What answers this call without a coroutine; its `cancel` is called where the client leaves."""
    write_by: float = 0.0
    """When the client must have taken more of the answer that waits, in monotonic seconds; 0: nothing waits."""
    sent: int = 0  # bytes of it that went, when last looked at
    _held: int = 0  # bytes that are counted
    _refused: bool = False  # for its headers: nothing of what follows them is kept
    _opened: bool = False
    _owed: int = 0  # messages of a stream that were taken, less its answers
    _streaming: bool = False
    _reader: MessageReader | None = None  # None where the whole message came at once
    _wake: asyncio.Event | None = None  # a streaming method waits for messages
    _drained: asyncio.Event | None = None  # a streaming method waits for its client
    _task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start what does not wait for a message, or refuse the call."""
        head = self.head
        method = head.method
        try:
            if head.refusal is not None:
                raise Aborted(*head.refusal)
            if self.connection.is_busy and not (method and method.always):
                raise QueueFull("this server has all the calls in progress that it takes: come back later")
            if method is not None and method.admit is not None:
                method.admit(head.headers)
        except (ServingError, Aborted) as error:
            self._refused = True
            self.end_with(error)
            return
        if method is not None and method.streaming is not None:
            self._streaming = True
            self._reader = MessageReader(self, streaming=True)
            self._wake = asyncio.Event()
            requests = self._requests(method, self._reader, self._wake)
            self._task = asyncio.create_task(self._stream(method.streaming(requests, self)))

    # What the connection tells

    def on_data(self, piece: bytes | memoryview, end_stream: bool) -> None:
        """Take a piece of the request."""
        self.ended = end_stream
        if self.done or self._refused:
            return
        method = self.head.method
        try:
            if self._reader is None:
                if (
                    end_stream
                    and method is not None
                    and method.whole is not None
                    and isinstance(piece, bytes)
                    and piece[:1] == b"\0"
                    and int.from_bytes(piece[1:5], "big") == len(piece) - 5 <= self.connection.server.max_bytes
                ):  # the ordinary call
                    self.hold(len(piece) - 5)
                    method.whole(self, piece[5:])
                    return
                self._reader = MessageReader(self, streaming=False)
            if piece:
                self._reader.feed(piece)
        except (ServingError, Aborted) as error:
            self.end_with(error)
            return
        if self._wake is not None:
            self._wake.set()
        elif end_stream:
            self._on_end_stream()
        if not end_stream and not self._reader.backpressured:
            self.connection.replenish(self)

    def _on_end_stream(self) -> None:
        """Answer: nothing more will come."""
        reader, method = self._reader, self.head.method
        if self.done or reader is None or method is None or reader.inflating:
            return
        if not reader.messages or not reader.is_empty:
            self.fail(Status.INVALID_ARGUMENT, "the request has no whole message")
        elif method.whole is not None:
            method.whole(self, reader.messages[0])
        elif method.unary is not None:
            self._task = asyncio.create_task(self._unary(method, method.unary, reader.messages.popleft()))

    def on_inflated(self) -> None:
        """Go on: what a thread was at work on is in the reader's messages."""
        if self._wake is not None:
            self._wake.set()
        elif self.ended:
            self._on_end_stream()

    def on_drained(self) -> None:
        """Write on: all that waited to be sent is sent."""
        self.write_by = 0.0
        if self.done:
            self._release_all()
        if self._drained is not None:
            self._drained.set()

    def on_reset(self) -> None:
        """Cancel what goes on: nothing can be sent any more."""
        if not self.done:
            self.done = True
            self._drop()
            self._cancel_prediction()
        self._release_all()  # an answer may still have waited

    def is_quiet(self) -> bool:
        """Tell whether nothing is owed to the client: it has not sent a whole request, or has all its answers."""
        if (
            self.done
            or self.connection.http2.waits(self.id) is not None
            or (self._reader is not None and self._reader.messages)
        ):
            return False
        return self._owed <= 0 if self._streaming else not self.ended

    def enforce_timeouts(self, now: float) -> None:
        """End with DEADLINE_EXCEEDED where the client's time is over, or its message takes too long."""
        if self.done:
            return
        reaper = self.connection.reaper
        timeout = self.head.timeout
        if timeout is not None and now - self.began >= timeout:
            self._cancel_prediction()
            self.end_with(DeadlineExceeded("the deadline passed"))
        elif not self.ended and self._is_late(now):
            reaper.cut["slow_body"] += 1
            self.end_with(DeadlineExceeded("the message did not arrive in time, or came too slowly"))

    def _is_late(self, now: float) -> bool:
        timeouts = self.connection.reaper.timeouts
        if self._reader is not None:
            return self._reader.is_late(now, timeouts)
        return now - self.began > timeouts.head_s

    def _drop(self) -> None:
        self._release_all()
        if self._reader is not None:
            self._reader.drop()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _cancel_prediction(self) -> None:
        if self.prediction is not None:
            self.prediction.cancel()
            self.prediction = None

    # What is held

    def hold(self, size: int) -> None:
        """Count bytes in, unless they are few. Raises QueueFull where they are too many."""
        if size > _FREE_BYTES or self._streaming:
            self.connection.server.bodies.hold(size)
            self._held += size

    def release(self, size: int) -> None:
        """Count bytes out that are not needed any more."""
        if self._held and (size > _FREE_BYTES or self._streaming):
            size = min(size, self._held)
            self._held -= size
            self.connection.server.bodies.held -= size

    def _release_all(self) -> None:
        self.connection.server.bodies.held -= self._held
        self._held = 0

    # What methods use

    def time_remaining(self) -> float | None:
        """Return how many seconds the client still waits; None where it waits for ever."""
        timeout = self.head.timeout
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - self.began))

    async def write(self, response: Any) -> None:
        """Send one of several responses; waits while the client takes none."""
        if self.done or self.head.method is None:
            return
        message = response if isinstance(response, list) else [self.head.method.write(response)]
        self._owed -= 1
        self._open()
        if self.connection.send(self, [_prefix(sum(map(len, message))), *message]):
            self._drained = asyncio.Event()
            await self._drained.wait()

    def answer(self, message: bytes | Parts) -> None:
        """Send the only response, and status OK."""
        if self.done:
            return
        self.done = True
        self.code = 0
        if self._held:
            self._release_all()
        connection = self.connection
        # Whole, in one write with others', where the windows have room: else headers, data and trailers by turns.
        if isinstance(message, bytes):
            if connection.respond(self, _ANSWER, _prefix(len(message)) + message):
                return
            message = [message]
        size = sum(map(len, message))
        try:
            self.hold(size)  # until the client has taken it
        except QueueFull as error:
            self.done = False
            self.refuse(error.bare())
            return
        self._open()
        if not connection.send(self, [_prefix(size), *message]):
            self._release_all()
        connection.finish(self, _OK)

    def rendered(self, message: bytes) -> tuple[bytes, int]:
        """Return all of the answer as the socket gets it, for a thread that writes it, and its bytes of payload."""
        data = _prefix(len(message)) + message
        return _ANSWER.render(self.id, data), len(data)

    def answered(self) -> None:
        """Take note that a thread has written all of the answer."""
        self.done = True
        self._release_all()

    def _open(self) -> None:
        if not self._opened:
            self._opened = True
            self.connection.http2.send_headers(self.id, OPENING)

    def fail(
        self, status: Status, details: str, metadata: tuple[tuple[str, str], ...] = (), *, discard: bool = False
    ) -> None:
        """End with a status other than OK; behind what waits of an answer, or where `discard` instead of it."""
        if self.done:
            return
        self.done = True
        self.code = status
        self._drop()
        block = b"" if self._opened else OPENING
        block += literal(b"grpc-status", b"%d" % status)
        block += literal(b"grpc-message", _escaped(details))
        for name, value in metadata:
            block += literal(name.encode(), value.encode())
        self.connection.finish(self, block, discard=discard)

    def refuse(self, error: ServingError) -> None:
        """End with the status of an error."""
        self.fail(status_of(error), error.message, trailers(error))

    def end_with(self, error: Exception) -> None:
        """End with what an error stands for: faults of ours are INTERNAL, without their text."""
        if isinstance(error, ServingError):
            self.refuse(error.bare())
        elif isinstance(error, Aborted):
            self.fail(error.status, error.details)
        else:
            log.error("a call failed", exc_info=error)
            self.fail(Status.INTERNAL, FAULT)

    def cut_short(self) -> None:
        """End with UNAVAILABLE, whatever goes on: the time to finish is over."""
        self._cancel_prediction()
        self.done = False  # even where an answer waits
        self.fail(Status.UNAVAILABLE, "the server is going away", discard=True)

    # Coroutines

    async def _unary(self, method: Method, unary: Callable[[Any, Any], Awaitable[Any]], message: Buffer) -> None:
        try:
            self.answer(method.write(await unary(method.read(bytes(message)), self)))
        except Exception as error:
            self.end_with(error)

    async def _stream(self, responses: AsyncIterator[Any]) -> None:
        try:
            async for response in responses:
                await self.write(response)
        except Exception as error:
            self.end_with(error)
        if not self.done:
            self.done = True
            self.code = 0
            self._release_all()
            self._open()
            self.connection.finish(self, _OK)

    async def _requests(self, method: Method, reader: MessageReader, wake: asyncio.Event) -> AsyncIterator[Any]:
        while not self.done:
            while reader.messages:
                message = await reader.take()
                self._owed += 1
                if not reader.backpressured:
                    self.connection.replenish(self)
                if method.admit is not None:
                    method.admit(self.head.headers)  # a stream may outlive the key that it began with
                if method.read is bytes:
                    yield message  # the method lets go of it
                else:
                    yield method.read(bytes(message))
                    self.release(len(message))
            if self.ended and not reader.inflating:
                if not reader.is_empty:
                    raise InvalidRequest("the request ends in the middle of a message")
                return
            wake.clear()
            await wake.wait()


def _prefix(size: int) -> bytes:
    return b"\0" + size.to_bytes(4, "big")


def _escaped(text: str) -> bytes:
    """Write a grpc-message: percent-encoded, and short enough for any client's limit on headers."""
    safe = "".join(chr(c) for c in range(0x20, 0x7F) if c != 0x25)
    return quote_from_bytes(text.encode("utf-8", "replace")[:_LONGEST_MESSAGE], safe).encode()
