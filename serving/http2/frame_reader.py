"""Cuts what follows the preface into frames: DATA in the pieces that come, any other frame once it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from serving.http2.frames import (
    CONTINUATION,
    DATA,
    DEFAULT_FRAME_SIZE,
    END_STREAM,
    GOAWAY,
    HEADERS,
    LARGEST_WINDOW,
    PADDED,
    PREFACE,
    PRIORITIZED,
    ErrorCode,
    ProtocolError,
    unpack_frame,
)

Frame: TypeAlias = tuple[int, int, int, bytes | memoryview, int]
"""Type, flags, stream id, payload, and what counts against the windows: the length of a DATA frame with its padding in
its first piece, CONTINUED in the others; 0 in other frames. Only the last piece of DATA has END_STREAM.
"""
CONTINUED = -1
MAX_BLOCK_BYTES = 64 * 1024
"""Of a header block before it is unpacked: keeping HPACK in step with a longer one would hold the loop."""
_VIEW_BYTES = 64 * 1024
"""Pieces of DATA from this size are not copied."""


class FrameReader:
    """Reads the frames of one connection; `max_frame_size` was offered to the peer."""

    def __init__(self, max_frame_size: int) -> None:
        self._max_frame_size = max_frame_size
        self._preface = PREFACE  # what of it is still to come
        self._rest = b""
        self.complete = 0
        """Frames so far."""
        # Of the DATA frame whose pieces come: its bytes and then its padding that are still due.
        self._data_left = 0
        self._skip = 0
        self._flags = 0
        self._stream_id = 0

    @property
    def unfinished(self) -> int:
        """The running number of the frame that has begun and is not whole; 0 where there is none.

        DATA is none: its pieces are handed on.
        """
        return self.complete + 1 if self._rest else 0

    def _after_preface(self, data: bytes) -> bytes:
        given = data[: len(self._preface)]
        if not self._preface.startswith(given):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "this port speaks HTTP/2 without TLS")
        self._preface = self._preface[len(given) :]
        return data[len(given) :]

    def feed(self, data: bytes) -> Iterator[Frame]:  # noqa: PLR0912, PLR0915  one turn a frame
        """Give the frames that `data` completes; to be exhausted before the next call. Raises ProtocolError."""
        if self._preface:
            data = self._after_preface(data)
        elif self._rest:
            data = self._rest + data
            self._rest = b""
        place, end = 0, len(data)
        while True:
            if self._data_left:
                if place == end:
                    return
                start = place
                place = min(end, place + self._data_left)
                self._data_left -= place - start
                flags = self._flags & ~END_STREAM if self._data_left else self._flags
                yield DATA, flags, self._stream_id, _piece(data, start, place), CONTINUED
                continue
            if self._skip:
                skipped = min(self._skip, end - place)
                self._skip -= skipped
                place += skipped
            if end - place < 9:
                break
            high, low, kind, flags, stream_id = unpack_frame(data, place)
            length = high << 8 | low
            stream_id &= LARGEST_WINDOW
            start = place + 9
            if length > DEFAULT_FRAME_SIZE:
                length = self._checked(kind, length)
            if kind == DATA:
                size = length
                padding = 0
                if flags & PADDED:
                    if start == end and length:
                        break
                    padding = data[start] if length else 0
                    if padding >= length:
                        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "padding is longer than its frame")
                    start += 1
                    size = length - padding - 1
                place = min(end, start + size)
                self._data_left = size - (place - start)
                self._skip = padding
                if self._data_left:
                    self._flags, self._stream_id = flags, stream_id
                    flags &= ~END_STREAM
                self.complete += 1
                yield DATA, flags, stream_id, _piece(data, start, place), length
                continue
            if end - start < length:
                break
            place = start + length
            self.complete += 1
            payload = data[start:place]
            if kind == HEADERS and flags & (PADDED | PRIORITIZED):
                payload = _bare(flags, payload)
            yield kind, flags, stream_id, payload, 0
        if place < end:
            self._rest = data[place:]

    def _checked(self, kind: int, length: int) -> int:
        """Return how much of a large frame is to be read. Raises ProtocolError, before any of it is kept."""
        if length > self._max_frame_size:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a frame is larger than the settings allow")
        if kind in (HEADERS, CONTINUATION):
            if length > MAX_BLOCK_BYTES:
                raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "the headers are too large", "large_head")
        elif kind == GOAWAY or kind > CONTINUATION:
            self._skip = length  # nobody needs what it says
            return 0
        elif kind != DATA:
            raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "a frame has another size than its type")
        return length


def _piece(data: bytes, start: int, end: int) -> bytes | memoryview:
    return data[start:end] if end - start < _VIEW_BYTES else memoryview(data)[start:end]


def _bare(flags: int, payload: bytes) -> bytes:
    """Take padding and priority off a HEADERS frame."""
    padding = start = 0
    if flags & PADDED:
        padding, start = (payload[0], 1) if payload else (1, 0)
    if flags & PRIORITIZED:
        start += 5
    if start + padding > len(payload):
        raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "padding is longer than its frame, or a priority is cut short")
    return payload[start : len(payload) - padding]
