"""The headers of requests: unpacked, checked, and remembered with what they mean.

Source: RFC 9113, sections 8.2 and 8.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic

from serving.http2.events import R
from serving.http2.hpack import Decoder, Headers

_KNOWN_BYTES = 8 * 1024
"""Of header blocks that a connection remembers."""
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_FORBIDDEN_IN_VALUES = re.compile(rb"[\0\r\n]")
_OF_A_CONNECTION = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))


class MalformedMessage(Exception):
    """A request that HTTP/2 does not allow: its stream is reset, and others go on."""


class RequestReader(Generic[R]):
    """Reads the header blocks of one connection, in their order; `read_request` says what a request's headers mean."""

    def __init__(self, read_request: Callable[[Headers], R]) -> None:
        self._read_request = read_request
        self._decoder = Decoder()
        # Blocks that mean the same as long as the decoder's table does not change.
        self._known: dict[bytes, tuple[R, int | None]] = {}
        self._known_at = 0
        self._known_bytes = 0

    def read(self, block: bytes) -> tuple[R, int | None]:
        """Return what a request means, and its content-length.

        Raises CompressionError, HeadersTooLarge or MalformedMessage.
        """
        decoder = self._decoder
        known = self._known.get(block)
        if known is not None and self._known_at == decoder.changes:
            return known
        before = decoder.changes
        headers = decoder.decode(block)
        length = check_request(headers)
        made = self._read_request(headers), length
        self._known_bytes += len(block)
        if self._known_at != decoder.changes or self._known_bytes > _KNOWN_BYTES:
            self._known.clear()
            self._known_at = decoder.changes
            self._known_bytes = len(block)
        if before == decoder.changes and len(block) <= _KNOWN_BYTES // 4:
            self._known[block] = made
        return made

    def read_trailers(self, block: bytes) -> None:
        """Read what nobody needs. Raises CompressionError, HeadersTooLarge or MalformedMessage."""
        check_fields(self._decoder.decode(block))


def check_request(headers: Headers) -> int | None:
    """Return the content-length; None where there is none. Raises MalformedMessage."""
    pseudo: dict[bytes, bytes] = {}
    regular: Headers = []
    for name, value in headers:
        if name[:1] != b":":
            regular.append((name, value))
        elif regular or name in pseudo or name not in _PSEUDO or _FORBIDDEN_IN_VALUES.search(value):
            raise MalformedMessage("a pseudo-header is unknown, doubled, or behind a header")
        else:
            pseudo[name] = value
    # CONNECT has neither scheme nor path.
    due = (b":method",) if pseudo.get(b":method") == b"CONNECT" else (b":method", b":scheme", b":path")
    if not all(pseudo.get(name) for name in due):
        raise MalformedMessage("a pseudo-header is missing")
    check_fields(regular)
    lengths = {value for name, value in regular if name == b"content-length"}
    if not lengths:
        return None
    length = lengths.pop()
    if lengths or not length.isdigit() or len(length) > 18:
        raise MalformedMessage("content-length is no number, or two")
    return int(length)


def check_fields(headers: Headers) -> None:
    """Check headers without pseudo-headers, as trailers are. Raises MalformedMessage."""
    for name, value in headers:
        if not _NAME.fullmatch(name) or _FORBIDDEN_IN_VALUES.search(value):
            raise MalformedMessage("a header has a name or value that HTTP/2 forbids")
        if name in _OF_A_CONNECTION or (name == b"te" and value != b"trailers"):
            raise MalformedMessage("a header speaks of the connection, as only HTTP/1 does")
