"""Compressed bodies: what was sent comes out, and never more than the limit."""

from __future__ import annotations

import gzip
import random
import zlib

import pytest

from serving.bodies.inflation import Inflation
from serving.errors import InvalidRequest, PayloadTooLarge

LIMIT = 3 * 2**20
STEP = 2**20
SIZES = [0, 1, 1000, 2**16, 2**16 + 1, STEP - 1, STEP, STEP + 1, LIMIT]
PACK = {"gzip": gzip.compress, "deflate": zlib.compress}


def inflate(packed: bytes, coding: str) -> bytes:
    inflation = Inflation(packed, coding, LIMIT)
    made = inflation.at_once()
    whole = bytes(inflation.inflate() if made is None else made)
    assert len(whole) <= inflation.size  # which was reserved before
    return whole


@pytest.mark.parametrize("coding", PACK)
@pytest.mark.parametrize("size", SIZES)
def test_a_body_inflates_whole_or_not_at_all(coding: str, size: int) -> None:
    """A body comes out as it went in, up to the limit; cut short, or with more behind it, it is refused."""
    for body in (bytes(size), random.Random(0).randbytes(size)):
        packed = PACK[coding](body)
        assert inflate(packed, coding) == body
        for broken in (packed[:-1], packed + b"x", packed + packed, packed[: len(packed) // 2]):
            with pytest.raises((InvalidRequest, PayloadTooLarge)):
                inflate(broken, coding)


@pytest.mark.parametrize("coding", PACK)
def test_a_body_that_inflates_past_the_limit_is_refused(coding: str) -> None:
    """One byte over the limit is too much, however small it came."""
    with pytest.raises(PayloadTooLarge, match="inflates to"):
        inflate(PACK[coding](bytes(LIMIT + 1)), coding)


@pytest.mark.parametrize("said", [0, 10, STEP - 1, STEP + 1])
def test_gzip_that_lies_about_its_size_is_refused(said: int) -> None:
    """gzip says its size at its end; a body that says less than it holds takes no more memory than it says."""
    with pytest.raises(InvalidRequest, match="gzip"):
        inflate(gzip.compress(bytes(STEP))[:-4] + said.to_bytes(4, "little"), "gzip")
