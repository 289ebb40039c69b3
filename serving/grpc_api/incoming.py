"""The messages of one gRPC call, put together from the pieces that come, counted, and inflated.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections import deque

import grpc

from serving.bodies.buffer import BodyBuffer
from serving.bodies.inflation import Inflation, inflaters
from serving.errors import QueueFull, ServingError
from serving.grpc_api.head import Head
from serving.grpc_api.sending import Sending, Stream
from serving.tensor_bytes import Buffer

MOST_QUEUED = 16
_FREE_BYTES = 4096
"""Messages of calls with one message that are not counted: the bound on calls bounds them."""


class Incoming(Stream):
    """What a call is sent. done: it was answered, or its client has left."""

    __slots__ = (
        "_flag",
        "_held",
        "_inflating",
        "_later",
        "_messages",
        "_prefix",
        "_since",
        "_store",
        "_wake",
        "began",
        "done",
        "head",
        "refused",
    )

    def __init__(self, connection: Sending, identity: int, head: Head) -> None:
        super().__init__(connection, identity)
        self.head = head
        self.began = self._since = time.monotonic()
        self.done = False
        self.refused = False
        """Whether it was refused for its headers: nothing of what follows them is kept."""
        self._messages: deque[Buffer] = deque()
        self._store: BodyBuffer | None = None
        self._flag = 0
        self._held = 0  # bytes of it that are counted
        self._prefix = b""
        self._inflating: asyncio.Future[Buffer] | None = None
        self._later: deque[tuple[int, Buffer]] | None = None  # flags and messages behind the one that is inflated
        self._wake: asyncio.Event | None = None
        """Set when there is something to take; None where the call takes one message."""

    @abstractmethod
    def fail(self, code: grpc.StatusCode, details: str) -> None:
        """End with a status other than OK."""

    @abstractmethod
    def refuse(self, error: ServingError) -> None:
        """End with the status of an error."""

    def received(self, piece: bytes | memoryview) -> None:
        """Take a piece of the messages: each stands behind a flag and its length."""
        if self.done or self.refused:
            return
        if self._store is None and not self._prefix and len(piece) >= 5:
            size = int.from_bytes(piece[1:5], "big")
            if size == len(piece) - 5 and size <= self.head.most_bytes and isinstance(piece, bytes):
                if self._hold(size):
                    self._took(piece[0], piece[5:])
                return
        self._gather(piece)

    def _gather(self, piece: bytes | memoryview) -> None:
        while len(piece) and not self.done:
            if self._store is None:
                if not self._prefix and self._wake is not None:
                    self._since = self.connection.guard.now
                missing = 5 - len(self._prefix)
                self._prefix += bytes(piece[:missing])
                piece = piece[missing:]
                if len(self._prefix) < 5:
                    return
                self._flag, size = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
                self._prefix = b""
                if size > self.head.most_bytes:
                    self.fail(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"the message has {size} bytes, and the limit is {self.head.most_bytes}",
                    )
                    return
                if not self._hold(size):
                    return
                self._store = BodyBuffer(size)
            store = self._store
            part = piece[: store.length - len(store)]
            store.add(part)
            piece = piece[len(part) :]
            if len(store) < store.length:
                return
            self._store = None
            self._took(self._flag, store.whole())

    def _took(self, flag: int, message: Buffer) -> None:
        if self._later is not None:
            self._later.append((flag, message))
        elif flag:
            self._inflate(flag, message)
        else:
            self._keep(message)

    def _keep(self, message: Buffer) -> None:
        self._messages.append(message)
        if self._wake is not None:
            self._wake.set()
        elif len(self._messages) > 1:
            self.fail(grpc.StatusCode.INVALID_ARGUMENT, "this method takes one message")

    def _inflate(self, flag: int, message: Buffer) -> None:
        if flag != 1 or self.head.encoding == b"identity":
            self.fail(grpc.StatusCode.INTERNAL, "a message is flagged as compressed, and no grpc-encoding says how")
            return
        try:
            inflation = Inflation(message, self.head.encoding.decode(), self.head.most_bytes)
            made = inflation.begin()
        except ServingError as error:
            self.fail(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            return
        if made is not None:
            self._inflated(len(message), made)
        elif self._hold(inflation.size):
            self._later = deque()
            self._inflating = self.head.loop.run_in_executor(inflaters, inflation.whole)
            self._inflating.add_done_callback(lambda done: self._go_on(len(message), inflation.size, done))

    def _inflated(self, packed: int, made: Buffer) -> None:
        if self._hold(len(made)):
            self.release(packed)
            self._keep(made)

    def _go_on(self, packed: int, reserved: int, inflating: asyncio.Future[Buffer]) -> None:
        """Go on with a message that a thread has inflated, and with what came behind it."""
        self._inflating = None
        later, self._later = self._later, None
        if self.done or inflating.cancelled():
            return
        self.release(reserved)
        try:
            self._inflated(packed, inflating.result())
        except ServingError as error:
            self.fail(grpc.StatusCode.INVALID_ARGUMENT, error.bare().message)
        for flag, message in later or ():
            if not self.done:
                self._took(flag, message)
        if self._wake is not None:
            self._wake.set()
        elif self.ended and self._later is None:
            self.complete()

    def full(self) -> bool:
        """Tell whether messages wait to be taken."""
        return len(self._messages) + len(self._later or ()) >= MOST_QUEUED

    def is_late(self, now: float) -> bool:
        """Tell whether the message that is being sent took too long, or comes too slowly."""
        if self.ended or (self._wake is not None and self._store is None and not self._prefix):
            return False
        if self.full():
            self._since = now  # it is this side that does not take it
        patience, seconds = self.connection.guard.patience, now - self._since
        size = len(self._store) if self._store is not None else 0
        return seconds > patience.body_s or seconds > patience.head_s + size / patience.min_rate

    # What is held

    def _hold(self, size: int) -> bool:
        """Count bytes in; return whether they may be held: else the call is refused."""
        try:
            self.hold(size)
        except QueueFull as error:
            self.refuse(error)
            return False
        return True

    def hold(self, size: int) -> None:
        """Count bytes in, unless they are few. Raises QueueFull where they are too many."""
        if size > _FREE_BYTES or self._wake is not None:
            self.head.bodies.hold(size)
            self._held += size

    def release(self, size: int) -> None:
        """Count bytes out that are not needed any more."""
        if self._held and (size > _FREE_BYTES or self._wake is not None):
            size = min(size, self._held)
            self._held -= size
            self.head.bodies.held -= size

    def _let_go(self) -> None:
        self.head.bodies.held -= self._held
        self._held = 0

    def _drop(self) -> None:
        self._let_go()
        self._store = None
        self._messages.clear()
        self._later = None
        if self._inflating is not None:
            self._inflating.cancel()
