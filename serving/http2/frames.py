"""The frames of HTTP/2 as bytes: types, flags, error codes, bounds. Source: RFC 9113, sections 6 and 7."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITIZED = 0x4, 0x8, 0x20

DEFAULT_FRAME_SIZE = 16384
"""Largest frame until settings say otherwise."""
DEFAULT_WINDOW = 65535
LARGEST_WINDOW = 2**31 - 1
_MOST_SETTINGS = 32


class ErrorCode(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Setting(IntEnum):
    """What SETTINGS set."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


unpack_frame = struct.Struct(">HBBBI").unpack_from
_unpack_settings = struct.Struct(">HI").iter_unpack
pack_frame = struct.Struct(">HBBBI").pack
_pack_setting = struct.Struct(">HI").pack


class ProtocolError(Exception):
    """The peer broke the protocol or a bound: the connection ends with `code`. cause: "malformed", "flood" or
    "large_head".
    """

    def __init__(self, code: ErrorCode, reason: str, cause: str = "malformed") -> None:
        super().__init__(reason)
        self.code = code
        self.cause = cause


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Write a frame."""
    return pack_frame(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream_id) + payload


def settings_frame(settings: Mapping[Setting, int]) -> bytes:
    """Write a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_pack_setting(*setting) for setting in settings.items()))


def goaway(last_stream_id: int, code: ErrorCode, reason: str = "") -> bytes:
    """Write a GOAWAY frame."""
    return frame(GOAWAY, 0, 0, uint32(last_stream_id) + uint32(code) + reason.encode())


def settings_of(payload: bytes, flags: int) -> Iterable[tuple[int, int]] | None:
    """Read a SETTINGS frame; None where it only acknowledges others. Raises ProtocolError."""
    if len(payload) % 6 or (flags & ACK and payload):
        raise ProtocolError(ErrorCode.FRAME_SIZE_ERROR, "settings have 6 bytes each")
    if len(payload) > 6 * _MOST_SETTINGS:
        raise ProtocolError(ErrorCode.ENHANCE_YOUR_CALM, "too many settings in a frame", "flood")
    return None if flags & ACK else _unpack_settings(payload)


def uint32(value: int) -> bytes:
    """Write four bytes, as windows, error codes and stream ids are."""
    return value.to_bytes(4, "big")


class ResponseTemplate:
    """Headers and trailers that many responses share, as frames that lack only a stream id. Both are header blocks."""

    def __init__(self, headers: bytes, trailers: bytes) -> None:
        first = frame(HEADERS, END_HEADERS, 0, headers)
        last = frame(HEADERS, END_HEADERS | END_STREAM, 0, trailers)
        self._parts = first[:5], first[9:], last[:5], last[9:]

    def render(self, stream_id: int, data: bytes) -> bytes:
        """Write a whole response: headers, one DATA frame, trailers."""
        before, headers, behind, trailers = self._parts
        identity = stream_id.to_bytes(4, "big")
        # Type and flags of DATA are 0.
        return b"%b%b%b%b\0\0%b%b%b%b%b" % (
            before,
            identity,
            headers,
            len(data).to_bytes(3, "big"),
            identity,
            data,
            behind,
            identity,
            trailers,
        )
