"""HTTP/2 as a gRPC server needs it: frames, flow control and the streams of one connection, from the socket's bytes.

grpcio's own server hands each call from its threads to Python, which costs more than all else that a small prediction
needs: `make bench` has the figures of both. Source: RFC 9113. It takes no priorities and pushes nothing.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from typing import Any, Protocol

from serving.grpc_api.hpack import MOST_BYTES, BadBlock, Decoder, Pairs

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 5, 6, 7, 8, 9, 11

STREAM_WINDOW = 1024 * 1024
CONNECTION_WINDOW = 16 * 1024 * 1024
MOST_STREAMS = 1024
"""Calls in progress on one connection; further ones are refused, and clients wait or open another."""
FRAME_BYTES = 1024 * 1024
"""Largest frame of DATA that is taken: large ones cost fewer steps than the 16 KiB that HTTP/2 starts with."""
BURST_BYTES = 512 * 1024
"""Bytes after which the loop turns: else the socket is read until it is empty, 8 MB in one go."""
_SMALL_FRAME = 16384
_LARGEST_WINDOW = 2**31 - 1
_MOST_RESETS = 1000
_MOST_BLOCKS = 64

_unpack_frame = struct.Struct(">HBBBI").unpack_from
_unpack_setting = struct.Struct(">HI").iter_unpack
_pack = struct.Struct(">HBBBI").pack


class Broken(Exception):
    """The peer broke the protocol; the connection ends with `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Write a frame."""
    return _pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def number(value: int) -> bytes:
    """Write four bytes, as windows, codes and stream ids are."""
    return value.to_bytes(4, "big")


class Stream:
    """One stream, of which the owner's kind derives; `window` and `room` are bytes that may come and go."""

    __slots__ = ("connection", "ended", "id", "out", "room", "window")

    def __init__(self, connection: Connection, identity: int) -> None:
        self.connection = connection
        self.id = identity
        self.window = STREAM_WINDOW
        self.room = connection.first_room
        self.ended = False
        self.out: deque[bytes | memoryview] | None = None
        """Payload that waits for room; the last item is the block of trailers. None: nothing waits."""

    def received(self, piece: bytes | memoryview) -> None:
        """Take a piece of the request; only valid now."""
        raise NotImplementedError

    def complete(self) -> None:
        """The client has sent all that it will."""
        raise NotImplementedError

    def left(self) -> None:
        """The client has left, or the connection has gone: nothing can be sent any more."""
        raise NotImplementedError

    def full(self) -> bool:
        """Tell whether no more should be sent to this stream for now; `Connection.refill` says that it may again."""
        return False

    def emptied(self) -> None:
        """All that waited to be sent is sent."""


class Head(Protocol):
    """What the headers of a request mean; made once for headers that come again and again."""

    def open(self, connection: Connection, identity: int) -> Stream:
        """Begin a stream of them."""


class Endpoint(Protocol):
    """What the connections of one server share."""

    in_progress: int
    """Streams that are open, on all connections together."""

    def made(self, connection: Connection) -> None:
        """Take note of a new connection."""

    def gone(self, connection: Connection) -> None:
        """Take note of one that has ended."""

    def head(self, headers: Pairs) -> Head:
        """Read the headers of a request. Raises Broken where they can't be HTTP/2."""


class Connection(asyncio.Protocol):
    """One connection, from its preface to its end. All of it runs on the event loop."""

    transport: asyncio.Transport

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.streams: dict[int, Stream] = {}
        self.last = 0
        self.room = 65535
        self.first_room = 65535
        self.largest = _SMALL_FRAME
        self.draining = False
        self.prefaced = False
        self._window = CONNECTION_WINDOW
        self._rest = b""
        self._left = 0  # bytes of a DATA frame that are still to come, and of the padding behind them
        self._padding = 0
        self._reading: Stream | None = None
        self._ends = False
        self._decoder = Decoder()
        self._known: dict[bytes, Head] = {}
        self._known_at = 0
        self._block: tuple[int, int, bytes] | None = (
            None  # stream, flags and what there is of a block in several frames
        )
        self._resets = 0
        self._burst = 0
        self._paused = False  # the client does not read its answers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        self.transport = transport
        self.endpoint.made(self)
        settings = b"".join(
            struct.pack(">HI", key, value)
            for key, value in ((3, MOST_STREAMS), (4, STREAM_WINDOW), (5, FRAME_BYTES), (6, MOST_BYTES))
        )
        grown = frame(WINDOW_UPDATE, 0, 0, number(CONNECTION_WINDOW - 65535))
        transport.write(frame(SETTINGS, 0, 0, settings) + grown)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self.endpoint.gone(self)
        streams, self.streams = self.streams, {}
        self.endpoint.in_progress -= len(streams)
        for stream in streams.values():
            stream.left()

    def pause_writing(self) -> None:
        """Read nothing from a client that does not read its answers."""
        self._paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:  # noqa: D102
        self._paused = False
        self.transport.resume_reading()

    def _read_on(self) -> None:
        if not self._paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._burst += len(data)
        if self._burst > BURST_BYTES:
            self._burst = 0
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)
        if self._rest:
            data = self._rest + data
            self._rest = b""
        try:
            self._read(data)
        except Broken as broken:
            self.end(broken.code, str(broken))
        except BadBlock as broken:
            self.end(COMPRESSION_ERROR, str(broken))

    def end(self, code: int, reason: str = "") -> None:
        """Say why, and close."""
        if not self.transport.is_closing():
            self.transport.write(frame(GOAWAY, 0, 0, number(self.last) + number(code) + reason.encode()))
            self.transport.close()

    def drain(self) -> None:
        """Take no more streams; close once those in progress are done."""
        self.draining = True
        if not self.streams:
            self.end(NO_ERROR)
        else:
            self.transport.write(frame(GOAWAY, 0, 0, number(self.last) + number(NO_ERROR)))

    # Reading

    def _read(self, data: bytes) -> None:  # noqa: PLR0912  one turn a frame
        place, end = 0, len(data)
        if not self.prefaced:
            if end < len(PREFACE) and PREFACE.startswith(data):
                self._rest = data
                return
            if not data.startswith(PREFACE):
                raise Broken(PROTOCOL_ERROR, "this port speaks HTTP/2 without TLS, for gRPC")
            self.prefaced = True
            place = len(PREFACE)
        while not self.transport.is_closing():
            if self._left or self._padding:
                place = self._more(data, place, end)
                if self._left or self._padding:
                    return
            if end - place < 9:
                break
            high, low, kind, flags, identity = _unpack_frame(data, place)
            length = high << 8 | low
            identity &= _LARGEST_WINDOW
            if self._block is not None and kind != CONTINUATION:
                raise Broken(PROTOCOL_ERROR, "a block of headers was not finished")
            if kind == DATA:
                start = self._data(data, place + 9, end, length, flags, identity)
                if start < 0:
                    break
                place = start
                if self._left or self._padding:
                    return
                continue
            if length > _SMALL_FRAME:
                raise Broken(FRAME_SIZE_ERROR, "a frame is too large")
            if end - place - 9 < length:
                break
            payload = data[place + 9 : place + 9 + length]
            place += 9 + length
            if kind == HEADERS:
                self._headers(identity, flags, payload)
            else:
                self._control(kind, flags, identity, payload)
        if not self.transport.is_closing():
            self._rest = data[place:]

    def _data(  # noqa: PLR0917  where the frame lies, and what its head says
        self, data: bytes, start: int, end: int, length: int, flags: int, identity: int
    ) -> int:
        """Begin a DATA frame and read what is here of it; return the place behind, or -1 where too little is here."""
        if length > FRAME_BYTES:
            raise Broken(FRAME_SIZE_ERROR, "a frame is too large")
        self._left = length
        if flags & PADDED:
            if start == end:
                self._left = 0
                return -1
            self._padding = data[start]
            if length <= self._padding:
                raise Broken(PROTOCOL_ERROR, "padding is longer than its frame")
            self._left = length - self._padding - 1
            start += 1
        self._begin(identity, length, bool(flags & END_STREAM))
        return self._more(data, start, end)

    def _begin(self, identity: int, length: int, ends: bool) -> None:
        """Account for a DATA frame, and find whose it is (None: of a stream that has ended)."""
        if identity == 0 or identity > self.last or not identity & 1:
            raise Broken(PROTOCOL_ERROR, "data for a stream that was not opened")
        self._window -= length
        if self._window < 0:
            raise Broken(FLOW_CONTROL_ERROR, "more data than the connection's window holds")
        if self._window < CONNECTION_WINDOW // 2:
            self.transport.write(frame(WINDOW_UPDATE, 0, 0, number(CONNECTION_WINDOW - self._window)))
            self._window = CONNECTION_WINDOW
        stream = self._reading = self.streams.get(identity)
        self._ends = ends
        if stream is None:
            return
        if stream.ended:
            self.reset(stream, STREAM_CLOSED)
            stream.left()
            self._reading = None
            return
        stream.window -= length
        if stream.window < 0:
            raise Broken(FLOW_CONTROL_ERROR, "more data than the stream's window holds")

    def _more(self, data: bytes, place: int, end: int) -> int:
        """Hand on what is here of the DATA frame that is being read; return the place behind it."""
        left, stream = self._left, self._reading
        if left:
            taken = min(left, end - place)
            if taken and stream is not None:
                stream.received(
                    data[place : place + taken] if taken < 65536 else memoryview(data)[place : place + taken]
                )
            place += taken
            self._left = left = left - taken
        if not left:
            if self._padding:
                skipped = min(self._padding, end - place)
                self._padding -= skipped
                place += skipped
            if not self._padding and stream is not None and stream.id in self.streams:
                self._reading = None
                if self._ends:
                    stream.ended = True
                    stream.complete()
                elif stream.window < STREAM_WINDOW // 2:
                    self.refill(stream)
        return place

    def refill(self, stream: Stream) -> None:
        """Let a stream's client send on, unless the stream has enough for now."""
        if not stream.full() and not stream.ended and stream.id in self.streams:
            grown = STREAM_WINDOW - stream.window
            if grown > 0:
                stream.window = STREAM_WINDOW
                self.transport.write(frame(WINDOW_UPDATE, 0, stream.id, number(grown)))

    def _headers(self, identity: int, flags: int, payload: bytes) -> None:
        if identity == 0 or not identity & 1:
            raise Broken(PROTOCOL_ERROR, "headers on a stream that a client can't open")
        if flags & (PADDED | PRIORITIZED):
            padding = 0
            if flags & PADDED:
                padding, payload = (payload[0], payload[1:]) if payload else (1, b"")
            if flags & PRIORITIZED:
                if len(payload) < 5:
                    raise Broken(FRAME_SIZE_ERROR, "a priority is cut short")
                payload = payload[5:]
            if padding > len(payload):
                raise Broken(PROTOCOL_ERROR, "padding is longer than its frame")
            payload = payload[: len(payload) - padding]
        if flags & END_HEADERS:
            self._opened(identity, flags, payload)
        else:
            self._block = identity, flags, payload

    def _opened(self, identity: int, flags: int, block: bytes) -> None:
        """Take a whole block of headers: of a new stream, or the trailers of one that is open."""
        head: Head | None = None
        if identity > self.last:
            head = self._known.get(block)
            if head is None or self._known_at != self._decoder.changes:
                head = self._judge(block)
            self.last = identity
            if self.draining or len(self.streams) >= MOST_STREAMS:
                self.transport.write(frame(RST_STREAM, 0, identity, number(REFUSED_STREAM)))
                return
            stream = head.open(self, identity)
            if not self.transport.is_closing():
                self.streams[identity] = stream
                self.endpoint.in_progress += 1
        else:
            self._decoder.decode(block)
            found = self.streams.get(identity)
            if found is None:
                return  # answered or reset already; what was on its way then is of no interest
            if found.ended or not flags & END_STREAM:
                raise Broken(PROTOCOL_ERROR, "headers in the middle of a stream")
            stream = found
        if flags & END_STREAM:
            stream.ended = True
            stream.complete()

    def _judge(self, block: bytes) -> Head:
        """Read a block, and keep what it means for as long as the same bytes mean the same."""
        before = self._decoder.changes
        head = self.endpoint.head(self._decoder.decode(block))
        if self._known_at != self._decoder.changes or len(self._known) >= _MOST_BLOCKS:
            self._known.clear()
            self._known_at = self._decoder.changes
        if before == self._decoder.changes:
            self._known[block] = head
        return head

    def _control(self, kind: int, flags: int, identity: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE:
            self._grow(identity, payload)
        elif kind == PING:
            if len(payload) != 8 or identity:
                raise Broken(FRAME_SIZE_ERROR, "a ping has 8 bytes and no stream")
            if not flags & ACK:
                self.transport.write(frame(PING, ACK, 0, payload))
        elif kind == SETTINGS:
            self._settings(flags, identity, payload)
        elif kind == RST_STREAM:
            self._left_stream(identity, payload)
        elif kind == CONTINUATION:
            self._continued(identity, flags, payload)
        elif kind == PUSH_PROMISE:
            raise Broken(PROTOCOL_ERROR, "clients push nothing")

    def _left_stream(self, identity: int, payload: bytes) -> None:
        if len(payload) != 4 or identity == 0 or identity > self.last:
            raise Broken(PROTOCOL_ERROR, "a reset of no stream")
        stream = self.streams.pop(identity, None)
        if stream is not None:
            # Opening and resetting costs a client nothing, and us a request each.
            self._resets += 1
            stream.left()
            self._done()
            if self._resets > _MOST_RESETS:
                raise Broken(ENHANCE_YOUR_CALM, "too many streams were reset")

    def _continued(self, identity: int, flags: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != identity:
            raise Broken(PROTOCOL_ERROR, "a continuation of nothing")
        first, begun = self._block[1], self._block[2] + payload
        if len(begun) > MOST_BYTES or not payload:
            raise Broken(ENHANCE_YOUR_CALM, "the headers are too large")
        self._block = None if flags & END_HEADERS else (identity, first, begun)
        if flags & END_HEADERS:
            self._opened(identity, first, begun)

    def _grow(self, identity: int, payload: bytes) -> None:
        grown = int.from_bytes(payload, "big") & _LARGEST_WINDOW
        if len(payload) != 4 or identity > self.last:
            raise Broken(PROTOCOL_ERROR, "a window of no stream")
        if identity == 0:
            self.room += grown
            if not grown or self.room > _LARGEST_WINDOW:
                raise Broken(FLOW_CONTROL_ERROR, "a window that grows by nothing, or too far")
            for each in [s for s in self.streams.values() if s.out is not None]:
                self._pump(each)
            return
        stream = self.streams.get(identity)
        if stream is not None:
            stream.room += grown
            if not grown or stream.room > _LARGEST_WINDOW:
                self.reset(stream, FLOW_CONTROL_ERROR)
                stream.left()
            elif stream.out is not None:
                self._pump(stream)

    def _settings(self, flags: int, identity: int, payload: bytes) -> None:
        if identity or len(payload) % 6 or (flags & ACK and payload):
            raise Broken(FRAME_SIZE_ERROR, "settings that are none")
        if flags & ACK:
            return
        for key, value in _unpack_setting(payload):
            if key == 4:
                if value > _LARGEST_WINDOW:
                    raise Broken(FLOW_CONTROL_ERROR, "a window that is too large")
                for stream in self.streams.values():
                    stream.room += value - self.first_room
                self.first_room = value
            elif key == 5:
                if not _SMALL_FRAME <= value < 2**24:
                    raise Broken(PROTOCOL_ERROR, "a frame size that is none")
                self.largest = value
        self.transport.write(frame(SETTINGS, ACK, 0))
        for stream in [s for s in self.streams.values() if s.out is not None]:
            self._pump(stream)

    # Writing

    def answer(self, stream: Stream, frames: bytes, size: int) -> None:
        """Write all of an answer, whose DATA holds `size` bytes. Only where `fits` said so."""
        self.room -= size
        self.transport.write(frames)
        self.close(stream)

    def fits(self, stream: Stream, size: int) -> bool:
        """Tell whether `size` bytes of payload may go in one frame, now."""
        return stream.out is None and size <= self.room and size <= stream.room and size <= self.largest

    def send(self, stream: Stream, payload: bytes | memoryview) -> None:
        """Send payload, as far as the client has room; the rest follows when it has more."""
        if stream.out is None:
            stream.out = deque()
        stream.out.append(payload)
        self._pump(stream)

    def finish(self, stream: Stream, trailers: bytes) -> None:
        """End a stream with a block of trailers, behind what waits."""
        if stream.out:
            stream.out.append(b"")
            stream.out.append(trailers)
        else:
            self._trail(stream, trailers)

    def _trail(self, stream: Stream, trailers: bytes) -> None:
        if stream.id in self.streams:
            self.transport.write(frame(HEADERS, END_HEADERS | END_STREAM, stream.id, trailers))
            self.close(stream)

    def close(self, stream: Stream) -> None:
        """Forget a stream whose answer is complete."""
        if self.streams.pop(stream.id, None) is None:
            return
        if self._resets:
            self._resets -= 1
        if not stream.ended:
            # We have answered before all was sent: the client may stop.
            self.transport.write(frame(RST_STREAM, 0, stream.id, number(NO_ERROR)))
        self._done()

    def _done(self) -> None:
        """Take note that a stream has ended."""
        self.endpoint.in_progress -= 1
        if self.draining and not self.streams:
            self.end(NO_ERROR)

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream with an error of HTTP/2."""
        if self.streams.pop(stream.id, None) is not None:
            self.transport.write(frame(RST_STREAM, 0, stream.id, number(code)))
            self._done()

    def _pump(self, stream: Stream) -> None:
        out: deque[Any] | None = stream.out
        while out:
            payload = out[0]
            if not len(payload):  # what follows are the trailers
                stream.out = None
                self._trail(stream, out[1])
                return
            size = min(len(payload), self.room, stream.room, self.largest)
            if size <= 0:
                return
            self.room -= size
            stream.room -= size
            self.transport.writelines(
                [_pack(size >> 8, size & 0xFF, DATA, 0, stream.id), payload if size == len(payload) else payload[:size]]
            )
            if size == len(payload):
                out.popleft()
            else:
                out[0] = memoryview(payload)[size:]
        stream.out = None
        stream.emptied()
