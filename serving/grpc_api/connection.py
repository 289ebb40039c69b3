"""One gRPC connection: between asyncio's transport, HTTP/2, and the calls; with bounds on what a client may take.

No timer belongs to a call or a connection: all are looked at together, a few times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from serving.grpc_api.call import Call
from serving.grpc_api.connection_reaper import IDLE_FRAMES
from serving.grpc_api.head import TOO_LARGE, Head
from serving.http2.connection import Connection as Http2
from serving.http2.events import DataReceived, RequestReceived, StreamReset
from serving.http2.frames import ErrorCode, ResponseTemplate
from serving.http2.hpack import literal
from serving.http2.limits import Limits
from serving.linux.tcp import close_or_reset, half_close, reset
from serving.prediction.direct import DirectPrediction
from serving.prediction.socket_loan import SocketLoan

if TYPE_CHECKING:
    from serving.grpc_api.server import GrpcServer

MOST_CALLS = 8192
"""Calls in progress in one worker; further ones are told RESOURCE_EXHAUSTED."""
LINGER_S = 1.0
"""Seconds in which a client that was told to go may still send, so that it reads why and not a reset."""
_GOODBYE_S = 1.0
"""Seconds that a client has to read that it is to begin no more calls: those that it begins until then are taken."""
BURST_BYTES = 512 * 1024
"""Bytes after which the loop turns: else the socket is read until it is empty, 8 MB in one go."""
PIECE_BYTES = 256 * 1024
"""Bytes of answers after which the loop turns, or the client's kernel takes megabytes at once."""
_JOINED_BYTES = 64 * 1024
MOST_LENT_BYTES = 8 * 1024
"""Of an answer that a model's thread may write itself: the windows are reserved for so much."""
_MOST_LENT_PAYLOAD = MOST_LENT_BYTES + 5  # with what stands before a message
CROWDED = "this server has all the connections that it takes: come back later"


