"""Compressed bodies and messages, inflated within a bound: small ones at once, large ones on a thread."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from serving.bodies.buffer import BodyBuffer
from serving.errors import InvalidRequest, PayloadTooLarge
from serving.tensor_bytes import Buffer

INLINE_BYTES = 64 * 1024
_PIECE = 256 * 1024
"""Bytes that a thread makes in one step, for copying them keeps the event loop from turning."""
_MOST_GROWTH = 1032
"""Times that deflate makes of its input, at the most."""

inflaters = ThreadPoolExecutor(1, thread_name_prefix="inflate")
"""One thread: however many bombs there are, one goes off at a time."""


class Inflation:
    """One body that is being inflated, never to more than `limit` bytes; coding: gzip or deflate.

    Raises PayloadTooLarge, from what gzip says at its end before anything is inflated, and InvalidRequest for a body
    that is broken, cut short, or has something behind it.
    """

    def __init__(self, body: Buffer, coding: str, limit: int) -> None:
        self._body = body
        self._coding = coding
        most = _MOST_GROWTH * len(body) + 64
        if coding == "gzip":
            size = int.from_bytes(bytes(body[-4:]), "little")
            if size > most:
                raise self._broken()
            if size > limit:
                raise PayloadTooLarge(f"this inflates to {size} bytes, and the limit is {limit}")
            self.size = size
            """Bytes that it inflates to, at the most: what to reserve before it is inflated."""
        else:
            self.size = min(limit, most)
        self._limit = limit

    def at_once(self) -> bytes | None:
        """Return the whole body where it is small enough to be inflated at once; None where it may not be."""
        if len(self._body) > INLINE_BYTES or (self._coding == "gzip" and self.size > INLINE_BYTES):
            return None
        most = min(INLINE_BYTES, self.size)
        inflater = self._inflater()
        made = self._more(inflater, self._body, most + 1)
        if len(made) > most:
            if self._coding == "gzip" or most == self._limit:
                raise self._too_much()
            return None
        self._check_end(inflater)
        return made

    def inflate(self) -> memoryview:
        """Return the whole body, however long it is; for a thread."""
        store = BodyBuffer(self.size)  # of deflate, which does not say its size, far more than is ever touched
        for piece in self._pieces():
            if len(store) + len(piece) > store.length:
                raise self._too_much()
            store.add(piece)
        if self._coding == "gzip" and len(store) != self.size:
            raise self._broken()
        return store.received()

    def _pieces(self) -> Iterator[bytes]:
        inflater = self._inflater()
        view = memoryview(self._body)
        place = 0
        while place < len(view) and not inflater.eof:
            given: Buffer = view[place : place + INLINE_BYTES]
            place += len(given)
            while not inflater.eof:
                piece = self._more(inflater, given, _PIECE)
                yield piece
                given = inflater.unconsumed_tail
                if not given and len(piece) < _PIECE:
                    break
        if place < len(view):
            raise self._broken()
        self._check_end(inflater)

    def _inflater(self) -> zlib._Decompress:
        return zlib.decompressobj(wbits=31 if self._coding == "gzip" else 15)

    def _more(self, inflater: zlib._Decompress, given: Buffer, most: int) -> bytes:
        try:
            return inflater.decompress(given, most)
        except zlib.error:
            raise InvalidRequest(f"this is not {self._coding}, as its encoding says") from None

    def _check_end(self, inflater: zlib._Decompress) -> None:
        if not inflater.eof or inflater.unused_data:
            raise self._broken()

    def _broken(self) -> InvalidRequest:
        return InvalidRequest(f"the {self._coding} body is cut short or has something behind it")

    def _too_much(self) -> PayloadTooLarge | InvalidRequest:
        if self._coding == "gzip":
            return InvalidRequest("the gzip body inflates to another size than it says")
        return PayloadTooLarge(f"this inflates to over {self._limit} bytes, which is the limit")
