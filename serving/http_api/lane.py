"""The short path: uvicorn's own HTTP protocol, which answers plain predictions from the parsed bytes.

A request is plain where its path is a known prediction path, it is a POST over HTTP/1.1 that keeps its connection,
and its body has a Content-Length under the limit and no coding. Everything else goes to uvicorn's own path, untouched:
the same functions decode and encode there, so the answers are the same bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.http_api.answer import HeaderList, Headers, request_id
from serving.http_api.prediction import Call, Target
from serving.metrics import RouteMetrics

# A header that asks for more than the lane does.
_UNUSUAL = frozenset(
    {
        b"transfer-encoding",
        b"expect",
        b"content-encoding",
        b"upgrade",
        b"origin",
        b"inference-header-content-length",
    }
)
_MOST_PIPELINED = 32
_MOST_HEADS = 1024
_LONGEST_HEAD = 1024


@dataclass(slots=True, frozen=True)
class Known:
    """What the parser read from the head of a plain request: parsing costs more than all else that the lane does."""

    url: bytes
    headers: Headers
    length: int


@dataclass(slots=True)
class Door:
    """What all lane connections of one worker share."""

    paths: dict[bytes, Target]
    """Raw request target to prediction target; replaced entry by entry as models come and go."""
    max_body_bytes: int
    routes: dict[str, RouteMetrics] = field(default_factory=dict)
    """Counters by route template; empty where metrics are off."""
    idle_s: float = 5.0
    now: float = field(default_factory=time.monotonic)
    """A coarse clock, moved by `sweep`, so that an answer needs no timer of its own."""
    defaults: list[tuple[bytes, bytes]] = field(default_factory=list)
    heads: dict[int, bytes] = field(default_factory=dict)
    known: dict[bytes, Known] = field(default_factory=dict)

    def remember(self, data: bytes, url: bytes, headers: Headers, length: int) -> None:
        """Keep the head of a plain request if `data` is all of it: the same bytes will mean the same again."""
        end = data.find(b"\r\n\r\n") + 4
        if len(data) - end != length or end > _LONGEST_HEAD:
            return
        if len(self.known) >= _MOST_HEADS:
            self.known.clear()
        self.known[data[:end]] = Known(url, headers, length)

    def sweep(self, connections: Any) -> None:
        """Close connections that have been idle too long; to be called about once a second."""
        self.now = time.monotonic()
        for connection in list(connections):
            if isinstance(connection, Lane):
                connection.close_if_idle(self.now - self.idle_s)

    def head(self, status: int, defaults: list[tuple[bytes, bytes]]) -> bytes:
        """Return the status line and uvicorn's own headers; the list is a new one each second, for the date."""
        if defaults is not self.defaults:
            self.defaults = defaults
            self.heads.clear()
        made = self.heads.get(status)
        if made is None:
            lines = b"".join([b"%b: %b\r\n" % pair for pair in defaults])
            made = self.heads[status] = STATUS_LINE[status] + lines + b"content-type: application/json\r\n"
        return made


class _Turn(Call):
    """One plain request on a connection; its answer is written when its turn has come."""

    __slots__ = ("answer", "id", "lane", "route")

    def __init__(self, lane: Lane, identity: bytes, route: RouteMetrics | None) -> None:
        self.lane = lane
        self.id = identity
        self.route = route
        self.answer: tuple[int, HeaderList, bytes] | None = None
        if route is not None:
            route.in_flight += 1

    def finish(self, status: int, headers: HeaderList, body: bytes) -> None:
        if self.route is not None:
            self.count(status)
        self.answer = (status, headers, body)
        self.lane.write_answers()

    def count(self, status: int) -> None:
        if self.route is not None:
            self.route.in_flight -= 1
            self.route.finished(status, time.monotonic() - self.began)


class _Busy:
    """Stands for the answers that the lane still owes, so that uvicorn queues what comes behind them."""

    response_complete = False


