"""Headers of HTTP as the codecs read and write them: names in lower case, names and values as bytes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]
HeaderList: TypeAlias = list[tuple[bytes, bytes]]

JSON = b"application/json"
BINARY = b"application/octet-stream"
COMPRESS_FROM = 16 * 1024
"""Bytes from which an answer is compressed for those who accept it: below, the processor costs more than the wire."""

_WEIGHT = re.compile(rb";\s*q\s*=\s*([01](?:\.\d*)?)\s*(?:;|$)")


def header(headers: Headers, name: bytes) -> bytes | None:
    """Return the first value of a header, by its lower-case name."""
    for key, value in headers:
        if key == name:
            return value
    return None


def weights(field: bytes | None) -> dict[bytes, float]:
    """Return what an Accept or Accept-Encoding names, in lower case, and how much it is liked, 0 to 1.

    Source: RFC 9110, 12.4.2. Of what is named twice, with different parameters, the higher weight counts.

    >>> weights(b"Text/CSV; header=absent; q=0.5, */*;q=0")
    {b'text/csv': 0.5, b'*/*': 0.0}
    """
    found: dict[bytes, float] = {}
    for item in (field or b"").lower().split(b","):
        name = item.partition(b";")[0].strip()
        weight = _WEIGHT.search(item)
        found[name] = max(found.get(name, 0.0), float(weight[1]) if weight else 1.0)
    return found


def accepted_coding(accept_encoding: bytes | None) -> bytes | None:
    """Return gzip or deflate where an Accept-Encoding allows it (RFC 9110, 12.5.3); gzip where it allows both.

    >>> accepted_coding(b"br, gzip;q=0.5"), accepted_coding(b"gzip;q=0, deflate"), accepted_coding(None)
    (b'gzip', b'deflate', None)
    """
    allowed = weights(accept_encoding)
    for coding in (b"gzip", b"deflate"):
        if allowed.get(coding, allowed.get(b"x-gzip" if coding == b"gzip" else b"*", allowed.get(b"*", 0.0))):
            return coding
    return None


def compressed(pieces: Iterable[bytes | memoryview], coding: bytes) -> list[bytes]:
    """Compress an answer, piece by piece; the level that costs least, since the wire is rarely the limit."""
    deflater = zlib.compressobj(1, wbits=15 if coding == b"deflate" else 31)
    made = [deflater.compress(piece) for piece in pieces]
    made.append(deflater.flush())
    return [part for part in made if part]
