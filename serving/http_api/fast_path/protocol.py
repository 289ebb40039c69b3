"""The short path: uvicorn's own HTTP protocol, which answers plain predictions from the parsed bytes.

A request is plain where its path is a known prediction path, it is a POST over HTTP/1.1 that keeps its connection,
and its body has a Content-Length under the limit and no coding. Everything else goes to uvicorn's own path, untouched:
the same functions decode and encode there, so the answers are the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.bodies.buffer import OWN_PAGES_FROM, BodyBuffer
from serving.bodies.byte_budget import ByteBudget
from serving.errors import ServingError
from serving.http_api.fast_path.connection import CUT_SHORT, Connection
from serving.http_api.fast_path.parsed_head import ParsedHead, parsed_head, plain_head
from serving.http_api.fast_path.pipelining import Busy, Flow, adapt
from serving.http_api.fast_path.prediction import FastPathPrediction
from serving.http_api.fast_path.state import FastPathState
from serving.linux.tcp import close_idle, has_left
from serving.prediction.authorization import authorize
from serving.prediction.endpoint import Endpoint
from serving.prediction.request_id import request_id
from serving.prediction.request_options import DEFAULTS, RequestOptions
from serving.prediction.socket_loan import SocketLoan
from serving.protocols.codec import Blobs
from serving.protocols.headers import HeaderList, Headers
from serving.tensor_bytes import Buffer

BURST_BYTES = 128 * 1024
"""Bytes of a body after which the loop turns: else the socket is read until it is empty, 8 MB in one go."""
_LEFT_S = 0.05
"""Seconds from the end of what a client says to the question whether it has left, and then between looks."""
LINGER_S = 0.5
"""Seconds that an idle connection stays open when draining, to tell a client that is just writing that it ends."""


class FastPath(Connection):
    """One connection and the short path on it.

    At most one plain request is in progress; what a client sends behind it waits in uvicorn's line, in order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prediction: FastPathPrediction | None = None  # the plain request that is being answered
        self._endpoint: Endpoint | None = None  # of the plain request that is being read
        self._body: bytes | bytearray | BodyBuffer = b""
        self._length = 0
        self._descriptor = -1  # of the socket, where bytes may go there as they are
        self._binary = False  # raw tensors stand behind the JSON
        self._burst = 0
        self._id: bytes | None = None
        self._closing = False  # what was asked for is answered, and nothing more read
        self._asked = False  # whether the client is still there, since it says no more
        self._chunk = b""  # what the parser is given, where a request begins with its first byte
        self._known: ParsedHead | None = None  # of the last plain request
        self._options = DEFAULTS
        self._held = 0  # bytes of its body that are counted
        self._last = False  # the answer that is being written ends the connection
        self._rest: Iterator[bytes | memoryview] | None = None  # of a large answer that is being written
        self._rest_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        sock = transport.get_extra_info("socket")
        if sock is not None and transport.get_extra_info("sslcontext") is None:
            self._descriptor = sock.fileno()

    def data_received(self, data: bytes) -> None:
        """Answer at once where the head is the one before; else let the parser look.

        That head is known to this connection alone: what one caller sends decides nothing about another's.
        """
        if self._prediction is not None:
            self._prediction.recover_if_written()
        known = self._known
        if known is not None and not self._midway and (again := known.same(data)) is not None and self._free():
            endpoint = self.shared.paths.get(known.url)
            if endpoint is not None and len(again[1]) <= endpoint.max_text_bytes:
                self._id = None
                self._begin(endpoint, *again, known.options)
                return
        self._chunk = b"" if self._midway else data
        super().data_received(data)
        self._chunk = b""

    def _free(self) -> bool:
        """Tell whether no answer is owed on this connection."""
        return (
            self._prediction is None
            and self._rest is None
            and not self.pipeline
            and (self.cycle is None or self.cycle.response_complete)
        )

    def _owes(self) -> bool:
        """Tell whether a plain request has not its whole answer yet."""
        return self._prediction is not None or self._rest is not None

    def _is_idle(self) -> bool:
        return not self._owes() and super()._is_idle()

    def _unanswered(self) -> bool:
        return self._endpoint is not None or (not self._owes() and super()._unanswered())

    def body_bytes(self) -> int:  # noqa: D102
        return super().body_bytes() if self._endpoint is None else len(self._body)

    def on_message_begin(self) -> None:  # noqa: D102
        self.begin_head()
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._endpoint = None

    def on_headers_complete(self) -> None:  # noqa: D102
        endpoint = self.shared.paths.get(self.url)
        if endpoint is not None and self._plain(endpoint) and self._welcome(endpoint):
            self.judge_head()
            self._in_head = False
            self._endpoint = endpoint
            if self._length > ByteBudget.FREE:
                self.shared.bodies.hold(self._length)
                self._held = self._length
            self._body = b""
            return
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        HttpToolsProtocol.on_message_begin(self)  # makes the scope
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        if self._owes() and not self.pipeline:
            self.cycle = Busy()  # type: ignore[assignment]
        super().on_headers_complete()
        if self.cycle is not None:
            adapt(self.cycle, self.transport)
        if self._closing and not self.pipeline:
            self.cycle.keep_alive = False  # uvicorn then says `connection: close`

    def _plain(self, endpoint: Endpoint) -> bool:
        """Tell whether the fast path may answer, from the method, the headers and what the connection is doing."""
        parser = self.parser
        if not self._free() or parser.get_method() != b"POST":
            return False
        if parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return False
        head = plain_head(self.headers)
        if head is None:
            return False
        self._length, self._id, self._binary, self._options = head
        # What is too much to hold is refused on the other path.
        most = endpoint.max_body_bytes if self._binary and endpoint.codec.raw_tensors else endpoint.max_text_bytes
        return self._length <= most and (self._length <= ByteBudget.FREE or self.shared.bodies.fits(self._length))

    def _welcome(self, endpoint: Endpoint) -> bool:
        """Tell whether a body from this caller is worth reading; uvicorn's way refuses the others before theirs."""
        try:
            if endpoint.access is not None:
                authorize(endpoint.access, self.headers, "predict", endpoint.model.limits.callers)
        except ServingError:
            return False
        return True

    def on_body(self, body: bytes) -> None:  # noqa: D102
        if self._endpoint is None:
            super().on_body(body)
            return
        self._burst += len(body)
        if self._burst > BURST_BYTES:
            self._burst = 0
            self.flow.pause_reading()
            self.loop.call_soon(self._read_on)
        gathered = self._body
        if isinstance(gathered, BodyBuffer):
            gathered.add(body)
        elif isinstance(gathered, bytearray):
            gathered += body
        elif len(body) == self._length:
            self._body = body
        elif self._binary or self._length >= OWN_PAGES_FROM:
            self._body = BodyBuffer(self._length)
            self._body.add(body)
        else:
            self._body = bytearray(body)

    def _read_on(self) -> None:
        if not self.flow.write_paused and not self.transport.is_closing():
            self.flow.resume_reading()

    def on_message_complete(self) -> None:  # noqa: D102
        chunk, self._chunk = self._chunk, b""  # what follows in it does not begin with its first byte
        endpoint = self._endpoint
        if endpoint is None:
            super().on_message_complete()
            return
        self._midway = False
        self._endpoint = None
        body, self._body = self._body, b""
        if self._id is None and chunk:
            self._known = parsed_head(chunk, self.url, self.headers, len(body), self._options)
        self._begin(endpoint, self.headers, body.received() if isinstance(body, BodyBuffer) else body, self._options)

    def _begin(self, endpoint: Endpoint, headers: Headers, body: Buffer, options: RequestOptions) -> None:
        route = self.shared.routes.get(endpoint.route)
        prediction = self._prediction = FastPathPrediction(self, request_id(self._id), route)
        prediction.start(endpoint, headers, body, options)

    def refuse(self, fault: tuple[int, str, str]) -> None:
        """Let go of what was read of a body that will not be read to its end."""
        self._known = None  # what follows is thrown away, known or not
        super().refuse(fault)
        if self._endpoint is not None:
            self._endpoint = None
            self._body = b""
            self._release()

    def write_answer(self, identity: bytes, status: int, headers: HeaderList, body: bytes | Blobs, kind: bytes) -> None:
        """Write the answer to the request in progress, and let what waits behind it begin."""
        self._prediction = None
        if self._held:
            self._release()
        if self.transport.is_closing():
            return
        last = self._closing and self._is_last()
        head = self.shared.head(status, kind, self.server_state.default_headers)
        if last:
            headers = [*headers, (b"connection", b"close")]
        if headers:
            head += b"".join([b"%b: %b\r\n" % pair for pair in headers])
        if isinstance(body, bytes):
            self.transport.write(
                b"%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n%b" % (head, len(body), identity, body)
            )
            self._end_answer(last)
        else:
            self.transport.write(b"%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n" % (head, body.size, identity))
            self._rest, self._rest_bytes = body.pieces(), body.size
            self._write_on(last)

    def _is_last(self) -> bool:
        """Tell whether nothing behind an answer is owed any more, where nothing more is read."""
        return not self.pipeline and not self._midway

    def lend(self) -> SocketLoan | None:
        """Lend the socket where nothing waits to be written, and nothing but the answer to this request is owed."""
        if (
            self._descriptor < 0
            or self._closing
            or self.pipeline
            or self.transport.get_write_buffer_size()
            or self.transport.is_closing()
        ):
            return None
        return SocketLoan(self._descriptor)

    def heads(self) -> dict[tuple[int, bytes], bytes]:
        """Return the heads of answers: see `FastPathState.heads`."""
        return self.shared.heads(self.server_state.default_headers)

    def end_answer(self, rest: bytes) -> None:
        """Go on behind an answer that a thread wrote, but for its `rest`."""
        self._prediction = None
        if self._held:
            self._release()
        if self.transport.is_closing():
            return
        if rest:
            self.transport.write(rest)
        self._end_answer(self._closing and self._is_last())

    def _write_on(self, last: bool) -> None:
        """Write the next piece of a large answer; the loop turns between them, or the kernel took megabytes at once."""
        if self._rest is None or self.transport.is_closing():
            self._rest = None
        elif self.flow.write_paused:
            self._last = last  # until the client has read some
        elif (piece := next(self._rest, None)) is not None:
            self._rest_bytes -= len(piece)
            self.transport.write(piece)
            self.loop.call_soon(self._write_on, last)
        else:
            self._rest = None
            self._end_answer(last or (self._closing and self._is_last()))

    def _end_answer(self, last: bool) -> None:
        self.note_answer()
        if last:
            self.server_state.total_requests += 1
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()  # counts, and starts what uvicorn queued behind us
        else:
            self.server_state.total_requests += 1
            if self._refusal is not None:
                self.say_refusal(self._refusal)

    def _release(self) -> None:
        """Count the bytes of the body out of what the process holds."""
        self.shared.bodies.held -= self._held
        self._held = 0

    def on_response_complete(self) -> None:  # noqa: D102
        super().on_response_complete()
        if self._closing and self._free() and not self._midway:
            self.transport.close()

    def waiting_bytes(self) -> int:  # noqa: D102
        return super().waiting_bytes() + (self._rest_bytes if self._rest is not None else 0)

    def pause_writing(self) -> None:
        """Read no more requests from a client that does not read its answers."""
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:  # noqa: D102
        super().resume_writing()
        self.flow.resume_reading()
        if self._rest is not None:
            self._write_on(self._last)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        prediction = self._prediction
        # The socket is closed when this returns: no thread may be writing to it then.
        if prediction is not None and not prediction.recover():
            prediction.cancel()
            prediction.count(499)
        self._prediction = self._rest = None
        super().connection_lost(exc)
        self._release()

    def eof_received(self) -> bool:  # type: ignore[override]  # as asyncio has it
        """Answer a client that says no more, if it has asked for something; `printf ... | nc` does so."""
        if self._prediction is not None:
            self._prediction.recover()  # its answer is to say that it is the last
        if self._over or self._is_idle() or (self._midway and self._unanswered()):
            return False  # the transport closes itself
        if self.transport.get_extra_info("sslcontext") is not None:
            return False  # over TLS there is no saying no more, only leaving
        if self._midway:
            self.refuse(CUT_SHORT)
            return True
        self._closing = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        self.loop.call_later(_LEFT_S, self._look_for_client)
        return True

    def _look_for_client(self) -> None:
        """Tell one that only says no more from one that has left, whose rows need not be run.

        Both look the same until something is written: what has left answers that with a reset. An interim answer
        may come at any time (RFC 9110, 15.2), but not in the middle of another, nor to HTTP/1.0.
        """
        cycle = self.cycle
        if self.transport.is_closing() or self._free() or self._rest is not None:
            return
        if self._prediction is None and (cycle.response_started or cycle.scope["http_version"] != "1.1"):
            return
        if not self._asked:
            self._asked = True
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif has_left(self.transport):
            self.transport.abort()
            return
        self.loop.call_later(_LEFT_S, self._look_for_client)

    def shutdown(self) -> None:
        """Finish what was accepted, then close; a request that is on its way to us still gets its answer.

        Closing at once what is idle this very moment would reset a client that has just sent its next request.
        """
        if self._prediction is not None:
            self._prediction.recover()  # its answer is to say that it is the last
        self._closing = True
        if self._over:
            super().shutdown()
            return
        if self.cycle is not None and not self.cycle.response_complete and not self.pipeline:
            self.cycle.keep_alive = False
        # Timers come before sockets in a turn of the loop: after a turn that took long, look at the socket once more.
        self.loop.call_later(LINGER_S, self.loop.call_later, 0.01, self._close_lingering)

    def _close_lingering(self) -> None:
        if self._free() and not self._midway:
            close_idle(self.transport)


def fast_path_for(shared: FastPathState) -> type[asyncio.Protocol]:
    """Make the protocol class for one worker; uvicorn takes a class, and a class can't take arguments."""
    return type("FastPath", (FastPath,), {"shared": shared})
