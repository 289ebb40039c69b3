"""What every dialect gives the doors: feeds decoded from a body, and bytes encoded from outputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from serving.http_api.answer import HeaderList
from serving.tensor_bytes import Buffer
from serving.tensors import Tensors

LENGTH = b"inference-header-content-length"
"""Says how much of a body is JSON: bytes, before any Content-Encoding."""

INLINE_BYTES = 64 * 1024
"""Bodies above it are decoded on a thread: decoding them in place would hold the event loop for milliseconds."""

RAW_INLINE_BYTES = 2 * 1024 * 1024
"""The same for raw tensors of numbers: a look at each of so many takes half a millisecond."""

INLINE_ANSWER_BYTES = 16 * 1024
"""Outputs above it are written as text on a thread: a thousand rows of one class and its scores take a millisecond."""

LONG_ANSWER_BYTES = 32 * 1024
"""Outputs above it are written by the piece: one call of what writes text would take milliseconds."""

PIECE_BYTES = 256 * 1024
"""Bytes of a large answer that are worked on at a time, so that other threads get the interpreter in between."""


class Decoded(NamedTuple):
    """Feeds in the order of the signature's inputs, how many rows, and what `encode` must remember."""

    inputs: Tensors
    rows: int
    context: Any = None
    timeout: float | None = None
    """Seconds from its arrival that the request itself allows."""
    priority: int | None = None
    """Its place in line, where the request itself has one."""


class Blobs(NamedTuple):
    """A large body in parts, `size` bytes in all: they are written as they lie, never joined."""

    size: int
    parts: Sequence[bytes | memoryview]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Give the body in parts of PIECE_BYTES at most, for who has to copy them; once.

        What was given is let go of: freeing megabytes at the end would take milliseconds.
        """
        parts = deque(self.parts)
        del self
        while parts:
            part = parts.popleft()
            for at in range(0, len(part), PIECE_BYTES):
                yield part[at : at + PIECE_BYTES]


class Mixed(NamedTuple):
    """An answer of JSON with raw tensors behind it. `headers` tell where they begin, and are shared by many answers."""

    headers: HeaderList
    body: bytes | Blobs


class Codec(Protocol):
    """One dialect bound to one version of a model; `decode` and `encode` may run on threads, for over INLINE_BYTES."""

    protocol: str
    slow_bytes: bool
    """Whether raw tensors take time to read too, as strings do."""

    def decode(self, headers: Sequence[tuple[bytes, bytes]], body: Buffer) -> Decoded:
        """Read a request. Raises a ServingError that names the fault."""

    def slow_answer(self, context: Any) -> bool:
        """Tell whether a large answer takes time to write: all but raw tensors, which are sent as they lie."""

    def encode(self, outputs: Tensors, context: Any) -> bytes | Blobs | Mixed:
        """Write the answer; `context` is what `decode` returned with the feeds."""
