"""Fields of protobuf's wire format that say their length: a tag, the length as a varint, and what is inside.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from typing import TypeAlias

from serving.tensor_bytes import Buffer

Parts: TypeAlias = list[bytes | memoryview]
"""A long message in the parts that it lies in, which are never joined."""


def field(tag: int, *content: bytes) -> bytes:
    """Write a field of what its pieces are together.

    >>> field(0x0A, b"iris")
    b'\\n\\x04iris'
    """
    return b"".join((field_head(tag, sum(map(len, content))), *content))


def field_head(tag: int, size: int) -> bytes:
    """Write what stands in front of `size` bytes.

    >>> field_head(0x0A, 300)
    b'\\n\\xac\\x02'
    """
    if size < 0x80:
        return bytes((tag, size))
    made = bytearray((tag,))
    while size > 0x7F:
        made.append(size & 0x7F | 0x80)
        size >>= 7
    made.append(size)
    return bytes(made)


def length_at(given: Buffer, place: int) -> tuple[int, int]:
    """Read a varint that is a length; return it and the place behind. Raises IndexError where it is none."""
    value = shift = 0
    while True:
        byte = given[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 28:
            raise IndexError
