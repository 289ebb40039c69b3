"""HPACK, the header compression of HTTP/2: reads what clients send, and writes plain literals.

Source: RFC 7541. Every bound that keeps a small block from becoming a large list is here.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import TypeAlias

from serving.http2.frames import ErrorCode, ProtocolError

Headers: TypeAlias = list[tuple[bytes, bytes]]

TABLE_BYTES = 4096
MAX_LIST_BYTES = 16 * 1024
"""Of the headers in one block, each counted with 32 bytes more as the RFC does."""

# Appendix A; the index of the first is 1.
_STATIC = (
    ":authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http :scheme=https :status=200 "
    ":status=204 :status=206 :status=304 :status=400 :status=404 :status=500 accept-charset "
    "accept-encoding=gzip,deflate accept-language accept-ranges accept access-control-allow-origin age allow "
    "authorization cache-control content-disposition content-encoding content-language content-length "
    "content-location content-range content-type cookie date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified link location max-forwards "
    "proxy-authenticate proxy-authorization range referer refresh retry-after server set-cookie "
    "strict-transport-security transfer-encoding user-agent vary via www-authenticate "
)
# Appendix B: how many bits the code of each symbol has, 256 being the end. The codes follow from their lengths.
_LENGTHS = (
    "13 23 28x7 24 30 28x2 30 28x8 30 28x9 6 10x2 12 13 6 8 11 10x2 8 11 8 6x3 5x3 6x7 7 8 15 6 12 10 13 6 "
    "7x22 8 7 8 13 19 13 14 6 15 5 6 5 6 5 6x3 5 7x2 6x3 5 6 7 6 5x2 6 7x5 15 11 14 13 28 20 22 20x2 22x3 23 "
    "22 23x5 24 23 24x2 22 23 24 23x4 21 22 23 22 23x2 24 22 21 20 22x2 23x2 21 23 22x2 24 21 22 23x2 21x2 22 "
    "21 23 22 23x2 20 22x3 23 22x2 23 26x2 20 19 22 23 22 25 26x3 27x2 26 24 25 19 21 26 27x2 26 27 24 21x2 "
    "26x2 28 27x3 20 24 20 21 22 21x2 23 22x2 25x2 24x2 26 23 26 27 26x2 27x5 28 27x5 26 30 "
)


class CompressionError(ProtocolError):
    """A header block that can't be read: the connection's table is out of step, so the connection must end."""

    def __init__(self, reason: str) -> None:
        super().__init__(ErrorCode.COMPRESSION_ERROR, reason)


class HeadersTooLarge(Exception):
    """A block holds more than MAX_LIST_BYTES. It was read to its end, so the table is in step for the next."""


def _static() -> Headers:
    pairs = [word.partition("=")[::2] for word in _STATIC.split()]
    return [(name.encode(), value.replace(",", ", ").encode()) for name, value in pairs]


def _codes() -> dict[tuple[int, int], int]:
    lengths: list[int] = []
    for word in _LENGTHS.split():
        bits, _, times = word.partition("x")
        lengths += [int(bits)] * int(times or 1)
    codes = {}
    code = length = 0
    for symbol in sorted(range(257), key=lambda s: (lengths[s], s)):
        code <<= lengths[symbol] - length
        length = lengths[symbol]
        codes[length, code] = symbol
        code += 1
    return codes


_TABLE = _static()
_SYMBOLS = _codes()
_END = 256
_LONGEST_REMEMBERED = 128


def _steps() -> tuple[list[list[tuple[int, bytes]]], frozenset[int]]:
    """Return where four bits lead from each state, a begun code, and what they say; and where a string may end.

    State -1 is none: there is no such code, or it is the end, which may not stand in a string.
    """
    begun = {(0, 0): 0}
    for length, code in _SYMBOLS:
        for more in range(1, length):
            begun.setdefault((length - more, code >> more), len(begun))
    steps = []
    for length, code in begun:
        row = []
        for nibble in range(16):
            at, said = (length, code), b""
            for shift in (3, 2, 1, 0):
                at = at[0] + 1, at[1] << 1 | (nibble >> shift & 1)
                symbol = _SYMBOLS.get(at)
                if symbol is not None and symbol != _END:
                    said += bytes((symbol,))
                    at = 0, 0
            row.append((begun.get(at, -1), said))
        steps.append(row)
    return steps, frozenset(begun[length, (1 << length) - 1] for length in range(8))


_STEPS, _ENDINGS = _steps()


def _unpacked(text: bytes) -> bytes:
    state = 0
    made = []
    for byte in text:
        state, said = _STEPS[state][byte >> 4]
        if state < 0:
            raise CompressionError("a string holds no code")
        made.append(said)
        state, said = _STEPS[state][byte & 15]
        if state < 0:
            raise CompressionError("a string holds no code")
        made.append(said)
    if state not in _ENDINGS:
        raise CompressionError("a string is not filled up with ones")
    return b"".join(made)


_unpacked_short = lru_cache(1024)(_unpacked)


def _huffman(text: bytes) -> bytes:
    return _unpacked_short(text) if len(text) <= _LONGEST_REMEMBERED else _unpacked(text)


class Decoder:
    """Reads the header blocks of one connection, in their order."""

    def __init__(self) -> None:
        self._recent: deque[tuple[bytes, bytes]] = deque()
        self._size = 0
        self._most = TABLE_BYTES
        self.changes = 0
        """How often the table changed: until it does again, the same block means the same headers."""

    def decode(self, block: bytes) -> Headers:
        """Return a block's headers. Raises CompressionError or HeadersTooLarge."""
        try:
            return self._decode(block)
        except IndexError:
            raise CompressionError("a block is cut short") from None

    def _decode(self, block: bytes) -> Headers:
        found: Headers = []
        total = place = 0
        first_field = True
        while place < len(block):
            first = block[place]
            if first & 0x80:
                index, place = _integer(block, place, 0x7F)
                pair = self._entry(index)
            elif first & 0xE0 == 0x20:
                size, place = _integer(block, place, 0x1F)
                if size > TABLE_BYTES or not first_field:
                    raise CompressionError("a table size that was not offered, or not in front")
                self._most = size
                self.changes += 1
                self._evict()
                continue
            else:
                index, place = _integer(block, place, 0x3F if first & 0x40 else 0x0F)
                name, place = (self._entry(index)[0], place) if index else _string(block, place)
                value, place = _string(block, place)
                pair = name, value
                if first & 0x40:
                    self._add(pair)
            first_field = False
            # Read on where it is too much, and keep none of it: the table must be in step for the next block.
            total += len(pair[0]) + len(pair[1]) + 32
            if total <= MAX_LIST_BYTES:
                found.append(pair)
        if total > MAX_LIST_BYTES:
            raise HeadersTooLarge
        return found

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        if index == 0:
            raise CompressionError("there is no header 0")
        if index <= len(_TABLE):
            return _TABLE[index - 1]
        return self._recent[index - len(_TABLE) - 1]

    def _add(self, pair: tuple[bytes, bytes]) -> None:
        self._recent.appendleft(pair)
        self._size += len(pair[0]) + len(pair[1]) + 32
        self.changes += 1
        self._evict()

    def _evict(self) -> None:
        while self._size > self._most:
            name, value = self._recent.pop()
            self._size -= len(name) + len(value) + 32


def _integer(block: bytes, place: int, mask: int) -> tuple[int, int]:
    value = block[place] & mask
    place += 1
    if value < mask:
        return value, place
    for shift in (0, 7, 14, 21):
        byte = block[place]
        place += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise CompressionError("a number is too large")


def _string(block: bytes, place: int) -> tuple[bytes, int]:
    packed = block[place] & 0x80
    size, place = _integer(block, place, 0x7F)
    end = place + size
    if end > len(block):
        raise CompressionError("a string is cut short")
    text = block[place:end]
    return (_huffman(text) if packed else text), end


def literal(name: bytes, value: bytes) -> bytes:
    """Write one header that no table keeps, so that the same bytes serve every connection.

    >>> literal(b"grpc-status", b"0")
    b'\\x00\\x0bgrpc-status\\x010'
    """
    return b"\0%b%b%b%b" % (_length(len(name)), name, _length(len(value)), value)


def _length(size: int) -> bytes:
    if size < 0x7F:
        return bytes((size,))
    size -= 0x7F
    made = bytearray((0x7F,))
    while size > 0x7F:
        made.append(size & 0x7F | 0x80)
        size >>= 7
    made.append(size)
    return bytes(made)
