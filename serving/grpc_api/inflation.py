"""Compressed messages, inflated within a bound: small ones at once, the rest of large ones on a thread."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

from serving.tensor_bytes import Buffer, Gathered

INLINE_BYTES = 64 * 1024
_PIECE = 1024 * 1024
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
        inflater = self._inflater()
        view = memoryview(self._message)
        pieces: list[bytes] = []
        size = place = 0
        while place < len(view) and not inflater.eof:
            given: Buffer = view[place : place + INLINE_BYTES]
            place += len(given)
            while not inflater.eof:
                pieces.append(self._more(inflater, given, _PIECE))
                size += len(pieces[-1])
                if size > self._limit:
                    raise ValueError(f"a message inflates to over {self._limit} bytes, which is the limit")
                given = inflater.unconsumed_tail
                if not given and len(pieces[-1]) < _PIECE:
                    break
        if place < len(view):
            raise ValueError(f"a {self._encoding} message has something behind it")
        self._judge(inflater)
        store = Gathered(size)
        for index, piece in enumerate(pieces):
            pieces[index] = b""  # what is copied goes, or the message would be there twice
            store.add(piece)
        return store.whole()

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
