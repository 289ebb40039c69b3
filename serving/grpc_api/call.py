"""One gRPC call on an HTTP/2 stream: its headers, its messages both ways, its deadline and its status.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote_from_bytes

import grpc

from serving.engine.admission import Bodies
from serving.errors import QueueFull, ServingError
from serving.grpc_api.hpack import Pairs, literal
from serving.grpc_api.http2 import END_HEADERS, END_STREAM, HEADERS, Connection, Stream, frame
from serving.grpc_api.security import Judge
from serving.grpc_api.status import FAULT, status_of, trailers
from serving.tensor_bytes import Gathered

log = logging.getLogger("serving.grpc")

MOST_CALLS = 8192
"""Calls in progress in one worker; further ones are told RESOURCE_EXHAUSTED."""
_MOST_QUEUED = 16
_LONGEST_MESSAGE = 1024
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_ENCODINGS = (b"gzip", b"deflate", b"identity")

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


@dataclass(frozen=True, slots=True)
class Method:
    """What answers calls of one path; messages are read with `read`, which raises InvalidRequest, and made bytes with
    `write`. judge: decides who may; None where anyone may.

    unary: async (request, call) -> response. streaming: (requests, call) -> async iterator. whole: called with
    (call, message bytes), and answers by itself, without a coroutine.
    """

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    unary: Callable[[Any, Call], Awaitable[Any]] | None = None
    streaming: Callable[[AsyncIterator[Any], Call], AsyncIterator[Any]] | None = None
    whole: Callable[[Call, bytes | memoryview], None] | None = None
    judge: Judge | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The headers of a call: its method (None: there is none), timeout in seconds, coding, and all of them.

    refusal: what is wrong with them. admit: raises the ServingError of a caller who may not, each time anew, for keys
    are withdrawn; None: anyone may.
    """

    method: Method | None
    timeout: float | None
    encoding: bytes
    headers: Pairs
    refusal: tuple[grpc.StatusCode, str] | None
    admit: Callable[[], object] | None
    loop: asyncio.AbstractEventLoop
    most_bytes: int
    bodies: Bodies

    def open(self, connection: Connection, identity: int) -> Call:
        """Begin a call of them."""
        return Call(connection, identity, self)


def head_of(
    headers: Pairs,
    methods: dict[bytes, Method],
    *,
    loop: asyncio.AbstractEventLoop,
    most_bytes: int,
    bodies: Bodies,
) -> Head:
    """Read the headers of a call; what is wrong with them is its answer."""
    by_name = dict(headers)
    path = by_name.get(b":path", b"")
    method = methods.get(path)
    refusal = None
    timeout = None
    encoding = by_name.get(b"grpc-encoding", b"identity")
    if by_name.get(b":method") != b"POST" or not by_name.get(b"content-type", b"").startswith(b"application/grpc"):
        refusal = grpc.StatusCode.INTERNAL, "this port speaks gRPC: POST with content-type application/grpc"
    elif method is None:
        refusal = grpc.StatusCode.UNIMPLEMENTED, f"there is no method {path[:128].decode('ascii', 'replace')}"
    elif encoding not in _ENCODINGS:
        refusal = grpc.StatusCode.UNIMPLEMENTED, "grpc-encoding is not one of identity, deflate, gzip"
    given = by_name.get(b"grpc-timeout")
    if given is not None:
        found = _TIMEOUT.fullmatch(given)
        if found is None:
            refusal = grpc.StatusCode.INTERNAL, "grpc-timeout should be up to 8 digits and a unit"
        else:
            timeout = int(found[1]) * _UNITS[found[2]]
    admit = method.judge(headers) if method is not None and method.judge is not None else None
    return Head(method, timeout, encoding, headers, refusal, admit, loop, most_bytes, bodies)


