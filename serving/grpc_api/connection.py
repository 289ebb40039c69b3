"""One HTTP/2 connection from its preface to its end, with bounds on what a client may take: time, frames, company.

grpcio's own server hands each call from its threads to Python, which costs more than all else that a small prediction
needs: `make bench` has the figures of both. No timer belongs to a call: all connections are looked at together.
"""

from __future__ import annotations

import asyncio
import contextlib

from serving.grpc_api.frames import (
    COMPRESSION_ERROR,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    NO_ERROR,
    PROTOCOL_ERROR,
    SETTINGS,
    WINDOW_UPDATE,
    Broken,
    frame,
    number,
    pack_setting,
)
from serving.grpc_api.hpack import MOST_BYTES, BadBlock
from serving.grpc_api.reading import CONNECTION_WINDOW, FRAME_BYTES, MOST_STREAMS, Endpoint, Reading
from serving.grpc_api.sending import STREAM_WINDOW
from serving.parting import part, reset

MOST_CALLS = 8192
"""Calls in progress in one worker; further ones are told RESOURCE_EXHAUSTED."""
LINGER_S = 1.0
"""Seconds in which a client that was told to go may still send, so that it reads why and not a reset."""
BURST_BYTES = 512 * 1024
"""Bytes after which the loop turns: else the socket is read until it is empty, 8 MB in one go."""
CROWDED = "this server has all the connections that it takes: come back later"
_GREETING = frame(
    SETTINGS,
    0,
    0,
    b"".join(
        pack_setting(*pair) for pair in ((3, MOST_STREAMS), (4, STREAM_WINDOW), (5, FRAME_BYTES), (6, MOST_BYTES))
    ),
) + frame(WINDOW_UPDATE, 0, 0, number(CONNECTION_WINDOW - 65535))


class Connection(Reading, asyncio.Protocol):
    """One connection. All of it runs on the event loop.

    most_calls: calls of the whole worker beyond which no more begin here, but for health. since: when it came, or had
    its last call; monotonic seconds.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.most_calls = MOST_CALLS
        self.since = self.guard.now
        self._burst = 0
        self._write_by = 0.0  # when the client must have read what is written; 0: nothing waits
        self._unread = 0  # bytes written that the client has not taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        self.transport = transport
        room = self.guard.room()
        self.guard.connections.add(self)
        if room > 0:
            if room <= self.guard.spare:
                self.most_calls = 0
            transport.write(_GREETING)
        else:
            # Before the settings: clients take a connection that was never made for a reason to wait.
            self._cut("crowded", ENHANCE_YOUR_CALM, CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self.guard.connections.discard(self)
        self.over = True
        self._answers = []
        self._leave()
        self.endpoint.gone()

    def _leave(self) -> None:
        streams, self.streams = self.streams, {}
        self.endpoint.in_progress -= len(streams)
        for stream in streams.values():
            stream.out = None
            stream.left()

    def _done(self) -> None:
        self.endpoint.in_progress -= 1
        if not self.streams:
            self.since = self.guard.now
            if self.draining:
                self.end(NO_ERROR)

    def pause_writing(self) -> None:
        """Read nothing from a client that does not read its answers."""
        self.paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:  # noqa: D102
        self.paused = False
        self._write_by = 0.0  # the client has read some
        self.transport.resume_reading()
        if self._blocked:
            self._pump_all()

    def _read_on(self) -> None:
        if not self.paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if self.over:
            return
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
            self._cut(broken.cut, broken.code, str(broken))
        except BadBlock as broken:
            self._cut("malformed", COMPRESSION_ERROR, str(broken))

    # Endings

    def _cut(self, reason: str, code: int, text: str) -> None:
        self.guard.cut[reason] += 1
        self.end(code, text)

    def end(self, code: int, reason: str = "") -> None:
        """Say why, and take no more; what is in progress is left."""
        if self.over:
            return
        self.over = True
        self._flush()
        self.since = self.guard.now
        self._rest = b""
        self._block = None
        self._leave()
        if not self.transport.is_closing():
            self.transport.write(frame(GOAWAY, 0, 0, number(self.last) + number(code) + reason.encode()))
            # Closing at once would reset the connection under what the client still sends, and with it the reason.
            with contextlib.suppress(OSError):  # the client has gone already
                self.transport.write_eof()

    def drain(self) -> None:
        """Take no more streams; close once those in progress are done."""
        self.draining = True
        if not self.streams:
            self.end(NO_ERROR)
        elif not self.over:
            self.transport.write(frame(GOAWAY, 0, 0, number(self.last) + number(NO_ERROR)))

    def is_quiet(self) -> bool:
        """Tell whether nothing is owed to the client."""
        return not self.transport.get_write_buffer_size() and all(s.is_quiet() for s in self.streams.values())

    def make_room(self) -> None:
        """Go at once, for others."""
        if not self.over:
            self._cut("crowded", NO_ERROR, CROWDED)
        self.transport.close()

    # Time

    def look(self, now: float) -> None:
        """Cut the connection if its client takes too long; `now` in monotonic seconds."""
        patience, transport = self.guard.patience, self.transport
        unread = transport.get_write_buffer_size()
        if not unread:
            self._write_by = 0.0
        elif not self._write_by:
            self._write_by = now + patience.write_s
        elif unread < self._unread:
            self._write_by = min(now + patience.write_s, self._write_by + (self._unread - unread) / patience.min_rate)
        elif now > self._write_by:
            self.guard.cut["slow_reader"] += 1
            reset(transport)
            return
        self._unread = unread
        if self.over:
            if not unread and now > self.since + LINGER_S:
                part(transport)
        elif not self.settled:
            if now > self.since + patience.head_s:
                self._cut("slow_head", PROTOCOL_ERROR, "the preface and the first settings did not arrive in time")
        elif self._is_half(now - patience.head_s) and not self.paused:
            self._cut("slow_head", PROTOCOL_ERROR, "a frame, or the headers of a call, did not arrive in time")
        elif self.streams:
            self._look_at_streams(now)
        elif now > self.since + patience.idle_s:
            self.end(NO_ERROR, "idle")

    def _is_half(self, before: float) -> bool:
        """Tell whether a frame or a block of headers began before a time, and has not ended."""
        return (bool(self._rest) and self._half < before) or (self._block is not None and self._block_since < before)
