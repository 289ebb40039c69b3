"""What every dialect gives the transports: feeds decoded from a body, and bytes encoded from outputs.

`decode` and `encode` run on the event loop for what is short, and in the codec process for what is long.
"""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from serving.errors import PayloadTooLarge, ServingError
from serving.protocols.headers import (
    BINARY,
    COMPRESS_FROM,
    JSON,
    HeaderList,
    Headers,
    accepted_coding,
    compressed,
    header,
)
from serving.tensor_bytes import Buffer
from serving.tensors import Tensors

log = logging.getLogger("serving.prediction")

LENGTH = b"inference-header-content-length"
"""Says how much of a body is JSON: bytes, before any Content-Encoding."""

INLINE_BYTES = 64 * 1024
"""Bodies above it never are decoded on the event loop: that would hold it for milliseconds."""

SLOW_INLINE_BYTES = 8 * 1024
"""The same where a dialect has no short cut for a body: it is wrong, or rare, and costs ten times as much."""

SMALL_BYTES = 2048
"""Bodies up to it cost so little that nobody counts them."""

MOST_BRACKETS = 4096
"""Arrays and objects in a body from which it counts as long: each is made, however little is in it."""

RAW_INLINE_BYTES = 2 * 1024 * 1024
"""Raw tensors of numbers above it are looked at on a thread: a look at each of so many takes half a millisecond."""

SMALL_ANSWER_BYTES = 4 * 1024
"""Outputs up to it are written as text so fast that nobody counts them."""

INLINE_ANSWER_BYTES = 32 * 1024
"""Outputs above it are never written as text on the event loop: 1,600 rows of one class and its scores take 1.5 ms."""

PIECE_BYTES = 256 * 1024
"""Bytes of a large answer that are worked on at a time, so that other connections get their turn in between."""

MOST_STRINGS = 100_000
"""Strings in one body of JSON: as Python's objects, more of them would hold the event loop at each handover."""

NO_HEADERS: HeaderList = []


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

        What was given is freed: freeing megabytes at the end would take milliseconds.
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


Encoded: TypeAlias = tuple[bytes | Blobs, HeaderList, bytes]
"""Body, headers and content type of an answer."""


class Codec(Protocol):
    """One dialect bound to one version of a model; pickled, it is made anew from that version's signature."""

    protocol: str
    raw_tensors: bool
    """Whether raw tensors may stand behind the JSON, which LENGTH then tells."""
    slow_bytes: bool
    """Whether they take time to read too, as strings do."""

    def decode(self, headers: Headers, body: Buffer) -> Decoded:
        """Read a request. Raises a ServingError that names the fault."""

    def quick(self, body: bytes) -> Decoded | None:
        """Read JSON as `decode` does, but only by a short cut; None where there is none for this body."""

    def slow_answer(self, context: Any) -> bool:
        """Tell whether a large answer takes time to write: all but raw tensors, which are sent as they lie."""

    def encode(self, outputs: Tensors, context: Any) -> bytes | Mixed:
        """Write the answer; `context` is what `decode` returned with the feeds."""


def decode(codec: Codec, headers: Headers, body: Buffer) -> Decoded | ServingError:
    """Read a request; what is wrong with it is returned."""
    try:
        return codec.decode(headers, body)
    except ServingError as error:
        return error.bare()
    except Exception:  # a fault of ours must be answered, or the caller hangs
        log.exception("a request could not be decoded")
        return ServingError("the server failed on this request; its log has the reason")


def decode_long(codec: Codec, headers: Headers, body: Buffer) -> Decoded:
    """Read a long request. Raises a ServingError. For the codec process."""
    decoded = codec.decode(headers, body)
    found = sum(array.size for array in decoded.inputs if array.dtype.hasobject)
    if found > MOST_STRINGS and header(headers, LENGTH) is None:
        raise PayloadTooLarge(f"{found} strings in one body of JSON, and the limit is {MOST_STRINGS}: {USE_BINARY}")
    return decoded


def too_much_json(size: int, limit: int) -> PayloadTooLarge:
    """Say that a body of JSON is too large, and what to do instead."""
    return PayloadTooLarge(f"the body has {size} bytes of JSON, and the limit is {limit}: {USE_BINARY}")


USE_BINARY = (
    "send tensors as binary data (POST /v2/models/{model}/infer with Inference-Header-Content-Length) or over gRPC"
)
"""What to do with what is too long for JSON."""


def encode(codec: Codec, outputs: Tensors, context: Any, accept_encoding: bytes | None) -> Encoded:
    """Write an answer, compressed for clients that accept it."""
    made = codec.encode(outputs, context)
    if isinstance(made, bytes):
        if len(made) < COMPRESS_FROM:
            return made, NO_HEADERS, JSON
    elif isinstance(made.body, bytes) and len(made.body) < COMPRESS_FROM:
        return made.body, made.headers, BINARY
    headers: HeaderList = []
    body: bytes | Blobs
    if isinstance(made, Mixed):
        headers += made.headers
        kind, body = BINARY, made.body
    else:
        kind, body = JSON, made
    if (body.size if isinstance(body, Blobs) else len(body)) >= COMPRESS_FROM:
        headers.append((b"vary", b"accept-encoding"))
        coding = accepted_coding(accept_encoding)
        if coding is not None:
            parts = compressed(body.pieces() if isinstance(body, Blobs) else [body], coding)
            body = Blobs(sum(map(len, parts)), parts)
            headers.append((b"content-encoding", coding))
    return body, headers, kind


def encode_long(codec: Codec, outputs: Tensors, context: Any, accept_encoding: bytes | None) -> Encoded:
    """Write a long answer, in parts that travel uncopied. For the codec process."""
    body, headers, kind = encode(codec, outputs, context, accept_encoding)
    parts: Sequence[bytes | memoryview] = body.parts if isinstance(body, Blobs) else [body]
    views: list[Any] = [pickle.PickleBuffer(part) for part in parts]  # memoryviews, once they have arrived
    return Blobs(sum(map(len, parts)), views), headers, kind
