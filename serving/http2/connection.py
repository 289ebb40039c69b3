"""One HTTP/2 connection as its server sees it: takes what the socket brings, says what happened and what to write.

Source: RFC 9113. It takes no priorities and pushes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic

from serving.http2 import frames
from serving.http2.events import ConnectionEnded, DataReceived, Event, R, RequestReceived, StreamReset
from serving.http2.frame_reader import CONTINUED, MAX_BLOCK_BYTES, FrameReader
from serving.http2.frames import ACK, END_HEADERS, END_STREAM, ErrorCode, ProtocolError, Setting, frame, uint32
from serving.http2.hpack import TABLE_BYTES, Headers, HeadersTooLarge
from serving.http2.idle_frames import IdleFrames
from serving.http2.limits import Limits
from serving.http2.outbox import Outbox
from serving.http2.request_reader import MalformedMessage, RequestReader
from serving.http2.streams import Stream, Streams

_TINY_BYTES = 16
"""A DATA or CONTINUATION frame below it, with more to come, brings nothing: it costs as much as a large one."""
_DRAIN_PING = b"draining"


class Connection(Generic[R]):
    """Give `receive` what the socket brings, and write what `output` gives whenever `has_output`.

    read_request: what a request's headers mean; called once for a block of headers that comes again and again.
    """

    def __init__(self, read_request: Callable[[Headers], R], limits: Limits) -> None:
        self._limits = limits
        self.streams = Streams()
        self.closed = False
        """Whether the last GOAWAY is in the output; what still comes is thrown away."""
        self.draining = False
        self.settled = False
        """Whether the peer's first settings have come."""
        self.idle = IdleFrames(limits.idle_frames)
        self._frames = FrameReader(limits.max_frame_size)
        self._requests = RequestReader(read_request)
        self._outbox = Outbox()
        self._events: list[Event[R]] = []
        self._window = limits.connection_window
        self._promised = frames.LARGEST_WINDOW  # the stream id of the last GOAWAY, which no later one may exceed
        # The header block that is read: stream, flags, what there is of it, and the number of its first frame.
        self._block: tuple[int, int, bytes, int] | None = None
        self._prefix = b""  # of the next header block that is sent
        self._handlers = (
            self._on_data,
            self._on_headers,
            self._on_priority,
            self._on_reset,
            self._on_settings,
            self._on_push_promise,
            self._on_ping,
            self._on_goaway,
            self._on_window_update,
            self._on_continuation,
        )
        self._write(limits.greeting())

    def receive(self, data: bytes) -> list[Event[R]]:
        """Take what the socket brought; return what happened."""
        if self.closed:
            return []
        events = self._events = []
        try:
            for kind, flags, stream_id, payload, flow_length in self._frames.feed(data):
                if self._block is not None and kind != frames.CONTINUATION:
                    raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a block of headers was not finished")
                if kind <= frames.CONTINUATION:
                    self._handlers[kind](flags, stream_id, payload, flow_length)  # type: ignore[arg-type]
                else:
                    self.idle.add()
        except ProtocolError as error:
            self.close(error.code, str(error))
            events.append(ConnectionEnded(error))
        return events

    @property
    def unfinished(self) -> int:
        """A number that stays while the same frame, or block of headers, has begun and is not whole; else 0."""
        return self._block[3] if self._block is not None else self._frames.unfinished

    def _stream_error(self, stream_id: int, code: ErrorCode) -> None:
        """Reset a stream for what its peer did, which counts as if the peer had reset it."""
        if stream_id in self.streams:
            self._events.append(StreamReset(stream_id, code))
        self.reset(stream_id, code)
        self.idle.add()

    # Frames that come

    def _on_data(self, flags: int, stream_id: int, payload: bytes, flow_length: int) -> None:
        stream = self.streams.get(stream_id)
        if flow_length != CONTINUED:
            if flow_length < _TINY_BYTES and not flags & END_STREAM:
                self.idle.add()
            self._window -= flow_length
            if self._window < 0:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window holds")
            # Given back as it comes, for all streams share it: were it held until a call has read its message, one
            # call that is slow to read would stop all others. Each stream's own window is given back by `replenish`.
            whole = self._limits.connection_window
            if self._window < whole // 2:
                self._write(frame(frames.WINDOW_UPDATE, 0, 0, uint32(whole - self._window)))
                self._window = whole
            if stream is None:
                self.streams.check_late(stream_id)
                return
            if stream.remote_ended:
                self._stream_error(stream_id, ErrorCode.STREAM_CLOSED)
                return
            stream.take(flow_length)
        elif stream is None:
            return
        end_stream = bool(flags & END_STREAM)
        if not stream.has_promised(len(payload), end_stream):
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        stream.remote_ended = end_stream
        self._events.append(DataReceived(stream_id, payload, end_stream))

    def _on_headers(self, flags: int, stream_id: int, payload: bytes, _: int) -> None:
        if not stream_id & 1:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "headers on a stream that a client can't open")
        if flags & END_HEADERS:
            self._on_block(stream_id, flags, payload)
        else:
            self._block = stream_id, flags, payload, self._frames.complete

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes, _: int) -> None:
        if self._block is None or self._block[0] != stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a continuation of nothing")
        _, first, begun, number = self._block
        block = begun + payload
        if len(block) > MAX_BLOCK_BYTES:
            raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "the headers are too large", "large_head")
        if flags & END_HEADERS:
            self._block = None
            self._on_block(stream_id, first, block)
            return
        if len(payload) < _TINY_BYTES:
            self.idle.add()
        self._block = stream_id, first, block, number

    def _on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        """Take a whole block of headers: of a new stream, or the trailers of one that is open."""
        if stream_id > self.streams.last:
            self._open(stream_id, bool(flags & END_STREAM), block)
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self.streams.check_late(stream_id)
        try:
            self._requests.read_trailers(block)  # also where nobody wants them: HPACK must stay in step
            complete = bool(flags & END_STREAM) and (stream is None or not stream.body_left)
        except (MalformedMessage, HeadersTooLarge):
            complete = False
        if stream is None:
            self.idle.add()
        elif stream.remote_ended:
            self._stream_error(stream_id, ErrorCode.STREAM_CLOSED)
        elif not complete:
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
        else:
            stream.remote_ended = True
            self._events.append(DataReceived(stream_id, b"", True))

    def _open(self, stream_id: int, end_stream: bool, block: bytes) -> None:
        if not self.settled:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a connection begins with settings")
        self.streams.advance(stream_id)
        length = None
        try:
            request, length = self._requests.read(block)
        except HeadersTooLarge:
            request = None
            self.idle.add(1 + (len(block) >> 10))  # such a block takes as much time as many frames
        except MalformedMessage:
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        if self.draining or len(self.streams) >= self._limits.max_streams:
            self._stream_error(stream_id, ErrorCode.REFUSED_STREAM)
            return
        if end_stream and length:
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        window = self._outbox.initial_window
        self.streams[stream_id] = Stream(stream_id, window, self._limits.stream_window, length, end_stream)
        self.idle.pay()
        self._events.append(RequestReceived(stream_id, request, end_stream))

    def _on_priority(self, _: int, stream_id: int, payload: bytes, __: int) -> None:
        if not stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a priority of no stream")
        if len(payload) != 5:
            self._stream_error(stream_id, ErrorCode.FRAME_SIZE_ERROR)
        else:
            self.idle.add()

    def _on_reset(self, _: int, stream_id: int, payload: bytes, __: int) -> None:
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a reset has 4 bytes")
        if not stream_id & 1 or stream_id > self.streams.last:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a reset of a stream that was not opened")
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._outbox.discard(stream)
            self._events.append(StreamReset(stream_id, int.from_bytes(payload, "big")))
        self.idle.add()

    def _on_settings(self, flags: int, stream_id: int, payload: bytes, _: int) -> None:
        self.idle.add()
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "settings of a stream")
        settings = frames.settings_of(payload, flags)
        if settings is None:
            return
        self.settled = True
        for key, value in settings:
            if key == Setting.HEADER_TABLE_SIZE and value < TABLE_BYTES:
                # The peer waits for a block that says so. Nothing sent from here is in the table: 0 is always right.
                self._prefix = b"\x20"
            elif key == Setting.ENABLE_PUSH and value > 1:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
            else:
                self._outbox.set(key, value, self.streams.values())
        self._write(frame(frames.SETTINGS, ACK, 0))

    def _on_push_promise(self, _: int, __: int, ___: bytes, ____: int) -> None:
        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "clients push nothing")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes, _: int) -> None:
        self.idle.add(ping=True)
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a ping of a stream")
        if len(payload) != 8:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a ping has 8 bytes")
        if not flags & ACK:
            self._write(frame(frames.PING, ACK, 0, payload))
        elif payload == _DRAIN_PING:
            self.refuse_streams()

    def _on_goaway(self, _: int, stream_id: int, __: bytes, ___: int) -> None:
        if stream_id:
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "GOAWAY of a stream")
        self.idle.add()

    def _on_window_update(self, _: int, stream_id: int, payload: bytes, __: int) -> None:
        self.idle.add_window_update()
        if len(payload) != 4:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a window update has 4 bytes")
        grown = int.from_bytes(payload, "big") & frames.LARGEST_WINDOW
        if not stream_id:
            self._outbox.window += grown
            if not grown:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a window that grows by nothing")
            if self._outbox.window > frames.LARGEST_WINDOW:
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "a window that grows too far")
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id > self.streams.last:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a window of a stream that was not opened")
        elif not grown:
            self._stream_error(stream_id, ErrorCode.PROTOCOL_ERROR)
        elif not self._outbox.grow(stream, grown):
            self._stream_error(stream_id, ErrorCode.FLOW_CONTROL_ERROR)

    # Sending

    def _write(self, sent: bytes) -> None:
        self._outbox.frames.append(sent)

    @property
    def has_output(self) -> bool:
        """Tell whether there is something to write."""
        return self._outbox.has_output

    def output(self, limit: int) -> tuple[list[bytes | memoryview], list[int]]:
        """Return what to write, with up to `limit` bytes of queued payload, and the streams whose queue is empty."""
        chunks, drained, progress = self._outbox.take(limit)
        if drained or progress:
            self.idle.credit(progress)
            for stream in drained:
                if stream.trailers is not None:
                    self._end(stream)
            chunks += self._outbox.frames
            self._outbox.frames = []
        return chunks, [stream.id for stream in drained]

    def respond(self, stream_id: int, template: frames.ResponseTemplate, data: bytes) -> bool:
        """Send a whole response where the windows have room for it now; else return False, and nothing is sent."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return True
        outbox = self._outbox
        if self._prefix or not outbox.fits(stream, len(data)):
            return False
        # The stream's own window is not counted down: it ends here.
        outbox.window -= len(data)
        outbox.frames.append(template.render(stream_id, data))
        self._end(stream)
        return True

    def reserve(self, stream_id: int, most: int) -> bool:
        """Keep room for a whole response that another writes, with up to `most` bytes of payload; see `Outbox`."""
        return not self._prefix and stream_id in self.streams and self._outbox.reserve(self.streams[stream_id], most)

    def settle(self, stream_id: int, unused: int, *, written: bool) -> None:
        """Give back what was reserved and is not used; the response is `written`, or still to come."""
        self._outbox.window += unused
        if written and stream_id in self.streams:
            self._end(self.streams[stream_id])

    def send_headers(self, stream_id: int, block: bytes) -> None:
        """Send the headers of a response; `block` as `hpack.literal` writes them."""
        if stream_id in self.streams:
            self._write(frame(frames.HEADERS, END_HEADERS, stream_id, self._prefix + block))
            self._prefix = b""

    def send_data(self, stream_id: int, parts: Sequence[bytes | memoryview]) -> None:
        """Send a part of a response, as the windows allow: what there is no room for waits."""
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._outbox.add(stream, parts)

    def send_trailers(self, stream_id: int, block: bytes, *, discard: bool = False) -> None:
        """End a response behind what waits, or where `discard` instead of it."""
        stream = self.streams.get(stream_id)
        if stream is None:
            return
        if discard:
            self._outbox.discard(stream)
        if stream.queue is not None:
            stream.trailers = frame(frames.HEADERS, END_HEADERS | END_STREAM, stream_id, block)
            return
        self._write(frame(frames.HEADERS, END_HEADERS | END_STREAM, stream_id, self._prefix + block))
        self._prefix = b""
        self._end(stream)

    def _end(self, stream: Stream) -> None:
        """Forget a stream whose response is complete."""
        del self.streams[stream.id]
        self.idle.credit()
        if not stream.remote_ended:  # the response came before the request's end: the peer may stop
            self._write_reset(stream.id, ErrorCode.NO_ERROR)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """End a stream at once, unfinished."""
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self._outbox.discard(stream)
        self._write_reset(stream_id, code)

    def _write_reset(self, stream_id: int, code: ErrorCode) -> None:
        self._write(frame(frames.RST_STREAM, 0, stream_id, uint32(code)))
        self.streams.remember_reset(stream_id)

    def waits(self, stream_id: int) -> int | None:
        """Return how many bytes of a stream's queue went so far; None where nothing waits."""
        stream = self.streams.get(stream_id)
        return stream.sent if stream is not None and stream.queue is not None else None

    def replenish(self, stream_id: int) -> None:
        """Let the peer send on, where half of the stream's window is used."""
        stream = self.streams.get(stream_id)
        whole = self._limits.stream_window
        if stream is not None and not stream.remote_ended and stream.receive_window <= whole // 2:
            self._write(frame(frames.WINDOW_UPDATE, 0, stream_id, uint32(whole - stream.receive_window)))
            stream.receive_window = whole

    def drain(self) -> None:
        """Ask for no more streams; those are taken that come before the peer has read it. RFC 9113, 6.8."""
        if not self.closed:  # an id that refuses nothing: not every client sends again what was refused
            self._write(frames.goaway(frames.LARGEST_WINDOW, ErrorCode.NO_ERROR))
            self._write(frame(frames.PING, 0, 0, _DRAIN_PING))

    def refuse_streams(self) -> None:
        """Take no more streams."""
        if not self.draining and not self.closed:
            self.draining = True
            self._go_away(ErrorCode.NO_ERROR, "")

    def close(self, code: ErrorCode, reason: str = "") -> None:
        """Say why, and take no more; streams that are open end without a word."""
        if not self.closed:
            self.closed = True
            for stream in self.streams.values():
                self._outbox.discard(stream)
            self.streams.clear()
            self._go_away(code, reason)

    def _go_away(self, code: ErrorCode, reason: str) -> None:
        self._promised = min(self._promised, self.streams.last)
        self._write(frames.goaway(self._promised, code, reason))
