"""Messages between the coordinator and a worker: JSON values over a pair of sockets, each after its length.

Nobody waits for the other end: what it does not take is kept here, and its age tells how far behind it is. Each
message is acknowledged as soon as it has been read, long before what it asks for is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import orjson

_ACKNOWLEDGED = b"{}"
_LENGTH = struct.Struct("!I")


def pair() -> tuple[socket.socket, socket.socket]:
    """Make both ends of a channel; the second can be given to another process."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


class Channel(asyncio.Protocol):
    """One end. All is called on the event loop that `connect` was called on, but `behind`.

    on_message: takes each message in turn. Where it fails, the loop logs that and closes this end: nothing is
    acknowledged any more, so that the parent replaces a worker that can't be told. on_end: told that there will be no
    more messages.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[dict[str, Any]], object],
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self._sock = sock
        self._on_message = on_message
        self._on_end = on_end
        self._transport: asyncio.Transport | None = None
        self._in = bytearray()
        self._sent_at: deque[float] = deque()
        """When each message was sent that is not acknowledged yet."""
        self._latest: bytes | None = None
        self.ended_at: float | None = None
        self.last_message_at = time.monotonic()
        """When the other end said something last."""

    async def connect(self) -> None:
        """Begin to listen; only then can something be sent."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._sock)

    @property
    def idle(self) -> bool:
        """Whether the other end has acknowledged all that it was sent."""
        return not self._sent_at

    def behind(self, now: float) -> float:
        """Return for how many seconds something was left unacknowledged; may be called on any thread."""
        if self.ended_at is not None:
            return now - self.ended_at
        with contextlib.suppress(IndexError):  # acknowledged on the other thread meanwhile
            return max(0.0, now - self._sent_at[0])
        return 0.0

    def send(self, message: dict[str, Any]) -> None:
        """Send a message without waiting for it to be read. Where the other end has gone, it is dropped."""
        self._send(orjson.dumps(message))

    def send_latest(self, text: bytes) -> None:
        """Send a message, as JSON, once all before it is acknowledged; until then a later one takes its place.

        So an end that lags gets what is so now, and not all that was so meanwhile, which would fill our memory.
        """
        self._latest = text
        self._send_what_waits()

    def close(self) -> None:
        """Listen no more; what was not taken is dropped."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self._sock.close()

    def _send(self, text: bytes) -> None:
        self._sent_at.append(time.monotonic())
        self._write(text)

    def _send_what_waits(self) -> None:
        if self._latest is not None and self.idle:
            text, self._latest = self._latest, None
            self._send(text)

    def _write(self, text: bytes) -> None:
        assert self._transport is not None, "connect first"  # noqa: S101
        if not self._transport.is_closing():  # else uvloop raises RuntimeError
            self._transport.write(_LENGTH.pack(len(text)) + text)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be told by the loop that something can be sent."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take bytes, which may hold some messages, or a part of one."""
        self._in += data
        while len(self._in) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._in)[0]
            if len(self._in) < end:
                break
            text = bytes(self._in[_LENGTH.size : end])
            del self._in[:end]
            if text == _ACKNOWLEDGED:
                self._sent_at.popleft()
                self._send_what_waits()
            else:
                # Before anything is done: it says that this end listens, and loading a model may take minutes.
                self.last_message_at = time.monotonic()
                self._write(_ACKNOWLEDGED)
                self._on_message(orjson.loads(text))

    def connection_lost(self, exc: Exception | None) -> None:
        """Be told by the loop that the other end has gone, or this one was closed."""
        self.ended_at = time.monotonic()
        self._on_end()
