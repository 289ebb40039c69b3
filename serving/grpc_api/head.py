"""What the headers of a gRPC call mean: its method, its deadline, its coding, and whether it may."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from serving.grpc_api.status import Status
from serving.http2.hpack import MAX_LIST_BYTES, Headers
from serving.tensor_bytes import Buffer

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Other codecs than protobuf have a suffix of their own.
_CONTENT_TYPE = re.compile(rb"application/grpc(\+proto)?[ \t]*(;.*)?")
_ENCODINGS = (b"gzip", b"deflate", b"identity")


@dataclass(frozen=True, slots=True)
class Method:
    """What answers calls of one path, its `name`; messages are read with `read`, which raises InvalidRequest, and made
    bytes with `write`.

    unary: async (request, call) -> response. streaming: (requests, call) -> async iterator. whole: called with
    (call, message bytes), and answers by itself, without a coroutine. admit: raises the ServingError of a caller who,
    by the headers, may not; None where anyone may. always: answered though all else is refused.
    """

    name: str
    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    unary: Callable[[Any, Any], Awaitable[Any]] | None = None
    streaming: Callable[[AsyncIterator[Any], Any], AsyncIterator[Any]] | None = None
    whole: Callable[[Any, Buffer], None] | None = None
    admit: Callable[[Headers], object] | None = None
    always: bool = False


@dataclass(frozen=True, slots=True)
class Head:
    """The headers of a call: its method (None: there is none), timeout in seconds, coding, and all of them.

    refusal: what is wrong with them. http_status: the answer to a request that is no gRPC; 200 where it is.
    """

    method: Method | None
    timeout: float | None
    encoding: bytes
    headers: Headers
    refusal: tuple[Status, str] | None
    http_status: int = 200


TOO_LARGE = Head(
    None, None, b"identity", [], (Status.RESOURCE_EXHAUSTED, f"the metadata is larger than {MAX_LIST_BYTES} bytes")
)
"""What is made of a call whose metadata is larger than is taken."""


def head_of(headers: Headers, methods: dict[bytes, Method]) -> Head:
    """Read the headers of a call; what is wrong with them is its answer."""
    by_name = dict(headers)
    path = by_name.get(b":path", b"")
    method = methods.get(path)
    refusal = None
    timeout = None
    encoding = by_name.get(b"grpc-encoding", b"identity")
    http_status = 200
    if by_name.get(b":method") != b"POST":
        http_status = 405
    elif not _CONTENT_TYPE.fullmatch(by_name.get(b"content-type", b"")):
        http_status = 415
    elif method is None:
        refusal = Status.UNIMPLEMENTED, f"there is no method {path[:128].decode('ascii', 'replace')}"
    elif encoding not in _ENCODINGS:
        refusal = Status.UNIMPLEMENTED, "grpc-encoding is not one of identity, deflate, gzip"
    given = by_name.get(b"grpc-timeout")
    if given is not None:
        found = _TIMEOUT.fullmatch(given)
        if found is None:
            refusal = Status.INTERNAL, "grpc-timeout should be up to 8 digits and a unit"
        else:
            timeout = int(found[1]) * _UNITS[found[2]]
    return Head(method, timeout, encoding, headers, refusal, http_status)
