"""The streams of one connection: those that are open, and how the others ended. Source: RFC 9113, section 5.1."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from serving.http2.frames import ErrorCode, ProtocolError

_MAX_RESETS = 1024
_MAX_GAPS = 16


@dataclass(slots=True, eq=False)
class Stream:
    """One stream that is open. Windows count bytes that may still be sent and come."""

    id: int
    send_window: int
    receive_window: int
    body_left: int | None
    """Bytes that content-length still promises; None where it was not said."""
    remote_ended: bool
    queue: deque[bytes | memoryview] | None = None
    """Payload that waits; None: nothing does, and nothing may follow but trailers or more payload."""
    trailers: bytes | None = None
    """The frame that ends the stream behind what waits."""
    sent: int = 0
    """Bytes of the queue that went so far."""

    def take(self, size: int) -> None:
        """Count bytes in that came. Raises ProtocolError where they are more than the window holds."""
        self.receive_window -= size
        if self.receive_window < 0:
            raise ProtocolError(ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window holds")

    def has_promised(self, size: int, end_stream: bool) -> bool:
        """Tell whether content-length has room for so many bytes more, and is reached at the end."""
        if self.body_left is None:
            return True
        self.body_left -= size
        return self.body_left >= 0 and not (end_stream and self.body_left)


class Streams(dict[int, Stream]):
    """Open streams by id. last: the youngest that was opened."""

    def __init__(self) -> None:
        self.last = 0
        self._reset_here: dict[int, None] = {}
        self._passed_over: deque[range] = deque(maxlen=_MAX_GAPS)

    def advance(self, stream_id: int) -> None:
        """Take note of a new id; those below it can't be opened any more."""
        if stream_id > self.last + 2:
            self._passed_over.append(range(self.last + 2, stream_id))
        self.last = stream_id

    def remember_reset(self, stream_id: int) -> None:
        """Take note that a stream was reset from here: what its peer sends before it reads so is harmless."""
        # Bounded: who opens streams only to have them reset would fill it; older ones are taken for ended by then.
        self._reset_here[stream_id] = None
        if len(self._reset_here) > _MAX_RESETS:
            del self._reset_here[next(iter(self._reset_here))]

    def check_late(self, stream_id: int) -> None:
        """Let a frame pass that was under way when its stream was reset here. Raises ProtocolError for any other."""
        if stream_id in self._reset_here:
            return
        if stream_id > self.last or not stream_id & 1 or any(stream_id in gap for gap in self._passed_over):
            raise ProtocolError(ErrorCode.PROTOCOL_ERROR, "a frame for a stream that was not opened")
        raise ProtocolError(ErrorCode.STREAM_CLOSED, "a frame for a stream that has ended")