class Call(Stream):
    """One call; also the context that its method gets."""

    __slots__ = (
        "_flag",
        "_held",
        "_messages",
        "_opened",
        "_prefix",
        "_room",
        "_store",
        "_task",
        "_wake",
        "began",
        "done",
        "head",
        "prediction",
        "refused",
    )

    def __init__(self, connection: Connection, identity: int, head: Head) -> None:
        super().__init__(connection, identity)
        self.head = head
        self.began = time.monotonic()
        self.done = False
        self.prediction: Any = None
        """What answers this call without a coroutine; its `cancel` is called where the client leaves."""
        self._messages: deque[bytes | memoryview] = deque()
        self._store: Gathered | None = None
        self._flag = 0
        self._held = 0  # bytes of its messages that are counted
        self._prefix = b""
        self._opened = False
        self._room: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Event | None = None
        self.refused = head.refusal is not None
        """Whether it was refused for its headers: nothing of what follows them is kept."""
        if head.refusal is not None:
            # Answered once the stream is known to the connection.
            head.loop.call_soon(self.fail, *head.refusal)
            return
        try:
            if connection.endpoint.in_progress >= MOST_CALLS:
                raise QueueFull("this server has all the calls in progress that it takes: come back later")
            if head.admit is not None:
                head.admit()
        except ServingError as error:
            self.refused = True
            head.loop.call_soon(self.refuse, error.bare())
            return
        if head.method is not None and head.method.streaming is not None:
            self._wake = asyncio.Event()
            self._task = head.loop.create_task(self._stream(head.method))

    # What the connection tells

    def received(self, piece: bytes | memoryview) -> None:
        """Take a piece of the messages: each stands behind a flag and its length."""
        if self.done or self.refused:
            return
        if self._store is None and not self._prefix and len(piece) >= 5:
            size = int.from_bytes(piece[1:5], "big")
            if size == len(piece) - 5 and size <= self.head.most_bytes and isinstance(piece, bytes):
                self._flag = piece[0]
                self._took(piece[5:])
                return
        self._gather(piece)

    def _gather(self, piece: bytes | memoryview) -> None:
        while len(piece) and not self.done:
            if self._store is None:
                missing = 5 - len(self._prefix)
                self._prefix += bytes(piece[:missing])
                piece = piece[missing:]
                if len(self._prefix) < 5:
                    return
                self._flag, size = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
                self._prefix = b""
                if size > self.head.most_bytes:
                    self.fail(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"the message has {size} bytes, and the limit is {self.head.most_bytes}",
                    )
                    return
                if not self._hold(size):
                    return
                self._store = Gathered(size)
            store = self._store
            part = piece[: store.length - len(store)]
            store.add(part)
            piece = piece[len(part) :]
            if len(store) < store.length:
                return
            self._store = None
            self._took(store.whole())

    def _hold(self, size: int) -> bool:
        """Count a message in, unless it is small; return whether it may be held: else the call is refused."""
        if size > Bodies.FREE:
            try:
                self.head.bodies.hold(size)
            except QueueFull as error:
                self.refuse(error)
                return False
            self._held += size
        return True

    def release(self, size: int) -> None:
        """Count a message out that is not needed any more."""
        if size > Bodies.FREE and self._held:
            self._held -= size
            self.head.bodies.held -= size

    def _let_go(self) -> None:
        self.head.bodies.held -= self._held
        self._held = 0

    def _took(self, message: bytes | memoryview) -> None:
        if self._flag == 1 and self.head.encoding != b"identity":
            packed = len(message)
            try:
                message = _inflated(message, self.head.encoding, self.head.most_bytes)
            except ValueError as error:
                self.fail(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                return
            if not self._hold(len(message)):
                return
            self.release(packed)
        elif self._flag:
            self.fail(grpc.StatusCode.INTERNAL, "a message is flagged as compressed, and no grpc-encoding says how")
            return
        self._messages.append(message)
        if self._wake is not None:
            self._wake.set()
        elif len(self._messages) > 1:
            self.fail(grpc.StatusCode.INVALID_ARGUMENT, "this method takes one message")

    def complete(self) -> None:
        """Answer: nothing more will come."""
        if self._wake is not None:
            self._wake.set()
            return
        method = self.head.method
        if self.done or self.refused or method is None:
            return
        if not self._messages or self._prefix or self._store is not None:
            self.fail(grpc.StatusCode.INVALID_ARGUMENT, "the request has no whole message")
            return
        if method.whole is not None:
            method.whole(self, self._messages[0])
        else:
            self._task = self.head.loop.create_task(self._unary(method))

    def full(self) -> bool:
        """Tell whether messages wait to be taken."""
        return len(self._messages) >= _MOST_QUEUED

    def emptied(self) -> None:
        """Write on."""
        if self._room is not None:
            self._room.set()

    def left(self) -> None:
        """Cancel what goes on."""
        if not self.done:
            self.done = True
            self._drop()
            self._cancel_prediction()

    def _drop(self) -> None:
        self._let_go()
        self._store = None
        self._messages.clear()
        if self._task is not None and self._task is not asyncio.current_task(self.head.loop):
            self._task.cancel()

    def expire(self, now: float, deadline: float) -> None:
        """End with DEADLINE_EXCEEDED where the client's time is over, or `deadline` seconds while it still sends."""
        timeout = self.head.timeout
        late = timeout is not None and now - self.began >= timeout
        if not self.done and (late or (self._wake is None and not self.ended and now - self.began >= deadline)):
            self._cancel_prediction()
            self.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")

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
        self._send(self.head.method.write(response))
        if self.out is not None and not self.done:
            self._room = asyncio.Event()
            await self._room.wait()

    def _send(self, message: bytes) -> None:
        if self.done:
            return
        connection = self.connection
        if not self._opened:
            self._opened = True
            connection.transport.write(frame(HEADERS, END_HEADERS, self.id, OPENING))
        connection.send(self, b"\0" + len(message).to_bytes(4, "big") + message)

    def answer(self, message: bytes) -> None:
        """Send the only response, and status OK."""
        if self.done:
            return
        self.done = True
        if self._held:
            self._let_go()
        connection = self.connection
        size = len(message) + 5
        if connection.fits(self, size):
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
        connection.transport.write(frame(HEADERS, END_HEADERS, self.id, OPENING))
        connection.send(self, b"\0" + (size - 5).to_bytes(4, "big"))
        connection.send(self, message)
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
                if self.window < len(message) or len(self._messages) == _MOST_QUEUED // 2:
                    self.connection.refill(self)
                if self.head.admit is not None:
                    self.head.admit()  # a stream may outlive the key that it began with
                yield method.read(bytes(message))
            if self.ended or self.done:
                return
            self.connection.refill(self)
            self._wake.clear()
            await self._wake.wait()


def _inflated(message: bytes | memoryview, encoding: bytes, limit: int) -> bytes:
    """Inflate a message. Raises ValueError with what is wrong."""
    inflater = zlib.decompressobj(wbits=31 if encoding == b"gzip" else 15)
    try:
        made = inflater.decompress(message, limit + 1)
    except zlib.error:
        raise ValueError(f"a message is not {encoding.decode()}, as grpc-encoding says") from None
    if len(made) > limit:
        raise ValueError(f"a message inflates to over {limit} bytes, which is the limit")
    if not inflater.eof or inflater.unused_data:
        raise ValueError(f"a {encoding.decode()} message is cut short or has something behind it")
    return made


def _escaped(text: str) -> bytes:
    """Write a grpc-message: percent-encoded, and short enough for any client's limit on headers."""
    safe = "".join(chr(c) for c in range(0x20, 0x7F) if c != 0x25)
    return quote_from_bytes(text.encode("utf-8", "replace")[:_LONGEST_MESSAGE], safe).encode()
