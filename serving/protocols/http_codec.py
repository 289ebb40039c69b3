"""What the dialects over HTTP share: which bodies are read where, compression, and the limits on JSON."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from serving.errors import PayloadTooLarge
from serving.protocols.codec import (
    INLINE_ANSWER_BYTES,
    INLINE_BYTES,
    RAW_INLINE_BYTES,
    SMALL_ANSWER_BYTES,
    SMALL_BYTES,
    Blobs,
    Decoded,
    Elsewhere,
    Later,
    Mixed,
    Spare,
)
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

LENGTH = b"inference-header-content-length"
"""Says how much of a body is JSON: bytes, before any Content-Encoding."""

SLOW_INLINE_BYTES = 8 * 1024
"""As INLINE_BYTES, where a dialect has no short cut for a body: it is wrong, or rare, and costs ten times as much."""

MOST_BRACKETS = 4096
"""Arrays and objects in a body from which it counts as long: each is made, however little is in it."""

MOST_STRINGS = 100_000
"""Strings in one body of JSON: as Python's objects, more of them would hold the event loop at each handover."""

USE_BINARY = (
    "send tensors as binary data (POST /v2/models/{model}/infer with Inference-Header-Content-Length) or over gRPC"
)
"""What to do with what is too long for JSON."""

NO_HEADERS: HeaderList = []

Encoded: TypeAlias = tuple[bytes | Blobs, HeaderList, bytes]
"""Body, headers and content type of an answer."""


class HttpCodec(ABC):
    """One dialect over HTTP."""

    protocol: str
    raw_tensors: bool
    """Whether raw tensors may stand behind the JSON, which LENGTH then tells."""
    slow_bytes: bool
    """Whether they take time to read too, as strings do."""

    @abstractmethod
    def decode(self, headers: Headers, body: Buffer) -> Decoded:
        """Read a request. Raises a ServingError that names the fault."""

    @abstractmethod
    def quick(self, body: bytes) -> Decoded | None:
        """Read JSON as `decode` does, but only by a short cut; None where there is none for this body."""

    @abstractmethod
    def slow_answer(self, context: Any) -> bool:
        """Tell whether a large answer takes time to write: all but raw tensors, which are sent as they lie."""

    @abstractmethod
    def encode(self, outputs: Tensors, context: Any) -> bytes | Mixed:
        """Write the answer; `context` is what `decode` returned with the inputs."""

    def begin(self, headers: Headers, body: Buffer, spare: Spare, most_text: int) -> Decoded | Elsewhere | Later:
        """Read a body here where its bytes, brackets and company say that it takes little. Raises as `decode` does."""
        size = len(body)
        if size <= SMALL_BYTES:
            return self.decode(headers, body)
        length = header(headers, LENGTH) if self.raw_tensors else None
        text = size if length is None else min(int(length[:12]), size) if length.isdigit() else 0
        if text <= SLOW_INLINE_BYTES and length is not None and not self.slow_bytes:
            if size <= RAW_INLINE_BYTES:
                return self.decode(headers, body)
            return Elsewhere(_decode, (headers, body), on_thread=True)
        if size <= INLINE_BYTES:
            text_body = bytes(body)
            if text_body.count(b"{") + text_body.count(b"[") <= MOST_BRACKETS:
                if length is not None:
                    return self._begin_slow(headers, text_body, spare, text, most_text)
                if not spare(size):
                    return Later()
                quick = self.quick(text_body)
                return quick if quick is not None else self._begin_slow(headers, text_body, spare, size, most_text)
        return self._elsewhere(headers, body, text, most_text)

    def _begin_slow(
        self, headers: Headers, body: bytes, spare: Spare, text: int, most_text: int
    ) -> Decoded | Elsewhere:
        """Read a body that has no short cut, here where it is small: the long way takes up to eight times as long."""
        if len(body) <= SLOW_INLINE_BYTES and spare(8 * len(body)):
            return self.decode(headers, body)
        return self._elsewhere(headers, body, text, most_text)

    def _elsewhere(self, headers: Headers, body: Buffer, text: int, most_text: int) -> Elsewhere:
        if text > most_text:
            raise too_much_json(text, most_text)
        given = [pair for pair in headers if pair[0] == b"content-type" or (pair[0] == LENGTH and self.raw_tensors)]
        return Elsewhere(_decode_long, (given, pickle.PickleBuffer(body)))

    def begin_answer(
        self, outputs: Tensors, context: Any, headers: Headers, spare: Spare
    ) -> Encoded | Elsewhere | Later:
        """Write an answer here where it is short, or raw tensors that nobody wants compressed."""
        size = 0
        for array in outputs:
            size += array.nbytes
        if size > SMALL_ANSWER_BYTES:
            accepted = [pair for pair in headers if pair[0] == b"accept-encoding"]
            if accepted or self.slow_answer(context):
                if size > INLINE_ANSWER_BYTES:
                    return Elsewhere(_encode_long, (outputs, context, accepted))
                if not spare(2 * size):
                    return Later()
        made = self.encode(outputs, context)
        if isinstance(made, bytes) and len(made) < COMPRESS_FROM:
            return made, NO_HEADERS, JSON
        return self._compressed(made, headers)

    def encoded(self, outputs: Tensors, context: Any, headers: Headers) -> Encoded:
        """Write an answer, compressed for clients that accept it."""
        return self._compressed(self.encode(outputs, context), headers)

    def _compressed(self, made: bytes | Mixed, headers: Headers) -> Encoded:
        if isinstance(made, Mixed):
            kind, body, extra = BINARY, made.body, made.headers
        else:
            kind, body, extra = JSON, made, NO_HEADERS
        if (len(body) if isinstance(body, bytes) else body.size) < COMPRESS_FROM:
            return body, extra, kind
        extra = [*extra, (b"vary", b"accept-encoding")]
        coding = accepted_coding(header(headers, b"accept-encoding"))
        if coding is not None:
            parts = compressed([body] if isinstance(body, bytes) else body.pieces(), coding)
            body = Blobs(sum(map(len, parts)), parts)
            extra.append((b"content-encoding", coding))
        return body, extra, kind


def too_much_json(size: int, limit: int) -> PayloadTooLarge:
    """Say that a body of JSON is too large, and what to do instead."""
    return PayloadTooLarge(f"the body has {size} bytes of JSON, and the limit is {limit}: {USE_BINARY}")


def _decode(codec: HttpCodec, headers: Headers, body: Buffer) -> Decoded:
    return codec.decode(headers, body)


def _decode_long(codec: HttpCodec, headers: Headers, body: Buffer) -> Decoded:
    """Read a long request. Raises a ServingError. For the codec process."""
    decoded = codec.decode(headers, body)
    found = sum(array.size for array in decoded.inputs if array.dtype.hasobject)
    if found > MOST_STRINGS and header(headers, LENGTH) is None:
        raise PayloadTooLarge(f"{found} strings in one body of JSON, and the limit is {MOST_STRINGS}: {USE_BINARY}")
    return decoded


def _encode_long(codec: HttpCodec, outputs: Tensors, context: Any, headers: Headers) -> Encoded:
    """Write a long answer, in parts that travel uncopied. For the codec process."""
    body, extra, kind = codec.encoded(outputs, context, headers)
    parts: Sequence[bytes | memoryview] = body.parts if isinstance(body, Blobs) else [body]
    views: list[Any] = [pickle.PickleBuffer(part) for part in parts]  # memoryviews, once they have arrived
    return Blobs(sum(map(len, parts)), views), extra, kind
