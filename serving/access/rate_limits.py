"""How much each caller may ask in a second, all workers together: token buckets in shared memory.

A bucket is one number, the monotonic time at which all that was taken is paid for (the generic cell rate algorithm,
ITU-T I.371). Taking is one look and one store of eight bytes, without a lock that a worker could die with: two workers
that take in the same microsecond may count one of the two, which is far below a percent.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import time
from multiprocessing import reduction
from typing import Any, NamedTuple

from serving.errors import RateLimited

_ROWS = 16384
_WAYS = 16
BURST_S = 1.0
"""Seconds of a rate that may be taken at once."""


class Rates(NamedTuple):
    """Predictions, and rows, that one caller may ask for in a second; None: as many as it likes."""

    requests_per_s: float | None = None
    rows_per_s: float | None = None


UNLIMITED = Rates()


class Buckets:
    """The buckets of all callers. It can be given to a spawned process, and both then see the same memory.

    A caller has one of the few rows that its name leads to; of more callers than rows those are forgotten whose
    buckets have been full longest, and a full bucket is as good as none.
    """

    def __init__(self, descriptor: int = -1) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 3 * 8 * _ROWS)
        words = memoryview(self._memory)
        self._names = words[: 8 * _ROWS].cast("Q")
        self._paid_at = words[8 * _ROWS :].cast("d")  # for requests, then for rows

    @classmethod
    def shared(cls) -> Buckets:
        """Make those of several processes."""
        descriptor = os.memfd_create("serving-rates")
        os.ftruncate(descriptor, 3 * 8 * _ROWS)
        return cls(descriptor)

    def __reduce__(self) -> Any:
        return _opened, (reduction.DupFd(self._descriptor),)

    def take(self, name: int, kind: int, cost: float) -> float:
        """Take from a bucket what costs so many seconds of its rate; return 0, or after how long that can be had.

        What costs more than there ever is may be had where the bucket is full, and is paid for afterwards.
        """
        at = self._row(name) + kind * _ROWS
        now = time.monotonic()
        paid_at = max(self._paid_at[at], now)
        wait = paid_at + min(cost, BURST_S) - BURST_S - now
        if wait > 1e-9:
            return wait
        self._paid_at[at] = paid_at + cost
        return 0.0

    def _row(self, name: int) -> int:
        first = name % (_ROWS - _WAYS)
        if self._names[first] == name:
            return first
        rows = range(first, first + _WAYS)
        for row in rows:
            if self._names[row] == name:
                return row
        row = min(rows, key=lambda row: max(self._paid_at[row], self._paid_at[row + _ROWS]))
        self._paid_at[row] = self._paid_at[row + _ROWS] = 0.0
        self._names[row] = name
        return row


class RateLimit:
    """What one caller may still ask for. identity: tells callers apart, the same in every worker."""

    def __init__(self, buckets: Buckets, identity: bytes, rates: Rates) -> None:
        self._take = buckets.take
        self._name = int.from_bytes(hashlib.sha256(identity).digest()[:8], "big") or 1
        self._requests, self._rows = rates

    def take_request(self) -> None:
        """Count one request. Raises RateLimited."""
        if self._requests is not None:
            self._count(0, 1, self._requests, "requests")

    def take_rows(self, rows: int) -> None:
        """Count rows. Raises RateLimited."""
        if self._rows is not None:
            self._count(1, rows, self._rows, "rows")

    def _count(self, kind: int, number: int, rate: float, what: str) -> None:
        wait = self._take(self._name, kind, number / rate)
        if wait:
            seconds = math.ceil(wait)
            raise RateLimited(
                f"this credential may ask for {rate:g} {what} a second, and has: come back in {seconds} s", seconds
            )


def _opened(descriptor: Any) -> Buckets:
    return Buckets(descriptor.detach())
