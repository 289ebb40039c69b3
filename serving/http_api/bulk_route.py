"""Streams of rows: read, answered and written at the same time, in bounded memory, whatever their length."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from serving.bodies.byte_budget import ByteBudget
from serving.bulk.batch import NO_LINES, BadRow, Batch
from serving.bulk.formats import MEDIA_TYPES, Format, accepted_format, check_installed
from serving.bulk.streams import RowStream, StreamProcess
from serving.errors import NotReady, QueueFull, ServingError, UnsupportedMediaType
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
_CONTENT_TYPES = {kind: name.encode() for name, kind in MEDIA_TYPES.items()} | {"csv": b"text/csv; charset=utf-8"}

_threads = ThreadPoolExecutor(2 * MOST, thread_name_prefix="bulk")
"""One waits for a stream's rows, another for its answers."""
_process = StreamProcess()
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
            await StreamedAnswer(prediction, kind, scope, receive, send).answer()
        finally:
            bodies.held -= HELD_BYTES
    finally:
        _places.release()


class StreamedAnswer:
    """One stream in progress: while a batch is answered, the next one is read and the one before it is sent."""

    def __init__(self, prediction: BulkPrediction, kind: Format, scope: Scope, receive: Receive, send: Send) -> None:
        self._prediction = prediction
        self._loop = prediction.endpoint.loop
        self._receive = receive
        self._send = send
        self._connection = scope.pop(CONNECTION, None)
        self._writing = threading.Lock()
        self._made: list[bytes] = []
        self._line = 0
        self._started = self._refused = self._gone = False
        self._client_awaited = self._rows_awaited = False
        self._out = accepted_format(header(scope["headers"], b"accept"), kind)
        self._kind = kind
        # Cancels the answer, for `_feed` and `refuse`. Nothing (`bool`) before it begins and once its end is being
        # written: a cancellation there would leave the client without the end that tells a whole answer.
        self._on_left: Callable[[], object] = bool
        if self._connection is not None:
            self._connection.stream = self

    async def answer(self) -> None:
        """Answer all of it. Raises a ServingError where nothing is sent yet."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  this is a coroutine
        self._on_left = task.cancel
        rows: RowStream | None = None
        feeding: asyncio.Task[None] | None = None
        try:
            rows = await self._opened()
            feeding = self._loop.create_task(self._feed(rows))
            await self._answer(rows)
        except asyncio.CancelledError:
            if self._refused:
                await self._fail(NotReady("this server is going away"), rows)
                return
            self._prediction.ended(None, gone=True)
            if not self._gone:
                raise
        except Exception as fault:
            error = fault if isinstance(fault, ServingError) else ServingError(FAULT)
            if error is not fault:
                log.exception("a stream could not be answered")
            await self._fail(error, rows)
        else:
            self._prediction.ended(None)
        finally:
            self._on_left = bool
            if feeding is not None:
                feeding.cancel()
            if rows is not None:
                rows.close()
            if self._connection is not None:
                self._connection.stream = None

    async def _opened(self) -> RowStream:
        opening = _threads.submit(_process.open, self._prediction.model.described, self._kind, self._out)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise

    @property
    def hungry(self) -> bool:
        """Whether it is the client that everybody waits for."""
        return self._client_awaited and self._rows_awaited

    def refuse(self) -> None:
        """Answer no more: whoever waits for its rows would wait longer than this server has."""
        self._refused = True
        self._on_left()

    async def _fail(self, error: ServingError, rows: RowStream | None) -> None:
        """End with an error. Raises it where nothing is sent yet."""
        self._on_left = bool
        self._prediction.ended(error)
        if not self._started or rows is None:
            raise error from None
        await self._break_off(error, rows)

    async def _answer(self, rows: RowStream) -> None:
        reading = self._aside(rows.next)
        sending: asyncio.Future[None] = self._loop.create_future()
        sending.set_result(None)
        try:
            while (batch := await self._awaited(reading)) is not None:
                reading = self._aside(rows.next)
                scored = await self._prediction.run(batch)
                await sending
                sending = self._loop.create_task(self._deliver(scored, rows))
        except ServingError:
            await sending  # what was right is told first
            raise
        except BaseException:
            sending.cancel()
            raise
        finally:
            reading.cancel()
        await sending  # one at a time: answers go out in the order of their rows
        self._on_left = bool
        await self._aside(self._write, rows, [], (self._prediction.good, self._prediction.bad))
        await self._sent(more=False)

    async def _awaited(self, reading: asyncio.Future[Batch | None]) -> Batch | None:
        self._rows_awaited = True
        try:
            return await reading
        finally:
            self._rows_awaited = False

    async def _feed(self, rows: RowStream) -> None:
        """Hand on what the client sends, as fast as it is read; then wait for the client to leave."""
        more = True
        while True:
            self._client_awaited = more
            message = await self._receive()
            self._client_awaited = False
            if message["type"] == "http.disconnect":
                self._gone = True
                self._on_left()
                return
            with contextlib.suppress(OSError):  # it is read no further, and who reads says why
                if body := message.get("body"):
                    await self._loop.sock_sendall(rows.body, body)
                more = message.get("more_body", False)
                if not more:
                    rows.body.shutdown(socket.SHUT_WR)

    def _aside(self, work: Callable[..., T], *given: Any) -> asyncio.Future[T]:
        """Have something waited for off the event loop."""
        return self._loop.run_in_executor(_threads, work, *given)

    def _write(self, rows: RowStream, scored: Sequence[Scored], counts: tuple[int, int] | None = None) -> None:
        with self._writing:  # also of one that was cancelled, and goes on
            told = [tuple(each) for each in scored]  # the process knows nothing of predictions
            self._made.append(rows.write(told, beside_live=self._prediction.beside_live(), counts=counts))

    async def _deliver(self, scored: list[Scored], rows: RowStream) -> None:
        await self._aside(self._write, rows, scored)
        for each in scored:
            self._line = max([self._line, *each.lines[-1:].tolist(), *(bad.line for bad in each.bad[-1:])])
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

    async def _break_off(self, error: ServingError, rows: RowStream) -> None:
        """Say why there is no more, and end the connection: no client should take this for the whole answer."""
        with contextlib.suppress(ServingError):  # it was the process that ended
            last = BadRow(self._line + 1, "", error.message)
            await self._aside(self._write, rows, [Scored(None, NO_LINES, (last,))])
        await self._sent(more=True)
        if self._connection is None:
            raise error  # which other servers than ours take for the end of a connection
        self._connection.break_off()


def _close_unwanted(opening: Future[RowStream]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
