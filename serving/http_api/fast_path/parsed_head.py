"""What the parser read from a head, kept by its connection so that the same bytes need not be parsed again.

Parsing costs more than all else that the fast path does, and a client's next request mostly has the same head but for
the length of its body.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import httptools

from serving.bodies.byte_budget import ByteBudget
from serving.bulk.formats import bulk_format
from serving.errors import InvalidRequest
from serving.prediction.request_options import DEFAULTS, PRIORITY, TIMEOUT, RequestOptions, request_options
from serving.protocols.headers import HeaderList
from serving.protocols.http_codec import LENGTH

# A header that asks for more than the fast path does.
_UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"content-encoding", b"upgrade", b"origin"})
_PLAIN_TYPES = frozenset({b"application/json", b"application/octet-stream"})
_ASKING = frozenset({PRIORITY, TIMEOUT})
_LONGEST = 1024
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)(?=\r\n)", re.IGNORECASE)


class PlainHead(NamedTuple):
    """The headers of a request that the fast path may answer.

    length: of the body. identity: of the request, None where it has none. binary: raw tensors stand behind the JSON.
    """

    length: int
    identity: bytes | None
    binary: bool
    options: RequestOptions


def plain_head(headers: HeaderList) -> PlainHead | None:
    """Read headers; None where they ask for more than the fast path does, or are wrong: the other path says how."""
    length = identity = None
    binary = asking = False
    for name, value in headers:
        if name in _UNUSUAL:
            return None
        if name == b"content-length":
            length = value
        elif name == b"content-type" and value not in _PLAIN_TYPES and bulk_format(value) is not None:
            return None
        elif name == b"x-request-id":
            identity = value
        elif name == LENGTH:
            binary = True
        elif name in _ASKING:
            asking = True
    if length is None or not length.isdigit():
        return None
    try:
        options = request_options(headers) if asking else DEFAULTS
    except InvalidRequest:
        return None
    return PlainHead(int(length), identity, binary, options)


class ParsedHead(NamedTuple):
    """The head of a plain request, byte by byte, and what it says.

    whole: all of it; length: of the body, -1 where that is not small. before, after: around the digits of its
    Content-Length, which is `headers[length_at]`.
    """

    whole: bytes
    length: int
    before: bytes
    after: bytes
    url: bytes
    headers: HeaderList
    length_at: int
    options: RequestOptions

    def same(self, chunk: bytes) -> tuple[HeaderList, bytes] | None:
        """Return headers and body if `chunk` is just one request with this head, of whatever length."""
        end = len(self.whole)
        if len(chunk) - end == self.length and chunk.startswith(self.whole):
            return self.headers, chunk[end:]
        if not chunk.startswith(self.before):
            return None
        at = len(self.before)
        digits, _, _ = chunk[at : at + 8].partition(b"\r")
        end = at + len(digits)
        if not chunk.startswith(self.after, end):
            return None
        end += len(self.after)
        size = len(chunk) - end
        if size > ByteBudget.FREE or not digits.isdigit() or int(digits) != size:
            return None
        headers = self.headers.copy()
        headers[self.length_at] = (b"content-length", digits)
        return headers, chunk[end:]


def parsed_head(
    chunk: bytes, url: bytes, headers: HeaderList, length: int, options: RequestOptions
) -> ParsedHead | None:
    """Return what to keep of a plain request whose body has `length` bytes; None if `chunk` is not just that request.

    The caller sees to it that the request began with the first byte of `chunk`. Were there anything behind its body,
    the head found here would reach into the body, and whoever wrote that would choose what later bytes mean.
    """
    end = len(chunk) - length
    if end > _LONGEST:
        return None
    head = chunk[:end]
    # The parser read at least these lines: one more byte than the head has, and its last line would be one too many.
    if not head.endswith(b"\r\n\r\n") or head.count(b"\n") != len(headers) + 2:
        return None
    found = _LENGTH.search(head)
    if found is None:
        return None
    at = head.count(b"\n", 0, found.start(1)) - 1
    exact = length if length <= ByteBudget.FREE else -1  # what is larger is counted, by the other way
    return ParsedHead(head, exact, head[: found.start(1)], head[found.end(1) :], url, headers, at, options)


def rooted(url: bytes) -> bytes:
    """Give a target in absolute form the path that it may leave out (RFC 9112, 3.2.2)."""
    parsed = httptools.parse_url(url)
    if parsed.path is not None:
        return url
    return b"/" if parsed.query is None else b"/?" + parsed.query
