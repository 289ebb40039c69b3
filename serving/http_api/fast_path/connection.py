"""One HTTP connection with bounds on what a client may take: time, bytes of head, company.

uvicorn alone waits for ever for the rest of a head or a body, keeps what a client does not read, and takes any number
of connections. Both ways to an answer, fast path and ASGI, pass through here. No timer belongs to a request: all
connections are looked at twice a second.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.bodies.byte_budget import ByteBudget
from serving.bulk.formats import bulk_format
from serving.errors import InvalidRequest
from serving.http_api.answer import error_body
from serving.http_api.bulk_route import CONNECTION, StreamedAnswer
from serving.http_api.fast_path.parsed_head import rooted
from serving.http_api.fast_path.state import FastPathState
from serving.linux.tcp import close_or_reset, half_close, reset
from serving.prediction.request_id import request_id
from serving.protocols.headers import header

LINGER_S = 2.0
"""Seconds in which a client that was refused may still send, so that it reads the refusal and not a reset."""
SPARE = 32
"""Connections beyond the cap that are taken to answer the paths below, and as many more to say no in words."""
ALWAYS = frozenset({b"/v2/health/live", b"/v2/health/ready", b"/metrics"})
"""What is answered even where connections have run out."""
_HOST = re.compile(rb"[^\s/@?#\\<>\"]*")
_FEW_PIECES = 4096
_SMALL_PIECE = 16
_LARGEST_OVERHEAD = 64 * 1024

log = logging.getLogger("serving.connection")

FAILED = (500, "failed", "the server failed on this request; its log has the reason")
SLOW_HEAD = (408, "slow_head", "the request's head did not arrive in time")
SLOW_BODY = (408, "slow_body", "the request's body did not arrive in time, or came too slowly")
MALFORMED = (400, "malformed", "this is not HTTP as RFC 9112 has it")
HOST = (400, "malformed", "an HTTP/1.1 request has exactly one Host header, with a name and maybe a port")
CODING = (400, "malformed", "Transfer-Encoding is not offered but for chunked, over HTTP/1.1")
LARGE_HEAD = (431, "large_head", "the request's head is too large")
CUT_SHORT = (400, "cut_short", "the client ended the connection before its request was whole")
TINY_CHUNKS = (400, "tiny_chunks", "the chunks of the body are too small, or carry too much beside data: send larger")
CROWDED = (503, "crowded", "this server has all the connections that it takes: come back later")


class Connection(HttpToolsProtocol):
    """One connection. `shared` is set on the subclass that is made for a worker."""

    shared: FastPathState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.since = 0.0  # when the head, the body or the pause began that lasts now; monotonic seconds
        self._midway = False  # the parser is inside a request
        self._in_head = False
        self._begun = 0  # requests
        self._head_bytes = 0  # of a head that did not come at once
        self._received = 0  # bytes of the body
        self._pieces = 0  # that it came in
        self._overhead = 0  # bytes of its coding
        self._unparsed = 0  # bytes of it that do not go through the parser
        self._write_by = 0.0  # when the client must have read what is written; 0: nothing waits
        self._unread = 0  # bytes written that the client has not taken
        self._waiting = 0  # bytes of answers that are counted
        self._spare = False
        self.stream: StreamedAnswer | None = None  # which is made while the body is read
        self._seen = 0  # bytes of its body when `since` was set
        self._over = False  # refused: what still comes is thrown away until then
        self._fault = MALFORMED
        self._refusal: tuple[int, str, str] | None = None  # waits behind an answer that is owed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        shared = self.shared
        crowded = len(shared.taken) >= shared.timeouts.connections and not shared.make_room()
        super().connection_made(transport)
        self.since = shared.now
        if not crowded:
            shared.taken.add(self)
            return
        self._spare = True
        others = len(self.connections) - len(shared.taken)
        if others > 2 * SPARE:
            self._over = True
            self.give_way()
        elif others > SPARE:
            self.refuse(CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self.shared.taken.discard(self)
        self._count_waiting(none=True)
        super().connection_lost(exc)

    def give_way(self) -> None:
        """End at once, without a word, for others to have the place."""
        self.shared.taken.discard(self)
        self.connections.discard(self)
        self.shared.cut[CROWDED[1]] += 1
        self.transport.abort()

    def is_quiet(self) -> bool:
        """Tell whether nothing is owed to the client: it is idle, or has not sent a whole request."""
        return self._is_idle() or (self._midway and self._unanswered())

    def _is_idle(self) -> bool:
        """Tell whether no request is in progress, read or answered."""
        return not self._midway and not self.pipeline and (self.cycle is None or self.cycle.response_complete)

    def _unanswered(self) -> bool:
        """Tell whether the request that is being read is the only one, and nothing of its answer is written."""
        if self._in_head:
            return not self.pipeline and (self.cycle is None or self.cycle.response_complete)
        return not self.pipeline and (self.cycle is None or not self.cycle.response_started)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if self._over:
            return
        midway, reading = self._midway, self._midway and not self._in_head
        begun, received = self._begun, self.body_bytes()
        try:
            self._feed(data)
        except httptools.HttpParserCallbackError as error:
            if not self._in_head and self._fault is MALFORMED:
                # Behind the head nothing that a client sends makes our own functions raise.
                log.error("a request could not be taken", exc_info=error.__context__)
                self._fault = FAILED
            self.refuse(self._fault)
            return
        except (httptools.HttpParserError, ValueError):
            self.refuse(self._fault)
            return
        if not self._midway or self._over:
            return
        if self._in_head:
            # Where in a packet a head begins that follows another request is not known: it counts from the next on.
            if self._begun - begun <= (not midway):
                self._head_bytes += len(data)
            if self._head_bytes > self.shared.timeouts.head_bytes:
                self.refuse(LARGE_HEAD)
        elif reading and self._begun == begun:
            self._overhead += len(data) - (self.body_bytes() - received)
            if self._overhead > _LARGEST_OVERHEAD + self.body_bytes():
                self.refuse(TINY_CHUNKS)

    def _feed(self, data: bytes) -> None:
        """Give the parser all of `data`: it stops behind each wish to speak another protocol, and none is granted."""
        while True:
            if self._unparsed:
                body, data = data[: self._unparsed], data[self._unparsed :]
                self._unparsed -= len(body)
                self.on_body(body)
                if not self._unparsed:
                    self.on_message_complete()
                if not data:
                    return
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                if self.parser.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("CONNECT") from None
                data = data[stopped.args[0] :]
                if not data:
                    return

    def on_message_begin(self) -> None:  # noqa: D102
        self.begin_head()
        super().on_message_begin()

    def begin_head(self) -> None:
        """Note that a request begins."""
        self._begun += 1
        self._head_bytes = 0
        self._midway = self._in_head = True
        self.stream = None
        self.since = self.shared.now

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: D102
        if not self._in_head:
            return  # a trailer: what it says was not asked for, and must not pass for a header
        super().on_header(name, value)

    def on_headers_complete(self) -> None:  # noqa: D102
        if not self.url.startswith(b"/"):
            self.url = rooted(self.url)
        self.judge_head()
        if bulk_format(header(self.headers, b"content-type") or b"") is not None:
            self.scope[CONNECTION] = self  # type: ignore[literal-required]
        super().on_headers_complete()
        self._in_head = False
        if self._spare:
            self.cycle.keep_alive = False

    def judge_head(self) -> None:
        """Judge a head by what only all of it tells. Raises ValueError, which the parser turns into its own error."""
        self.since = self.shared.now
        self._received = self._seen = self._pieces = self._overhead = 0
        if self._spare and self.url.partition(b"?")[0] not in ALWAYS:
            self._wrong(CROWDED)
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.shared.timeouts.head_bytes:
            self._wrong(LARGE_HEAD)
        version = self.parser.get_http_version()
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) != 1 and (hosts or version == "1.1"):
            self._wrong(HOST)
        if hosts and not _HOST.fullmatch(hosts[0]):
            self._wrong(HOST)
        coding = header(self.headers, b"transfer-encoding")
        if coding is not None and (version != "1.1" or coding.lower() != b"chunked"):
            self._wrong(CODING)  # a length that a proxy before us may have read in another way
        if version not in ("1.1", "1.0") or (coding is not None and self.parser.should_upgrade()):
            self._wrong(MALFORMED)
        if self.parser.should_upgrade():
            # The parser takes what follows for another protocol; it is the body, as Java's client sends it.
            self._unparsed = int(header(self.headers, b"content-length") or b"0")

    def _wrong(self, fault: tuple[int, str, str]) -> None:
        self._fault = fault
        raise ValueError(fault[1])

    def on_body(self, body: bytes) -> None:  # noqa: D102
        self._received += len(body)
        self._pieces += 1
        # Each piece costs a call: a million of one byte would hold the event loop for a second.
        if self._pieces > _FEW_PIECES and self._received < self._pieces * _SMALL_PIECE:
            self._wrong(TINY_CHUNKS)
        super().on_body(body)

    def on_message_complete(self) -> None:  # noqa: D102
        if self._unparsed:
            return
        self._midway = False
        self.since = self.shared.now
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start what waits behind the answer; as uvicorn does, but for its timer."""
        self.server_state.total_requests += 1
        self.note_answer()
        if self.transport.is_closing():
            return
        if not self.pipeline and self.cycle is not None and getattr(self.cycle, "waiting_for_100_continue", False):
            # Told no before it was told to go on, a client may leave its body out: what comes next can't be known.
            self.transport.close()
            return
        if not self.flow.write_paused:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._refusal is not None:
            self.say_refusal(self._refusal)

    def look(self, now: float) -> None:
        """Cut the connection if its client takes too long; `now` in monotonic seconds."""
        timeouts, transport = self.shared.timeouts, self.transport
        unread = self.waiting_bytes()
        self._count_waiting()
        if not unread:
            self._write_by = 0.0
        elif not self._write_by:
            self._write_by = now + timeouts.write_s
        elif unread < self._unread:  # a byte now and then is not worth all of the time again
            self._write_by = min(now + timeouts.write_s, self._write_by + (self._unread - unread) / timeouts.min_rate)
        elif now > self._write_by:
            self._abort("slow_reader")
            return
        self._unread = unread
        if self._over:
            if self._refusal is None and now > self.since + LINGER_S:
                close_or_reset(transport)
        elif transport.is_closing():
            return
        elif self._midway:
            self._look_midway(now - self.since)
        # Who connects has to send a head: the pause before the first one is as short as a head's time.
        elif now > self.since + (timeouts.idle_s if self._begun else timeouts.head_s) and self._is_idle():
            close_or_reset(transport)

    def _look_midway(self, seconds: float) -> None:
        timeouts = self.shared.timeouts
        if self.flow.read_paused:
            self.since = self.shared.now  # it is this side that does not read
        elif self._in_head:
            if seconds > timeouts.head_s:
                self.refuse(SLOW_HEAD)
        elif self.stream is not None:
            if not self.stream.hungry or self._received - self._seen >= timeouts.min_rate * seconds:
                self.since, self._seen = self.shared.now, self._received
            elif seconds > timeouts.body_s:
                self._abort("slow_body")
        elif not self._unanswered():
            if seconds > timeouts.head_s:  # it has its answer, and does not stop to send what was not wanted
                self._abort("unwanted_body")
        else:
            size = self.body_bytes()
            late = seconds > timeouts.body_s and size <= timeouts.body_bytes
            if late or seconds > timeouts.head_s + size / timeouts.min_rate:
                self.refuse(SLOW_BODY)

    def body_bytes(self) -> int:
        """Return how much of the body that is being read has come."""
        return self._received

    def note_answer(self) -> None:
        """Note that an answer is written: the client has taken most of those before it."""
        self.since = self.shared.now
        self._write_by = 0.0
        if self._waiting:
            self._count_waiting()

    def waiting_bytes(self) -> int:
        """Return how much of answers the client has not taken: what is written, and the rest of what is being sent."""
        cycle = self.cycle
        rest = cycle.expected_content_length if cycle is not None and not cycle.response_complete else 0
        return self.transport.get_write_buffer_size() + rest

    def _count_waiting(self, *, none: bool = False) -> None:
        """Count answers that wait among the bytes that the process holds; small ones are free, as bodies are."""
        waiting = 0 if none else self.waiting_bytes()
        if waiting <= ByteBudget.FREE:
            waiting = 0
        self.shared.bodies.held += waiting - self._waiting
        self._waiting = waiting

    def pause_writing(self) -> None:  # noqa: D102
        super().pause_writing()
        self._count_waiting()

    def resume_writing(self) -> None:  # noqa: D102
        super().resume_writing()
        self._count_waiting()

    def shutdown(self) -> None:
        """Finish what was accepted, then close."""
        if not self._over:
            super().shutdown()
        elif self._refusal is None:
            self.transport.close()

    def _abort(self, reason: str) -> None:
        self.shared.cut[reason] += 1
        reset(self.transport)

    def refuse(self, fault: tuple[int, str, str]) -> None:
        """Answer a request that can't be read, where its turn has come, and end the connection."""
        self.shared.cut[fault[1]] += 1
        self.shared.taken.discard(self)
        self._over = True
        self.since = self.shared.now
        if self.transport.is_closing():
            return
        if self.is_quiet():
            self.say_refusal(fault)
        elif self._in_head or not self._midway:
            self._refusal = fault  # what came before it is answered first
        elif self.pipeline:
            self.pipeline.popleft()  # the last in line, without all of its body: it must not begin
            self._refusal = fault
        else:
            self.transport.close()  # its own answer has begun

    def say_refusal(self, fault: tuple[int, str, str]) -> None:
        """Write the answer to what can't be read, and nothing behind it."""
        status, _, text = fault
        self._refusal = None
        body = error_body(InvalidRequest(text))
        lines = [b"%b: %b\r\n" % pair for pair in self.server_state.default_headers]
        identity = request_id(header(self.headers if self._midway else (), b"x-request-id"))
        lines.append(b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body))
        lines.append(b"x-request-id: %b\r\nconnection: close\r\n\r\n" % identity)
        self.transport.write(b"".join([STATUS_LINE[status], *lines, body]))
        self.break_off()

    def break_off(self) -> None:
        """End the connection behind what is written; amid an answer no client takes that for whole."""
        self.shared.taken.discard(self)
        self._over = True
        self.since = self.shared.now
        # Closing at once would reset the connection under what the client still sends, and with it the answer.
        half_close(self.transport)
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
