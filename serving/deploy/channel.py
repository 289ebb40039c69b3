"""Messages between the coordinator and a worker: JSON values over a pair of sockets, each after its length.

The coordinator's end never waits: what a worker does not take is kept here, and its age tells how far behind it is.
Each message is acknowledged as soon as the worker has read it, long before what it asks for is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import orjson

log = logging.getLogger("serving.channel")

ACKNOWLEDGED = b"{}"
_LENGTH = struct.Struct("!I")
_AT_ONCE = 1 << 18


def pair() -> tuple[socket.socket, socket.socket]:
    """Make both ends of a channel; the second can be given to another process."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def framed(text: bytes) -> bytes:
    """Put its length before a message."""
    return _LENGTH.pack(len(text)) + text


class Link:
    """The coordinator's end of one worker's channel. All is called on the coordinator's thread, but `behind`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._out: deque[memoryview] = deque()
        self._in = bytearray()
        self._sent: deque[float] = deque()
        self._ended: float | None = None

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._sock.fileno()

    @property
    def writes(self) -> bool:
        """Whether something waits for the worker to read."""
        return bool(self._out)

    @property
    def idle(self) -> bool:
        """Whether the worker has acknowledged all that it was sent."""
        return not self._sent

    def behind(self, now: float) -> float:
        """Return for how many seconds the worker has left something unacknowledged; may be called on any thread."""
        ended = self._ended
        if ended is not None:
            return now - ended
        with contextlib.suppress(IndexError):  # acknowledged on the other thread meanwhile
            return max(0.0, now - self._sent[0])
        return 0.0

    def send(self, text: bytes) -> None:
        """Send a message, now or when the worker takes it. Its end shows when it is read from."""
        self._sent.append(time.monotonic())
        self._out.append(memoryview(framed(text)))
        self.flush()

    def flush(self) -> None:
        """Write what the worker takes now."""
        with contextlib.suppress(OSError):  # it takes no more, or has gone, which the next `receive` says
            while self._out:
                written = self._sock.send(self._out[0][:_AT_ONCE])
                if written == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][written:]

    def receive(self) -> list[dict[str, Any]]:
        """Return what has arrived, without acknowledgements. Raises EOFError where the worker's end has closed."""
        try:
            data = self._sock.recv(_AT_ONCE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._in += data
        messages = []
        while len(self._in) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._in)
            if len(self._in) < _LENGTH.size + size:
                break
            text = bytes(self._in[_LENGTH.size : _LENGTH.size + size])
            del self._in[: _LENGTH.size + size]
            if text == ACKNOWLEDGED:
                self._sent.popleft()
            else:
                messages.append(orjson.loads(text))
        return messages

    def close(self) -> None:
        """Give the channel up: the worker ended, or does not speak any more."""
        self._ended = time.monotonic()
        self._out.clear()
        self._sock.close()


class WorkerEnd:
    """A worker's end, on its event loop. on_message: takes each message in turn."""

    def __init__(self, sock: socket.socket, on_message: Callable[[dict[str, Any]], None]) -> None:
        self._sock = sock
        self._on_message = on_message
        self._early: list[bytes] = []
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.last_message_at = time.monotonic()
        """When the coordinator said something last; it does so every few seconds."""

    def start(self) -> None:
        """Listen to the coordinator."""
        self._reading = asyncio.get_running_loop().create_task(self._read())

    def send(self, message: dict[str, Any]) -> None:
        """Send a message without waiting for it to be read."""
        text = framed(orjson.dumps(message))
        if self._writer is None:
            self._early.append(text)
        elif not self._writer.is_closing():
            self._writer.write(text)

    def close(self) -> None:
        """Listen no more."""
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
        else:
            self._sock.close()

    async def _read(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._sock, limit=1 << 20)
        self._writer.writelines(self._early)
        acknowledged = framed(ACKNOWLEDGED)
        try:
            while True:
                (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                text = await reader.readexactly(size)
                self.last_message_at = time.monotonic()
                self._writer.write(acknowledged)
                self._on_message(orjson.loads(text))
        except (asyncio.IncompleteReadError, OSError):
            return  # the coordinator has stopped, or its process has gone: what is served stays as it is
        except Exception:
            # Nothing is acknowledged from now on, so the parent replaces this worker.
            log.exception("a message of the coordinator could not be taken")