class Connection(asyncio.Protocol):
    """One connection. All of it runs on the event loop.

    since: when it came, or had its last call; monotonic seconds.
    """

    transport: asyncio.Transport

    def __init__(self, server: GrpcServer) -> None:
        self.server = server
        self.reaper = server.reaper
        self.calls: dict[int, Call] = {}
        self.http2 = Http2(server.head, Limits(idle_frames=IDLE_FRAMES))
        self.since = self.reaper.now
        self._soon = asyncio.get_running_loop().call_soon
        self._most_calls = MOST_CALLS
        self._burst = 0
        self._paused = False  # the client does not read: the kernel would take more than a little at once when it does
        self._flushing = self._half_closed = False
        self._unfinished = 0  # the frame that was not whole when it was last looked at, and since when
        self._unfinished_since = 0.0
        self._write_by = 0.0  # when the client must have read what is written; 0: nothing waits
        self._unread = 0  # bytes written that the client has not taken
        self._descriptor = -1  # of the socket, where bytes may go there as they are
        self._lent: DirectPrediction | None = None  # whose thread may write to the socket now
        self._refuse_by = 0.0  # when no more calls are taken, if the client does not say sooner that it knows

    @property
    def is_busy(self) -> bool:
        """Whether no more calls begin here, but for health."""
        return self.server.in_progress > self._most_calls

    # What asyncio tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        self.transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and transport.get_extra_info("sslcontext") is None:
            self._descriptor = sock.fileno()
        room = self.reaper.room()
        self.reaper.connections.add(self)
        if room > 0:
            if room <= self.reaper.spare:
                self._most_calls = 0
            self._flush()
        else:
            # Without the settings: clients take a connection that was never made for a reason to wait.
            self.http2.output(0)
            self._cut("crowded", ErrorCode.ENHANCE_YOUR_CALM, CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._recover()  # the socket is closed when this returns: no thread may be writing to it then
        self.reaper.connections.discard(self)
        self.http2.close(ErrorCode.NO_ERROR)
        self._leave()
        self.server.gone()

    def pause_writing(self) -> None:
        """Read nothing from a client that does not read its answers."""
        self._paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:  # noqa: D102
        self._paused = False
        self._write_by = 0.0  # the client has read some
        self.transport.resume_reading()
        self._flush_soon()

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._burst += len(data)
        if self._burst > BURST_BYTES:
            self._burst = 0
            self.transport.pause_reading()
            self._soon(self._read_on)
        calls = self.calls
        for event in self.http2.receive(data):
            if isinstance(event, DataReceived):
                call = calls.get(event.stream_id)
                if call is not None:
                    call.on_data(event.data, event.end_stream)
            elif isinstance(event, RequestReceived):
                self._begin(event)
            elif isinstance(event, StreamReset):
                call = calls.get(event.stream_id)
                if call is not None:
                    self._forget(call)
                    call.on_reset()
            else:
                self.reaper.cut[event.error.cause] += 1
                self._ended()
                return
        if self.http2.draining and not calls:
            self.end(ErrorCode.NO_ERROR)
        self._flush()

    def _read_on(self) -> None:
        if not self._paused and not self.transport.is_closing():
            self.transport.resume_reading()

    # Calls

    def _begin(self, event: RequestReceived[Head]) -> None:
        head = event.request if event.request is not None else TOO_LARGE
        if head.http_status != 200:
            allow = literal(b"allow", b"POST") if head.http_status == 405 else b""
            self.http2.send_trailers(event.stream_id, literal(b":status", b"%d" % head.http_status) + allow)
            return
        call = self.calls[event.stream_id] = Call(self, event.stream_id, head)
        self.server.in_progress += 1
        call.begin()
        if event.end_stream:
            call.on_data(b"", True)

    def _forget(self, call: Call) -> None:
        if self.calls.pop(call.id, None) is None:
            return
        self.server.ended(call)
        if not self.calls:
            self.since = self.reaper.now
            if self.http2.draining:
                self.end(ErrorCode.NO_ERROR)

    def _leave(self) -> None:
        calls, self.calls = self.calls, {}
        for call in calls.values():
            self.server.ended(call)
            call.on_reset()

    def respond(self, call: Call, template: ResponseTemplate, data: bytes) -> bool:
        """Send a whole answer where there is room for it now; return whether it was sent."""
        if not self.http2.respond(call.id, template, data):
            return False
        self._forget(call)
        self._flush_soon()
        return True

    def send(self, call: Call, parts: list[bytes | memoryview]) -> bool:
        """Send payload as far as the client has room; return whether some of it waits for more."""
        self.http2.send_data(call.id, parts)
        self._flush()
        return self.http2.waits(call.id) is not None

    def finish(self, call: Call, trailers: bytes, *, discard: bool = False) -> None:
        """End a call with a block of trailers, behind what waits or instead of it."""
        self.http2.send_trailers(call.id, trailers, discard=discard)
        self._flush_soon()
        if call.id not in self.http2.streams:
            self._forget(call)

    def replenish(self, call: Call) -> None:
        """Let a call's client send on."""
        self.http2.replenish(call.id)
        self._flush_soon()

    # Writing by a model's thread

    def lend(self, call: Call, prediction: DirectPrediction) -> SocketLoan | None:
        """Lend the socket for the whole answer of a call, where nothing waits to be written, and room for it."""
        if (
            self._lent is not None
            or self._descriptor < 0
            or self._paused
            or self.transport.get_write_buffer_size()
            or self.transport.is_closing()
            or not self.http2.reserve(call.id, _MOST_LENT_PAYLOAD)
        ):
            return None
        self._lent = prediction
        return SocketLoan(self._descriptor)

    def recovered(self, call: Call, rest: bytes | None, size: int) -> None:
        """Go on where an answer with `size` bytes of payload is written but for its `rest`; None: it is not."""
        self._lent = None
        if rest is None:
            self.http2.settle(call.id, _MOST_LENT_PAYLOAD, written=False)
            return
        if rest and not self.transport.is_closing():
            self.transport.write(rest)
        self.http2.settle(call.id, _MOST_LENT_PAYLOAD - size, written=True)
        call.code = 0
        self._forget(call)
        if self.http2.has_output:
            self._flush_soon()

    def _recover(self) -> None:
        if self._lent is not None:
            self._lent.recover()

    # Writing

    def _flush_soon(self) -> None:
        """Write when the loop has turned: the answers of a batch come together, and are written together."""
        if not self._flushing:
            self._flushing = True
            self._soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._paused or self._half_closed or not self.http2.has_output:
            return
        for stream_id in self._write(PIECE_BYTES):
            call = self.calls.get(stream_id)
            if call is not None:
                if stream_id not in self.http2.streams:
                    self._forget(call)
                call.on_drained()
        if self.http2.has_output:
            self._flush_soon()

    def _write(self, limit: int) -> list[int]:
        """Write up to `limit` bytes of payload, and all else; return the streams of which no more waits."""
        self._recover()  # the thread may have written half of an answer, and its rest goes before all else
        chunks, drained = self.http2.output(limit)
        if self.transport.is_closing():
            return drained
        if len(chunks) == 1:
            self.transport.write(chunks[0])
        elif sum(map(len, chunks)) <= _JOINED_BYTES:
            self.transport.write(b"".join(chunks))
        else:
            self.transport.writelines(chunks)
        return drained

    # Endings

    def _cut(self, reason: str, code: ErrorCode, text: str) -> None:
        if not self.http2.closed:
            self.reaper.cut[reason] += 1
            self.end(code, text)

    def end(self, code: ErrorCode, reason: str = "") -> None:
        """Say why, and take no more; what is in progress is left."""
        if not self.http2.closed:
            self.http2.close(code, reason)
            self._ended()

    def _ended(self) -> None:
        self.since = self.reaper.now
        self._leave()
        if not self.transport.is_closing():
            self._write(0)
            # Closing at once would reset the connection under what the client still sends, and with it the reason.
            self._half_closed = True  # whatever the client still sends is not answered: a ping, a setting
            with contextlib.suppress(OSError):  # the client has gone already
                half_close(self.transport)

    def drain(self) -> None:
        """Ask for no more calls; close once those in progress, or under way, are done."""
        if not self._refuse_by:
            self._refuse_by = self.reaper.now + _GOODBYE_S
            self.http2.drain()
            self._flush_soon()

    def cut_short(self) -> None:
        """End what is in progress with UNAVAILABLE, and take no more."""
        for call in list(self.calls.values()):
            call.cut_short()
        self.end(ErrorCode.NO_ERROR)

    def is_quiet(self) -> bool:
        """Tell whether nothing is owed to the client."""
        return not self.transport.get_write_buffer_size() and all(call.is_quiet() for call in self.calls.values())

    def make_room(self) -> None:
        """Go at once, for others."""
        self._cut("crowded", ErrorCode.NO_ERROR, CROWDED)
        self.transport.close()

    # Time

    def enforce_timeouts(self, now: float) -> None:
        """Cut the connection if its client takes too long; `now` in monotonic seconds."""
        timeouts = self.reaper.timeouts
        if self._is_unread(now):
            self.reaper.cut["slow_reader"] += 1
            reset(self.transport)
            return
        unfinished = self.http2.unfinished
        if unfinished != self._unfinished:
            self._unfinished, self._unfinished_since = unfinished, now
        if self.http2.closed:
            if not self._unread and now > self.since + LINGER_S:
                close_or_reset(self.transport)
        elif not self.http2.settled:
            if now > self.since + timeouts.head_s:
                self._cut("slow_head", ErrorCode.PROTOCOL_ERROR, "the preface and the settings did not arrive in time")
        elif unfinished and now > self._unfinished_since + timeouts.head_s and not self._paused:
            self._cut("slow_head", ErrorCode.PROTOCOL_ERROR, "a frame, or a call's headers, did not arrive in time")
        elif self.calls:
            for call in list(self.calls.values()):
                self._look_at(call, now)
        elif now > self.since + timeouts.idle_s:
            self.drain()
        if self._refuse_by and now > self._refuse_by and not self.http2.draining:
            self.http2.refuse_streams()
            if not self.calls:
                self.end(ErrorCode.NO_ERROR)
            self._flush_soon()

    def _is_unread(self, now: float) -> bool:
        """Tell whether what was written has waited too long for the client to take it."""
        timeouts, unread = self.reaper.timeouts, self.transport.get_write_buffer_size()
        before, self._unread = self._unread, unread
        if not unread:
            self._write_by = 0.0
        elif not self._write_by:
            self._write_by = now + timeouts.write_s
        elif unread < before:
            self._write_by = min(now + timeouts.write_s, self._write_by + (before - unread) / timeouts.min_rate)
        return bool(unread) and now > self._write_by

    def _look_at(self, call: Call, now: float) -> None:
        """Reset a call whose client gives no room for its answer, and end one that takes too long."""
        timeouts = self.reaper.timeouts
        sent = self.http2.waits(call.id)
        if sent is None:
            call.write_by = 0.0
        elif not call.write_by:
            call.write_by, call.sent = now + timeouts.write_s, sent
        else:
            # Who takes an answer a byte at a time gains no more than that byte's time.
            call.write_by = min(now + timeouts.write_s, call.write_by + (sent - call.sent) / timeouts.min_rate)
            call.sent = sent
            if now > call.write_by:
                self.reaper.cut["slow_reader"] += 1
                self.http2.reset(call.id, ErrorCode.CANCEL)
                self._flush_soon()
                self._forget(call)
                call.on_reset()
                return
        call.enforce_timeouts(now)
