"""Streams of rows: read, answered and written at the same time, in bounded memory, whatever their length."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope, Send

from serving.bodies.byte_budget import ByteBudget
from serving.bulk.batch import NO_LINES, BadRow, Batch
from serving.bulk.formats import MEDIA_TYPES, Format, accepted_format, check_installed, reader, writer
from serving.errors import NotReady, QueueFull, ServingError, UnsupportedMediaType
from serving.http_api.upload import ClientLeft
from serving.linux.thread_scheduling import give_way
from serving.prediction.bulk import BulkPrediction, Scored
from serving.prediction.endpoint import Endpoint
from serving.prediction.prediction import FAULT
from serving.prediction.request_options import request_options
from serving.protocols.headers import header

log = logging.getLogger("serving.bulk")
T = TypeVar("T")

CONNECTION = "serving.connection"
"""Where the scope of a request with rows in bulk has its connection."""
MOST = 8
"""Streams of one worker."""
HELD_BYTES = 8 << 20
"""What a stream is counted for among the bytes that a process holds."""
_AT_ONCE = 5 << 17
"""Bytes with which a reader is content: with those that come in one go they are a block of text at most."""
_LINGER_S = 0.01
"""How long what has come waits for more: rows that come one by one are answered so, and all others by the thousand."""
_CONTENT_TYPES = {kind: name.encode() for name, kind in MEDIA_TYPES.items()} | {"csv": b"text/csv; charset=utf-8"}

_threads = ThreadPoolExecutor(2 * MOST, thread_name_prefix="bulk", initializer=give_way)
"""One of a stream waits for its body and reads it, another writes its answers."""
_turn = threading.Lock()
"""Held by the one that computes: however many streams there are, they take no more than one processor."""
_places = threading.BoundedSemaphore(MOST)


async def answer_stream(  # noqa: PLR0917  an ASGI call and what was read of it
    endpoint: Endpoint, kind: Format, scope: Scope, receive: Receive, send: Send, bodies: ByteBudget
) -> None:
    """Answer a request whose body is rows of a format. Raises a ServingError before anything is sent."""
    check_installed()
    headers = scope["headers"]
    if kind == "parquet":
        raise UnsupportedMediaType("Parquet is read from its end, and is no stream: send its rows as an Arrow stream")
    if (header(headers, b"content-encoding") or b"identity").lower() != b"identity":
        raise UnsupportedMediaType("a stream of rows is taken without Content-Encoding")
    prediction = BulkPrediction(endpoint, headers, request_options(headers))
    if not _places.acquire(blocking=False):
        raise QueueFull(f"this server reads {MOST} streams already: come back later")
    try:
        bodies.hold(HELD_BYTES)
        try:
            await _Stream(prediction, kind, scope, receive, send).answer()
        finally:
            bodies.held -= HELD_BYTES
    finally:
        _places.release()


class _Stream:
    """One stream in progress: while a batch is answered, the next one is read and the one before it is sent."""

    def __init__(self, prediction: BulkPrediction, kind: Format, scope: Scope, receive: Receive, send: Send) -> None:
        self._prediction = prediction
        self._loop = prediction.endpoint.loop
        self._send = send
        self._connection = scope.pop(CONNECTION, None)
        self._body = _Body(receive, self._loop, self._connection)
        self._made: list[bytes] = []
        self._line = 0
        self._started = self._refused = False
        self._out = accepted_format(header(scope["headers"], b"accept"), kind)
        self._kind = kind
        if self._connection is not None:
            self._connection.stream = self._refuse

    def write(self, data: bytes) -> None:
        """Take what the writer makes."""
        self._made.append(data)

    async def answer(self) -> None:
        """Answer all of it. Raises a ServingError where nothing is sent yet."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  this is a coroutine
        self._body.on_left = task.cancel
        try:
            await self._answer()
        except (ClientLeft, asyncio.CancelledError):
            if self._refused:
                await self._fail(NotReady("this server is going away"))
                return
            self._prediction.ended(None, gone=True)
            if not self._body.gone:
                raise
        except Exception as fault:
            error = fault if isinstance(fault, ServingError) else ServingError(FAULT)
            if error is not fault:
                log.exception("a stream could not be answered")
            await self._fail(error)
        else:
            self._prediction.ended(None)
        finally:
            self._body.close()
            if self._connection is not None:
                self._connection.stream = None

    def _refuse(self) -> None:
        """Answer no more: whoever waits for its rows would wait longer than this server has."""
        self._refused = True
        self._body.on_left()

    async def _fail(self, error: ServingError) -> None:
        """End with an error. Raises it where nothing is sent yet."""
        self._prediction.ended(error)
        if not self._started:
            raise error from None
        await self._break_off(error)

    def _open(self) -> None:
        described = self._prediction.model.described
        self._reader = reader(self._kind, self._body, described)  # type: ignore[arg-type]  # nobody seeks
        self._batches = iter(self._reader)
        self._writer = writer(self._out, described, self)

    async def _answer(self) -> None:
        await self._aside(self._open)
        reading = self._read_on()
        sending: asyncio.Future[None] = self._loop.create_future()
        sending.set_result(None)
        try:
            while (batch := await reading) is not None:
                reading = self._read_on()
                scored = await self._prediction.run(batch)
                await sending
                sending = self._loop.create_task(self._deliver(scored))
        except ServingError:
            await sending  # what was right is told first
            raise
        except BaseException:
            sending.cancel()
            raise
        finally:
            reading.cancel()
        await sending
        self._body.close()
        await self._aside(self._writer.close, self._prediction.good, self._prediction.bad)
        await self._sent(more=False)

    def _read_on(self) -> asyncio.Future[Batch | None]:
        self._reader.spread = not self._prediction.beside_live()
        return self._aside(next, self._batches, None)

    def _aside(self, work: Callable[..., T], *given: Any) -> asyncio.Future[T]:
        """Have something computed off the event loop, in turn."""

        def in_turn() -> T:
            with _turn:
                return work(*given)

        return self._loop.run_in_executor(_threads, in_turn)

    async def _deliver(self, scored: list[Scored]) -> None:
        def written() -> None:
            for each in scored:
                self._writer.write(each.outputs, each.lines, each.bad)
                self._line = max([self._line, *each.lines[-1:].tolist(), *(bad.line for bad in each.bad[-1:])])

        await self._aside(written)
        await self._sent(more=True)

    async def _sent(self, *, more: bool) -> None:
        """Send what is made; returns once the client takes enough of it that there is room for more."""
        if not self._started:
            self._started = True
            headers = [
                (b"content-type", _CONTENT_TYPES[self._out]),
                (b"x-model-version", self._prediction.model.version.encode()),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        data = b"".join(self._made)
        self._made.clear()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _break_off(self, error: ServingError) -> None:
        """Say why there is no more, and end the connection: no client should take this for the whole answer."""
        await self._aside(self._writer.write, None, NO_LINES, [BadRow(self._line + 1, "", error.message)])
        await self._sent(more=True)
        self._body.close()
        if self._connection is None:
            raise error  # which other servers than ours take for the end of a connection
        self._connection.break_off()


class _Body:
    """A request's body as a file, for a thread that has its turn, and gives it up while it waits."""

    on_left: Callable[[], object]
    """Called once the client leaves after all of the body has come."""

    def __init__(self, receive: Receive, loop: asyncio.AbstractEventLoop, connection: Any) -> None:
        self._receive = receive
        self._loop = loop
        self._connection = connection
        self._message: asyncio.Task[Message] | None = None  # that is waited for
        self._gathering: Future[bytes] | None = None
        self._came = b""
        self._read = 0  # bytes of it
        self._whole = False
        self.gone = False

    def read(self, size: int) -> bytes:
        """Give some bytes, none at the end."""
        if self._read >= len(self._came):
            gathering = self._gathering or self._ask()
            _turn.release()
            self._wait_for_client(True)
            try:
                self._came, self._read = gathering.result(), 0
            finally:
                self._wait_for_client(False)
                _turn.acquire()
            self._gathering = self._ask() if self._came else None  # it comes while this is read
        begin, self._read = self._read, self._read + size
        return self._came[begin : self._read]

    def close(self) -> None:
        """Wait for nothing any more."""
        self.on_left = bool
        for waiting in (self._gathering, self._message):
            if waiting is not None:
                waiting.cancel()

    def _ask(self) -> Future[bytes]:
        self._gathering = asyncio.run_coroutine_threadsafe(self._gather(), self._loop)
        return self._gathering

    async def _gather(self) -> bytes:
        made: list[bytes] = []
        until = 0.0
        while not self._whole and sum(map(len, made)) < _AT_ONCE:
            if self._message is None:
                self._message = self._loop.create_task(self._receive())  # type: ignore[arg-type]
            wait = max(0.0, until - time.monotonic()) if made else None
            done, _ = await asyncio.wait({self._message}, timeout=wait)
            if not done:
                break
            message, self._message = self._message.result(), None
            if message["type"] == "http.disconnect":
                self.gone = True
                raise ClientLeft
            until = until or time.monotonic() + _LINGER_S
            if some := message.get("body"):
                made.append(some)
            self._whole = not message.get("more_body")
        if self._whole and self._message is None:
            self._message = self._loop.create_task(self._receive())  # type: ignore[arg-type]
            self._message.add_done_callback(self._left)
        return b"".join(made)

    def _wait_for_client(self, waiting: bool) -> None:
        if self._connection is not None:
            self._connection.hungry = waiting

    def _left(self, done: asyncio.Task[Message]) -> None:
        if not done.cancelled():
            self.gone = True
            self.on_left()
