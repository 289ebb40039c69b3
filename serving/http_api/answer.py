"""Statuses, error bodies and headers: the one table from errors to HTTP."""

from __future__ import annotations

import itertools
import re
import secrets
import zlib
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from serving.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    GenerationConflict,
    InferenceFailed,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    ServingError,
    SignatureMismatch,
    Unauthenticated,
    UnsupportedMediaType,
    by_kind,
)
from serving.fleet.report import GateRefused
from serving.http_api.strict_json import dumps

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]
HeaderList: TypeAlias = list[tuple[bytes, bytes]]

STATUS: dict[type[ServingError], int] = {
    InvalidRequest: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    ModelNotFound: 404,
    GenerationConflict: 412,
    Conflict: 409,
    PayloadTooLarge: 413,
    UnsupportedMediaType: 415,
    SignatureMismatch: 422,
    InferenceFailed: 422,
    GateRefused: 422,
    QueueFull: 429,
    NotReady: 503,
    DeadlineExceeded: 504,
}
# The Open Inference Protocol knows no 422: a request that does not fit the model is a bad request.
OPEN_INFERENCE = STATUS | {SignatureMismatch: 400, InferenceFailed: 400}

METHOD_TEXT = "this path does not take this method: see Allow"
"""What a 405 says."""
JSON = b"application/json"
BINARY = b"application/octet-stream"
COMPRESS_FROM = 16 * 1024
"""Bytes from which an answer is compressed for those who accept it: below, the processor costs more than the wire."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_ids = itertools.count()
_prefix = secrets.token_hex(8)


def status_of(error: ServingError, protocol: str = "v1") -> int:
    """Return the HTTP status for an error."""
    return by_kind(OPEN_INFERENCE if protocol == "v2" else STATUS, error, 500)


def error_body(error: ServingError) -> bytes:
    """Write `{"error": ..., "details": [{"path", "message"}]}`; details, and `current` after a lost race."""
    body: dict[str, object] = {"error": error.message}
    if isinstance(error, GenerationConflict):
        body["current"] = error.current
    if error.details:
        body["details"] = [{"path": d.path, "message": d.message} for d in error.details]
    return dumps(body)


def error_headers(error: ServingError) -> HeaderList:
    """Return the headers that an error adds."""
    if isinstance(error, QueueFull):
        return [(b"retry-after", b"%d" % error.retry_after)]
    if isinstance(error, Unauthenticated):  # RFC 6750, 3
        return [
            (b"www-authenticate", b'Bearer realm="serving"' + (b', error="invalid_token"' if error.invalid else b""))
        ]
    if isinstance(error, Forbidden) and error.scope is not None:
        challenge = f'Bearer realm="serving", error="insufficient_scope", scope="{error.scope}"'
        return [(b"www-authenticate", challenge.encode())]
    return []


def request_id(given: bytes | None) -> bytes:
    """Return the caller's request id where it is fit to be echoed and logged, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return b"%b-%x" % (_prefix_bytes, next(_ids))


_prefix_bytes = _prefix.encode()


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the first value of a header, by its lower-case name."""
    for key, value in headers:
        if key == name:
            return value
    return None


def accepted_coding(accept_encoding: bytes | None) -> bytes | None:
    """Return gzip or deflate where an Accept-Encoding allows it (RFC 9110, 12.5.3); gzip where it allows both.

    >>> accepted_coding(b"br, gzip;q=0.5"), accepted_coding(b"gzip;q=0, deflate"), accepted_coding(None)
    (b'gzip', b'deflate', None)
    """
    if not accept_encoding:
        return None
    allowed = {}
    for item in accept_encoding.lower().split(b","):
        coding, _, parameters = item.partition(b";")
        allowed[coding.strip()] = parameters.replace(b" ", b"") not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
    for coding in (b"gzip", b"deflate"):
        if allowed.get(coding, allowed.get(b"x-gzip" if coding == b"gzip" else b"", allowed.get(b"*", False))):
            return coding
    return None


def compressed(pieces: Iterable[bytes | memoryview], coding: bytes) -> list[bytes]:
    """Compress an answer, piece by piece; the level that costs least, since the wire is rarely the limit."""
    deflater = zlib.compressobj(1, wbits=15 if coding == b"deflate" else 31)
    made = [deflater.compress(piece) for piece in pieces]
    made.append(deflater.flush())
    return [part for part in made if part]
