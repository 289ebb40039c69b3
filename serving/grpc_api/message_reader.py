"""The messages of one gRPC call, put together from the pieces that come, counted, and inflated.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from serving.bodies.buffer import BodyBuffer
from serving.bodies.inflation import Inflation, inflaters
from serving.errors import InvalidRequest, PayloadTooLarge
from serving.grpc_api.status import Aborted, Status
from serving.tensor_bytes import Buffer
from serving.timeouts import Timeouts

if TYPE_CHECKING:
    from serving.grpc_api.call import Call

_MOST_QUEUED = 16
_EACH_BYTES = 128
"""What a message of a stream is counted with beside its bytes, while it waits: it may have none."""
_SMALL_BYTES = 1024
"""Messages up to it get no buffer of their own, which takes half as much."""


class MessageReader:
    """Gives `messages` what it is fed. streaming: the call takes any number of them."""

    __slots__ = ("_call", "_flag", "_inflating", "_later", "_prefix", "_since", "_store", "_streaming", "messages")

    def __init__(self, call: Call, *, streaming: bool) -> None:
        self._call = call
        self._streaming = streaming
        self.messages: deque[Buffer] = deque()
        self._since = time.monotonic()
        self._prefix = b""
        self._flag = 0
        self._store: BodyBuffer | None = None
        self._inflating: asyncio.Future[Buffer] | None = None
        self._later: deque[tuple[int, Buffer]] = deque()  # flags and messages behind the one that is inflated

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        return self._store is None and not self._prefix

    @property
    def inflating(self) -> bool:
        """Whether a thread is at work on a message."""
        return self._inflating is not None

    @property
    def backpressured(self) -> bool:
        """Whether so many messages wait to be taken that no more should be sent."""
        return len(self.messages) + len(self._later) >= _MOST_QUEUED

    async def take(self) -> Buffer:
        """Give the message that has waited longest, and others a turn: a megabyte may be 200,000 messages."""
        message = self.messages.popleft()
        self._call.release(_EACH_BYTES)
        if len(self.messages) % _MOST_QUEUED == 1:
            await asyncio.sleep(0)
        return message

    def feed(self, piece: bytes | memoryview) -> None:
        """Take a piece of the messages: each stands behind a flag and its length. Raises ServingError or Aborted."""
        max_bytes = self._call.connection.server.max_bytes
        piece = memoryview(piece)  # of bytes each part would be a copy of all that follows
        while piece:
            if self._store is None:
                if not self._prefix and self._streaming:
                    self._since = time.monotonic()
                missing = 5 - len(self._prefix)
                self._prefix += bytes(piece[:missing])
                piece = piece[missing:]
                if len(self._prefix) < 5:
                    return
                self._flag, size = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
                self._prefix = b""
                if size > max_bytes:
                    raise PayloadTooLarge(f"the message has {size} bytes, and the limit is {max_bytes}")
                # Before there is a buffer: what is announced counts, not what has come, or thousands of calls that
                # each announce 64 MB would all be let in.
                self._call.hold(size + _EACH_BYTES if self._streaming else size)
                if size <= min(len(piece), _SMALL_BYTES):
                    self._take(self._flag, bytes(piece[:size]))
                    piece = piece[size:]
                    continue
                self._store = BodyBuffer(size)
            store = self._store
            part = piece[: store.length - len(store)]
            store.add(part)
            piece = piece[len(part) :]
            if len(store) < store.length:
                return
            self._store = None
            self._take(self._flag, store.received())

    def _take(self, flag: int, message: Buffer) -> None:
        if self._inflating is not None:
            self._later.append((flag, message))
        elif flag:
            self._inflate(flag, message)
        else:
            self._keep(message)

    def _keep(self, message: Buffer) -> None:
        if self.messages and not self._streaming:
            raise InvalidRequest("this method takes one message")
        self.messages.append(message)

    def _inflate(self, flag: int, message: Buffer) -> None:
        encoding = self._call.head.encoding
        if flag != 1 or encoding == b"identity":
            raise Aborted(Status.INTERNAL, "a message is flagged as compressed, and no grpc-encoding says how")
        inflation = Inflation(message, encoding.decode(), self._call.connection.server.max_bytes)
        made = inflation.at_once()
        if made is not None:
            self._inflated(len(message), made)
            return
        self._call.hold(inflation.size)
        self._inflating = asyncio.get_running_loop().run_in_executor(inflaters, inflation.inflate)
        self._inflating.add_done_callback(lambda done: self._go_on(len(message), inflation.size, done))

    def _inflated(self, packed: int, made: Buffer) -> None:
        self._call.hold(len(made))
        self._call.release(packed)
        self._keep(made)

    def _go_on(self, packed: int, reserved: int, inflating: asyncio.Future[Buffer]) -> None:
        """Go on with a message that a thread has inflated, and with what came behind it."""
        if self._inflating is None:  # dropped meanwhile
            return
        self._inflating = None
        later, self._later = self._later, deque()
        self._call.release(reserved)
        try:
            self._inflated(packed, inflating.result())
            for flag, message in later:
                self._take(flag, message)
        except Exception as error:  # nobody above this callback would tell the client
            self._call.end_with(error)
        else:
            self._call.on_inflated()

    def is_late(self, now: float, timeouts: Timeouts) -> bool:
        """Tell whether the message that is being sent took too long, or comes too slowly."""
        if self._streaming and self.is_empty:
            return False
        if self.backpressured:
            self._since = now  # it is this side that does not take it
        seconds = now - self._since
        size = len(self._store) if self._store is not None else 0
        return seconds > timeouts.body_s or seconds > timeouts.head_s + size / timeouts.min_rate

    def drop(self) -> None:
        """Let go of everything."""
        self._store = None
        self._prefix = b""
        self.messages.clear()
        self._later.clear()
        if self._inflating is not None:
            self._inflating.cancel()
            self._inflating = None
