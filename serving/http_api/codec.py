"""What every dialect gives the doors: feeds decoded from a body, and bytes encoded from outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from serving.tensors import Tensors

INLINE_BYTES = 64 * 1024
"""Bodies above it are decoded on a thread: decoding them in place would hold the event loop for milliseconds."""


class Decoded(NamedTuple):
    """Feeds in the order of the signature's inputs, how many rows, and what `encode` must remember."""

    inputs: Tensors
    rows: int
    context: Any = None


class Codec(Protocol):
    """One dialect bound to one version of a model; `decode` may run on a thread, for bodies over INLINE_BYTES."""

    protocol: str

    def decode(self, headers: Sequence[tuple[bytes, bytes]], body: bytes | bytearray) -> Decoded:
        """Read a request. Raises a ServingError that names the fault."""

    def encode(self, outputs: Tensors, context: Any) -> bytes:
        """Write the answer as JSON; `context` is what `decode` returned with the feeds."""
