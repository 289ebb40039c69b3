"""The writing half of an HTTP/2 connection: its streams, their answers, and the room that the client gives them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from serving.grpc_api.frames import (
    CANCEL,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    NO_ERROR,
    RST_STREAM,
    SMALL_FRAME,
    WINDOW_UPDATE,
    frame,
    number,
    pack_frame,
)
from serving.grpc_api.guard import Guard

STREAM_WINDOW = 1024 * 1024
_CREDIT = 4
"""Frames that bring nothing and are forgiven for each answer: clients ping and grow windows as they are answered."""
PIECE_BYTES = 256 * 1024
"""Bytes of an answer after which the loop turns, or the client's kernel takes megabytes at once."""
_SUBSTANTIAL = 1024
"""Bytes of an answer that go at once and count as much as one that is complete."""


class Stream(ABC):
    """One stream, of which the owner's kind derives; `window` and `room` are bytes that may come and go."""

    __slots__ = ("connection", "ended", "id", "out", "resting", "room", "window", "write_by")

    def __init__(self, connection: Sending, identity: int) -> None:
        self.connection = connection
        self.id = identity
        self.window = STREAM_WINDOW
        self.room = connection.first_room
        self.ended = False
        self.out: deque[bytes | memoryview] | None = None
        """Payload that waits for room; the last item is the block of trailers. None: nothing waits."""
        self.write_by = 0.0
        """When the client must have given room for what waits, in monotonic seconds."""
        self.resting = False
        """Whether what waits goes on when the loop has turned."""

    @abstractmethod
    def received(self, piece: bytes | memoryview) -> None:
        """Take a piece of the request; only valid now."""

    @abstractmethod
    def complete(self) -> None:
        """The client has sent all that it will."""

    @abstractmethod
    def left(self) -> None:
        """The client has left, or the connection has gone: nothing can be sent any more."""

    @abstractmethod
    def full(self) -> bool:
        """Tell whether no more should be sent to this stream for now; `Connection.refill` says that it may again."""

    @abstractmethod
    def emptied(self) -> None:
        """All that waited to be sent is sent."""

    @abstractmethod
    def look(self, now: float) -> None:
        """End what takes too long; called a few times a second."""

    @abstractmethod
    def is_quiet(self) -> bool:
        """Tell whether nothing is owed to the client: it has not sent a whole request, or has its answers."""


class Sending(ABC):
    """What a connection needs to answer. Bytes of `room` may go on all streams together."""

    transport: asyncio.Transport

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.streams: dict[int, Stream] = {}
        self.room = 65535
        self.first_room = 65535
        self.largest = SMALL_FRAME
        self.draining = False
        self.idle_frames = 0
        """Frames of late that brought nothing, less what was answered."""
        self._answers: list[bytes] = []  # written together: the answers of a batch come together
        self._blocked = False  # there was no room for some of what waits
        self.paused = False
        """The client does not read: more than a little of an answer would go to the kernel at once when it does."""
        self._soon = asyncio.get_running_loop().call_soon

    def answer(self, stream: Stream, frames: bytes, size: int) -> None:
        """Write all of an answer, whose DATA holds `size` bytes. Only where `fits` said so."""
        self.room -= size
        if not self._answers:
            self._soon(self._flush)
        self._answers.append(frames)
        self.close(stream)

    def _flush(self) -> None:
        """Write the answers that are gathered; before whatever must not come before them."""
        answers = self._answers
        if answers:
            self._answers = []
            self.transport.write(b"".join(answers) if len(answers) > 1 else answers[0])

    def fits(self, stream: Stream, size: int) -> bool:
        """Tell whether `size` bytes of payload may go in one frame, now."""
        return stream.out is None and size <= self.room and size <= stream.room and size <= self.largest

    def send(self, stream: Stream, *payload: bytes | memoryview) -> None:
        """Send payload, as far as the client has room; the rest follows when it has more."""
        if stream.out is None:
            stream.out = deque()
            stream.write_by = self.guard.now + self.guard.patience.write_s
        stream.out.extend(payload)
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
        if self.idle_frames > 0:
            self.idle_frames -= _CREDIT
        if not stream.ended:
            # We have answered before all was sent: the client may stop.
            self._flush()
            self.transport.write(frame(RST_STREAM, 0, stream.id, number(NO_ERROR)))
        self._done()

    @abstractmethod
    def _done(self) -> None:
        """Take note that a stream has ended."""

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream with an error of HTTP/2."""
        if self.streams.pop(stream.id, None) is not None:
            self.transport.write(frame(RST_STREAM, 0, stream.id, number(code)))
            self._done()

    def refill(self, stream: Stream) -> None:
        """Let a stream's client send on, unless the stream has enough for now."""
        if not stream.full() and not stream.ended and stream.id in self.streams:
            grown = STREAM_WINDOW - stream.window
            if grown > 0:
                stream.window = STREAM_WINDOW
                self.transport.write(frame(WINDOW_UPDATE, 0, stream.id, number(grown)))

    def _pump(self, stream: Stream) -> None:
        """Send what waits, as far as there is room; a piece of it, and the rest when the loop has turned."""
        if stream.resting:
            return
        out: deque[Any] | None = stream.out
        gone = 0
        while out:
            if self.paused:
                self._blocked = True
                break
            if gone >= PIECE_BYTES:
                stream.resting = True
                self._soon(self._pump_on, stream)
                break
            payload = out[0]
            if not len(payload):  # what follows are the trailers
                stream.out = None
                stream.emptied()
                self._trail(stream, out[1])
                return
            size = min(len(payload), self.room, stream.room, self.largest, PIECE_BYTES)
            if size <= 0:
                self._blocked = True
                break
            gone += size
            self.room -= size
            stream.room -= size
            self.transport.writelines(
                [
                    pack_frame(size >> 8, size & 0xFF, DATA, 0, stream.id),
                    payload if size == len(payload) else payload[:size],
                ]
            )
            if size == len(payload):
                out.popleft()
            else:
                out[0] = memoryview(payload)[size:]
        if self.idle_frames > 0 and (gone >= _SUBSTANTIAL or not out):
            self.idle_frames -= _CREDIT
        if out:
            # Who takes an answer a byte at a time gains no more than that byte's time.
            patience, now = self.guard.patience, self.guard.now
            stream.write_by = min(now + patience.write_s, stream.write_by + gone / patience.min_rate)
        else:
            stream.out = None
            stream.emptied()

    def _pump_on(self, stream: Stream) -> None:
        stream.resting = False
        if stream.out is not None and stream.id in self.streams:
            self._pump(stream)

    def _pump_all(self) -> None:
        self._blocked = False
        for stream in [s for s in self.streams.values() if s.out is not None]:
            self._pump(stream)

    def _look_at_streams(self, now: float) -> None:
        """Reset the streams whose client gives no room for their answer, and end what takes too long."""
        for stream in list(self.streams.values()):
            if stream.out and now > stream.write_by:
                self.guard.cut["slow_reader"] += 1
                self.reset(stream, CANCEL)
                stream.left()
            else:
                stream.look(now)
