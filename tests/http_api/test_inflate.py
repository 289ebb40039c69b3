"""Compressed bodies: what was sent comes out, and never more than the limit."""

from __future__ import annotations

import gzip
import random
import zlib

import pytest

from serving.errors import InvalidRequest, PayloadTooLarge
from serving.http_api.route import inflate

LIMIT = 3 * 2**20
STEP = 2**20
SIZES = [0, 1, 1000, STEP - 1, STEP, STEP + 1, LIMIT]


@pytest.mark.parametrize("coding", [b"gzip", b"deflate"])
@pytest.mark.parametrize("size", SIZES)
def test_a_body_inflates_whole_or_not_at_all(coding: bytes, size: int) -> None:
    """A body comes out as it went in, up to the limit; cut short, or with more behind it, it is refused."""
    pack = gzip.compress if coding == b"gzip" else zlib.compress
    for body in (bytes(size), random.Random(0).randbytes(size)):
        packed = pack(body)
        assert bytes(inflate(packed, coding, LIMIT)) == body
        for broken in (packed[:-1], packed + b"x"):
            with pytest.raises(InvalidRequest):
                inflate(broken, coding, LIMIT)


def test_a_body_that_inflates_past_the_limit_is_refused() -> None:
    """One byte over the limit is too much, however small it came."""
    with pytest.raises(PayloadTooLarge):
        inflate(gzip.compress(bytes(LIMIT + 1)), b"gzip", LIMIT)