class Lane(HttpToolsProtocol):
    """One connection. `door` is set on the subclass that `lane_for` makes."""

    door: Door

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turns: deque[_Turn] = deque()
        self._target: Target | None = None  # of the plain request that is being read
        self._body: bytes | bytearray = b""
        self._id: bytes | None = None
        self._closing = False
        self._midway = False  # the parser is inside a request
        self._chunk = b""
        self._idle_since = self.door.now

    def data_received(self, data: bytes) -> None:
        """Answer at once where the head is one that was judged plain before; else let the parser look."""
        if not self._midway and not self.pipeline and (self.cycle is None or self.cycle.response_complete):
            end = data.find(b"\r\n\r\n") + 4
            known = self.door.known.get(data[:end])
            if known is not None and len(data) - end == known.length:
                target = self.door.paths.get(known.url)
                if target is not None:
                    self._unset_keepalive_if_required()
                    self._id = None
                    self._begin(target, known.headers, data[end:])
                    return
        self._chunk = data
        super().data_received(data)
        self._chunk = b""

    def on_message_begin(self) -> None:  # noqa: D102
        self._midway = True
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._target = None

    def on_headers_complete(self) -> None:  # noqa: D102
        target = self.door.paths.get(self.url)
        if target is not None and self._plain():
            self._target = target
            self._body = b""
            return
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        if self._turns:
            self.cycle = _Busy()  # type: ignore[assignment]
        super().on_headers_complete()

    def _plain(self) -> bool:
        """Tell whether the lane may answer, from the method, the headers and what the connection is doing."""
        if self.pipeline or not (self.cycle is None or self.cycle.response_complete):
            return False
        parser = self.parser
        if parser.get_method() != b"POST" or parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return False
        length = None
        self._id = None
        for name, value in self.headers:
            if name in _UNUSUAL:
                return False
            if name == b"content-length":
                length = value
            elif name == b"x-request-id":
                self._id = value
        return length is not None and length.isdigit() and int(length) <= self.door.max_body_bytes

    def on_body(self, body: bytes) -> None:  # noqa: D102
        if self._target is None:
            super().on_body(body)
        elif not self._body:
            self._body = body
        else:
            if not isinstance(self._body, bytearray):
                self._body = bytearray(self._body)
            self._body += body

    def on_message_complete(self) -> None:  # noqa: D102
        self._midway = False
        target = self._target
        if target is None:
            super().on_message_complete()
            return
        self._target = None
        body, self._body = self._body, b""
        if self._id is None:
            self.door.remember(self._chunk, self.url, self.headers, len(body))
        self._begin(target, self.headers, body)

    def _begin(self, target: Target, headers: Headers, body: bytes | bytearray) -> None:
        turn = _Turn(self, request_id(self._id), self.door.routes.get(target.template))
        self._turns.append(turn)
        if len(self._turns) >= _MOST_PIPELINED:
            self.flow.pause_reading()
        turn.start(target, headers, body)

    def write_answers(self) -> None:
        """Write every answer whose turn has come, in the order of the requests."""
        turns = self._turns
        while turns and (answer := turns[0].answer) is not None:
            turn = turns.popleft()
            status, extra, body = answer
            last = self._closing and not turns and self._target is None
            if not self.transport.is_closing():
                self.transport.write(self._head(status, extra, len(body), turn.id, last) + body)
            self.server_state.total_requests += 1
        if turns:
            return
        self._idle_since = self.door.now
        if self._closing and self._target is None:
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()  # what uvicorn queued behind us may start
        elif self.flow.read_paused and not self.flow.write_paused:
            self.flow.resume_reading()

    def _head(self, status: int, extra: HeaderList, length: int, identity: bytes, last: bool) -> bytes:
        head = self.door.head(status, self.server_state.default_headers)
        if not extra and not last:
            return b"%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n" % (head, length, identity)
        more = b"".join([b"%b: %b\r\n" % pair for pair in extra])
        close = b"connection: close\r\n" if last else b""
        return b"%bcontent-length: %d\r\n%bx-request-id: %b\r\n%b\r\n" % (head, length, more, identity, close)

    def pause_writing(self) -> None:
        """Read no more requests from a client that does not read its answers."""
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:  # noqa: D102
        super().resume_writing()
        if not self.pipeline and not self._turns:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        super().connection_lost(exc)
        turns, self._turns = self._turns, deque()
        for turn in turns:
            if turn.answer is None:
                turn.cancel()
                turn.count(499)

    def shutdown(self) -> None:
        """Finish what was accepted, then close."""
        self._closing = True
        if not self._turns and self._target is None:
            super().shutdown()

    def close_if_idle(self, before: float) -> None:
        """Close if no request has been in progress since `before`, monotonic seconds."""
        if self._turns or self._target is not None or self._idle_since > before:
            return
        busy = self.cycle is not None and not self.cycle.response_complete
        if not busy and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.transport.close()


def lane_for(door: Door) -> type[asyncio.Protocol]:
    """Make the protocol class for one worker; uvicorn takes a class, and a class can't take arguments."""
    return type("Lane", (Lane,), {"door": door})
