"""The frames of HTTP/2 as bytes: kinds, flags, codes, bounds. Source: RFC 9113, sections 6 and 7."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 5, 6, 7, 8, 9, 11

SMALL_FRAME = 16384
"""Largest frame until settings say otherwise."""
LARGEST_WINDOW = 2**31 - 1

unpack_frame = struct.Struct(">HBBBI").unpack_from
unpack_setting = struct.Struct(">HI").iter_unpack
pack_setting = struct.Struct(">HI").pack
pack_frame = struct.Struct(">HBBBI").pack


class Broken(Exception):
    """The peer broke the protocol or its bounds; the connection ends with `code`, and `cut` counts it."""

    def __init__(self, code: int, reason: str, cut: str = "malformed") -> None:
        super().__init__(reason)
        self.code = code
        self.cut = cut


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Write a frame."""
    return pack_frame(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def number(value: int) -> bytes:
    """Write four bytes, as windows, codes and stream ids are."""
    return value.to_bytes(4, "big")
