"""The reading half of an HTTP/2 connection: frames from the socket's bytes, header blocks, and flow control.

Source: RFC 9113. It takes no priorities and pushes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from serving.grpc_api.control import Controlled
from serving.grpc_api.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    HEADERS,
    LARGEST_WINDOW,
    PADDED,
    PREFACE,
    PRIORITIZED,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RST_STREAM,
    SMALL_FRAME,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Broken,
    frame,
    number,
    unpack_frame,
)
from serving.grpc_api.guard import Guard
from serving.grpc_api.hpack import MOST_BYTES, Decoder, Pairs
from serving.grpc_api.sending import STREAM_WINDOW, Stream

CONNECTION_WINDOW = 16 * 1024 * 1024
MOST_STREAMS = 1024
"""Calls in progress on one connection; further ones are refused, and clients wait or open another."""
FRAME_BYTES = 1024 * 1024
"""Largest frame of DATA that is taken: large ones cost fewer steps than the 16 KiB that HTTP/2 starts with."""
_TINY = 16
"""A frame of DATA below it, with more to come, brings nothing: it costs as much as a large one."""
_KNOWN_BYTES = 8 * 1024
"""Of header blocks that a connection remembers."""


class Head(Protocol):
    """What the headers of a request mean; made once for headers that come again and again."""

    def open(self, connection: Reading, identity: int) -> Stream:
        """Begin a stream of them."""


class Endpoint(Protocol):
    """What the connections of one server share."""

    in_progress: int
    """Streams that are open, on all connections together."""
    guard: Guard

    def gone(self) -> None:
        """Take note that a connection has ended."""

    def head(self, headers: Pairs) -> Head:
        """Read the headers of a request. Raises Broken where they can't be HTTP/2."""


class Reading(Controlled):
    """What a connection needs to be asked. `over`: it was told to end, and what still comes is thrown away."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.guard)
        self.endpoint = endpoint
        self.over = False
        self.prefaced = False
        self._window = CONNECTION_WINDOW
        self._most_idle = self.guard.patience.frames
        self._rest = b""
        self._half = 0.0  # since when `_rest` begins with the same frame
        self._left = 0  # bytes of a DATA frame that are still to come, and of the padding behind them
        self._padding = 0
        self._reading: Stream | None = None
        self._ends = False
        self._decoder = Decoder()
        self._known: dict[bytes, Head] = {}
        self._known_at = 0
        self._known_bytes = 0
        # Stream, flags and what there is of a block in several frames.
        self._block: tuple[int, int, bytes] | None = None
        self._block_since = 0.0

    @abstractmethod
    def end(self, code: int, reason: str = "") -> None:
        """Say why, and take no more."""

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
        while not self.over:
            if self._left or self._padding:
                place = self._more(data, place, end)
                if self._left or self._padding:
                    return
            if end - place < 9:
                break
            high, low, kind, flags, identity = unpack_frame(data, place)
            length = high << 8 | low
            identity &= LARGEST_WINDOW
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
            if length > SMALL_FRAME:
                raise Broken(FRAME_SIZE_ERROR, "a frame is too large")
            if end - place - 9 < length:
                break
            payload = data[place + 9 : place + 9 + length]
            place += 9 + length
            if kind == WINDOW_UPDATE:  # the most frequent: clients send two with each call
                self.idle_frames += 1
                if self.idle_frames > self._most_idle:
                    self.tire(kind)
                if not identity or identity in self.streams or identity > self.last or length != 4:
                    self._grow(identity, payload)
            elif kind == HEADERS:
                self._headers(identity, flags, payload)
            elif kind == CONTINUATION:
                self._continued(identity, flags, payload)
            else:
                self._control(kind, flags, identity, payload)
        if place < end and not self.over:
            if place or not self._half:
                self._half = self.guard.now
            self._rest = data[place:]
        else:
            self._half = 0.0

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
        ends = bool(flags & END_STREAM)
        if self._left < _TINY and not ends:
            self.tire(DATA)
        self._begin(identity, length, ends)
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
            self._block_since = self.guard.now

    def _opened(self, identity: int, flags: int, block: bytes) -> None:
        """Take a whole block of headers: of a new stream, or the trailers of one that is open."""
        head: Head | None = None
        if identity > self.last:
            head = self._known.get(block)
            if head is None or self._known_at != self._decoder.changes:
                head = self._judge(block)
            self.last = identity
            if self.draining or len(self.streams) >= MOST_STREAMS:
                self.tire(HEADERS)
                self.transport.write(frame(RST_STREAM, 0, identity, number(REFUSED_STREAM)))
                return
            stream = head.open(self, identity)
            if not self.over:
                self.streams[identity] = stream
                self.endpoint.in_progress += 1
        else:
            self._decoder.decode(block)
            found = self.streams.get(identity)
            if found is None:
                self.tire(HEADERS)
                return  # answered or reset already; what was on its way then is of no interest
            if found.ended or not flags & END_STREAM:
                raise Broken(PROTOCOL_ERROR, "headers in the middle of a stream")
            stream = found
        if flags & END_STREAM:
            stream.ended = True
            stream.complete()

    def _judge(self, block: bytes) -> Head:
        """Read a block, and keep what it means for as long as the same bytes mean the same."""
        if not self.settled:
            raise Broken(PROTOCOL_ERROR, "a connection begins with settings")
        before = self._decoder.changes
        head = self.endpoint.head(self._decoder.decode(block))
        self._known_bytes += len(block)
        if self._known_at != self._decoder.changes or self._known_bytes > _KNOWN_BYTES:
            self._known.clear()
            self._known_at = self._decoder.changes
            self._known_bytes = len(block)
        if before == self._decoder.changes and len(block) <= _KNOWN_BYTES // 4:
            self._known[block] = head
        return head

    def _continued(self, identity: int, flags: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != identity:
            raise Broken(PROTOCOL_ERROR, "a continuation of nothing")
        first, begun = self._block[1], self._block[2] + payload
        if len(begun) > MOST_BYTES:
            raise Broken(ENHANCE_YOUR_CALM, "the headers are too large", "large_head")
        if len(payload) < _TINY and not flags & END_HEADERS:
            self.tire(CONTINUATION)
        self._block = None if flags & END_HEADERS else (identity, first, begun)
        if flags & END_HEADERS:
            self._opened(identity, first, begun)
