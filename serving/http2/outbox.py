"""What waits to be sent, as far as the peer's windows have room for it. Source: RFC 9113, section 5.2."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from serving.http2.frames import (
    DATA,
    DEFAULT_FRAME_SIZE,
    DEFAULT_WINDOW,
    LARGEST_WINDOW,
    ErrorCode,
    ProtocolError,
    Setting,
    pack_frame,
)
from serving.http2.streams import Stream

_SUBSTANTIAL_BYTES = 1024
"""DATA frames from this size are progress that the peer pays window updates for."""


class Outbox:
    """Frames to be written at once, and payload that waits for windows."""

    def __init__(self) -> None:
        self.window = DEFAULT_WINDOW
        """Bytes of DATA that may go on all streams together."""
        self.initial_window = DEFAULT_WINDOW
        self.max_frame_size = DEFAULT_FRAME_SIZE
        self.frames: list[bytes] = []
        """What no window holds back, in its order."""
        self._sendable: dict[Stream, None] = {}  # has payload and, as far as is known, room in its own window

    @property
    def has_output(self) -> bool:
        """Tell whether `take` has something to give."""
        return bool(self.frames) or (bool(self._sendable) and self.window > 0)

    def fits(self, stream: Stream, size: int) -> bool:
        """Tell whether `size` bytes may go now in one frame."""
        return (
            stream.queue is None and size <= self.window and size <= stream.send_window and size <= self.max_frame_size
        )

    def reserve(self, stream: Stream, size: int) -> bool:
        """Keep room for a frame that another writes; False where there is none, or something has to go before."""
        if self.has_output or not self.fits(stream, size):
            return False
        self.window -= size
        return True

    def add(self, stream: Stream, parts: Sequence[bytes | memoryview]) -> None:
        """Queue payload."""
        if stream.queue is None:
            stream.queue = deque()
        stream.queue.extend(part for part in parts if len(part))
        if stream.queue:
            self._sendable[stream] = None
        else:
            stream.queue = None

    def discard(self, stream: Stream) -> None:
        """Forget what waits."""
        stream.queue = stream.trailers = None
        self._sendable.pop(stream, None)

    def grow(self, stream: Stream, size: int) -> bool:
        """Grow a stream's window, or shrink it; return whether it is still a window."""
        stream.send_window += size
        if stream.queue is not None and stream.send_window > 0:
            self._sendable[stream] = None
        return stream.send_window <= LARGEST_WINDOW

    def set(self, key: int, value: int, streams: Iterable[Stream]) -> None:
        """Take note of one of the peer's settings, where it is about what it is sent. Raises ProtocolError."""
        if key == Setting.INITIAL_WINDOW_SIZE:
            grown, self.initial_window = value - self.initial_window, value
            if value > LARGEST_WINDOW or not all(self.grow(stream, grown) for stream in streams):
                raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
        elif key == Setting.MAX_FRAME_SIZE:
            if not DEFAULT_FRAME_SIZE <= value < 2**24:
                raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a frame size that is none")
            self.max_frame_size = value

    def take(self, limit: int) -> tuple[list[bytes | memoryview], list[Stream], int]:
        """Return what to write, with up to `limit` bytes of payload, one frame of each stream in turn.

        Also the streams of which no more waits, and how many frames were progress.
        """
        chunks: list[bytes | memoryview] = [*self.frames]
        self.frames.clear()
        drained: list[Stream] = []
        progress = 0
        while self._sendable and self.window > 0 and limit > 0:
            stream = next(iter(self._sendable))
            del self._sendable[stream]
            queue = stream.queue
            if stream.send_window <= 0 or queue is None:
                continue
            payload = queue[0]
            size = min(len(payload), self.window, stream.send_window, self.max_frame_size, limit)
            chunks.append(pack_frame(size >> 8, size & 0xFF, DATA, 0, stream.id))
            if size == len(payload):
                chunks.append(payload)
                queue.popleft()
            else:
                view = memoryview(payload)
                chunks.append(view[:size])
                queue[0] = view[size:]
            self.window -= size
            stream.send_window -= size
            stream.sent += size
            limit -= size
            progress += size >= _SUBSTANTIAL_BYTES
            if queue:
                self._sendable[stream] = None
                continue
            stream.queue = None
            drained.append(stream)
            progress += size < _SUBSTANTIAL_BYTES
            if stream.trailers is not None:
                chunks.append(stream.trailers)
        return chunks, drained, progress
