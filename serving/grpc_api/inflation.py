"""Compressed messages, inflated within a bound: small ones at once, the rest of large ones on a thread."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from serving.tensor_bytes import Buffer, Gathered

INLINE_BYTES = 64 * 1024
_PIECE = 256 * 1024
"""Bytes that a thread makes in one step, for copying them keeps the event loop from turning."""

inflaters = ThreadPoolExecutor(1, thread_name_prefix="grpc-inflate")
"""One thread: however many bombs there are, one goes off at a time."""


class Inflation:
    """One message that is being inflated, never to more than `limit` bytes; wrong ones raise ValueError."""

    def __init__(self, message: Buffer, encoding: bytes, limit: int) -> None:
        self._message = message
        self._encoding = encoding.decode()
        self._limit = limit

    def begin(self) -> bytes | None:
        """Return the whole message; None where it has more than INLINE_BYTES."""
        if len(self._message) > INLINE_BYTES:
            return None
        inflater = self._inflater()
        made = self._more(inflater, self._message, min(INLINE_BYTES, self._limit) + 1)
        if len(made) > min(INLINE_BYTES, self._limit):
            return None
        self._judge(inflater)
        return made

    def whole(self) -> Buffer:
        """Return the whole message, however long it is; for a thread."""
        size = self._size()
        if size > self._limit:
            raise ValueError(f"a message inflates to over {self._limit} bytes, which is the limit")
        store = Gathered(size)
        for piece in self._pieces():
            if len(store) + len(piece) > size:
                raise ValueError(f"a {self._encoding} message has another size than it says")
            store.add(piece)
        if len(store) != size:
            raise ValueError(f"a {self._encoding} message has another size than it says")
        return store.whole()

    def _size(self) -> int:
        """Return how long it will be, so that nothing is made of a bomb: gzip says so at its end, deflate nowhere."""
        if self._encoding == "gzip":
            return int.from_bytes(bytes(self._message[-4:]), "little")
        size = 0
        for piece in self._pieces():
            size += len(piece)
            if size > self._limit:
                break
        return size

    def _pieces(self) -> Iterator[bytes]:
        inflater = self._inflater()
        view = memoryview(self._message)
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
            raise ValueError(f"a {self._encoding} message has something behind it")
        self._judge(inflater)

    def _inflater(self) -> zlib._Decompress:
        return zlib.decompressobj(wbits=31 if self._encoding == "gzip" else 15)

    def _more(self, inflater: zlib._Decompress, given: Buffer, most: int) -> bytes:
        try:
            return inflater.decompress(given, most)
        except zlib.error:
            raise ValueError(f"a message is not {self._encoding}, as grpc-encoding says") from None

    def _judge(self, inflater: zlib._Decompress) -> None:
        if not inflater.eof or inflater.unused_data:
            raise ValueError(f"a {self._encoding} message is cut short or has something behind it")
