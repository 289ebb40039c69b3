"""What every dialect gives the doors: feeds decoded from a body, and bytes encoded from outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serving.tensors import Tensors

INLINE_BYTES = 64 * 1024
"""Bodies above it are decoded on a thread: decoding them in place would hold the event loop for milliseconds."""


@dataclass(slots=True)
class Decoded:
    """Feeds in the order of the signature's inputs, how many rows, and what `encode` must remember."""

    inputs: Tensors
    rows: int
    context: Any = None


class Codec(Protocol):
    """One dialect bound to one version of a model; pure functions, safe on any thread."""

    protocol: str

    def decode(self, headers: Sequence[tuple[bytes, bytes]], body: bytes | bytearray) -> Decoded:
        """Read a request. Raises a ServingError that names the fault."""

    def encode(self, outputs: Tensors, decoded: Decoded) -> bytes:
        """Write the answer as JSON."""
