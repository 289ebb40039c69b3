"""What a server must make of each wrong frame, and of each odd right one: the cases of h2spec, as bytes.

Source: https://github.com/summerwind/h2spec, sections http2 and hpack, by their numbers there; its generic section
sends right frames, as the tests against h2 do by the thousand. Two of its cases follow RFC 7540 in what RFC 9113
dropped, a stream that depends on itself: priorities are ignored here.
"""

from __future__ import annotations

from typing import Any

import pytest
from hpack import Encoder, NeverIndexedHeaderTuple
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame

from serving.http2.connection import Connection
from serving.http2.events import DataReceived, RequestReceived
from serving.http2.hpack import literal
from serving.http2.limits import Limits
from tests.grpc_api.wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    number,
)

PRIORITIZED = 0x20
NO, PROTOCOL, FLOW, CLOSED, SIZE, REFUSED, COMPRESSION, CALM = 0, 1, 3, 5, 6, 7, 9, 11
GREETING = PREFACE + frame(SETTINGS, 0, 0)
COMMON = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "here")]


class Peer:
    """A server that answers each whole request with five bytes, and what it wrote, read by hyperframe."""

    def __init__(self, greeting: bytes = GREETING, **limits: Any) -> None:
        self.connection = Connection(dict, Limits(**limits))
        self.written: list[Frame] = []
        self.requests: dict[int, dict[bytes, bytes] | None] = {}
        self.bodies: dict[int, bytes] = {}
        self.send(greeting)
        self.written.clear()

    def send(self, *sent: bytes) -> None:
        for event in self.connection.receive(b"".join(sent)):
            if isinstance(event, RequestReceived):
                self.requests[event.stream_id] = event.request
                self.bodies[event.stream_id] = b""
            elif isinstance(event, DataReceived):
                self.bodies[event.stream_id] += event.data
            if isinstance(event, RequestReceived | DataReceived) and event.end_stream:
                self.connection.send_headers(event.stream_id, b"\x88")
                self.connection.send_data(event.stream_id, [b"12345"])
                self.connection.send_trailers(event.stream_id, literal(b"done", b"yes"))
        while self.connection.has_output:
            written = b"".join(self.connection.output(1 << 20)[0])
            while written:
                made, size = Frame.parse_frame_header(memoryview(written[:9]))
                made.parse_body(memoryview(written[9 : 9 + size]))
                self.written.append(made)
                written = written[9 + size :]

    def all(self, kind: type[Frame]) -> list[Any]:
        return [made for made in self.written if isinstance(made, kind)]


def block(*more: tuple[str, str], without: str = "", common: list[tuple[str, str]] = COMMON) -> bytes:
    pairs = [*(pair for pair in common if pair[0] != without), *more]
    return bytes(Encoder().encode([NeverIndexedHeaderTuple(*pair) for pair in pairs]))


def opened(stream: int = 1, flags: int = END_HEADERS, *more: tuple[str, str], without: str = "") -> bytes:
    return frame(HEADERS, flags, stream, block(*more, without=without))


def whole(*more: tuple[str, str], without: str = "") -> bytes:
    return opened(1, END_HEADERS | END_STREAM, *more, without=without)


def setting(key: int, value: int) -> bytes:
    return frame(SETTINGS, 0, 0, key.to_bytes(2, "big") + number(value))


def updated(stream: int, by: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, number(by))


REST = frame(CONTINUATION, END_HEADERS, 1, literal(b"x", b"y"))
ENDED = whole()
RESET = opened() + frame(RST_STREAM, 0, 1, number(8))

# By h2spec's number, or the section of RFC 9113: what is sent, and the code of the GOAWAY that it costs.
ENDS_CONNECTION = {
    "hpack 2.3.3/1": (frame(HEADERS, 5, 1, block() + b"\xc6"), COMPRESSION),
    "hpack 2.3.3/2": (frame(HEADERS, 5, 1, block() + b"\x7f\x07\x00"), COMPRESSION),
    "hpack 4.2/1": (frame(HEADERS, 5, 1, block() + b"\x21"), COMPRESSION),
    "hpack 5.2/1": (frame(HEADERS, 5, 1, block() + bytes.fromhex("0085f2b24a84ff8449509fff")), COMPRESSION),
    "hpack 5.2/2": (frame(HEADERS, 5, 1, block() + bytes.fromhex("0085f2b24a84ff83495090")), COMPRESSION),
    "hpack 5.2/3": (frame(HEADERS, 5, 1, block() + bytes.fromhex("0085f2b24a84ff874951fffffffa7f")), COMPRESSION),
    "hpack 6.1/1": (frame(HEADERS, 5, 1, block() + b"\x80"), COMPRESSION),
    "hpack 6.3/1": (frame(HEADERS, 5, 1, b"\x3f\xe2\x1f" + block()), COMPRESSION),
    "4.2/2": (opened() + b"\x10\x00\x01\x00\x01\x00\x00\x00\x01", SIZE),
    "4.2/3": (b"\x10\x00\x01\x01\x05\x00\x00\x00\x01", SIZE),
    "4.3/1": (frame(HEADERS, 5, 1, b"\x40"), COMPRESSION),
    "4.3/2": (opened(1, 0) + frame(PRIORITY, 0, 1, bytes(5)) + REST, PROTOCOL),
    "4.3/3": (opened(1, 0) + opened(3) + REST, PROTOCOL),
    "5.1/1": (frame(DATA, END_STREAM, 1, b"test"), PROTOCOL),
    "5.1/2": (frame(RST_STREAM, 0, 1, number(8)), PROTOCOL),
    "5.1/3": (updated(1, 100), PROTOCOL),
    "5.1/4": (REST, PROTOCOL),
    "5.1/7": (opened(1, END_HEADERS | END_STREAM) + REST, PROTOCOL),
    "5.1/8": (RESET + frame(DATA, END_STREAM, 1, b"test"), CLOSED),
    "5.1/9": (RESET + opened(1, END_HEADERS | END_STREAM), CLOSED),
    "5.1/10": (RESET + REST, PROTOCOL),
    "5.1/13": (ENDED + REST, PROTOCOL),
    "5.1.1/1": (opened(2), PROTOCOL),
    "5.1.1/2": (opened(5) + opened(3), PROTOCOL),
    "5.4.1/1, 5.4.1/2": (frame(PING, 0, 3, bytes(8)), PROTOCOL),
    "5.5/2": (opened(1, 0) + frame(0x16, 0, 0, bytes(8)), PROTOCOL),
    "6.1/1": (frame(DATA, END_STREAM, 0, b"test"), PROTOCOL),
    "6.1/3": (opened() + frame(DATA, END_STREAM | PADDED, 1, b"\x06Test"), PROTOCOL),
    "6.2/1": (opened(1, 0) + frame(PRIORITY, 0, 1, bytes(5)), PROTOCOL),
    "6.2/3": (opened(0), PROTOCOL),
    "6.2/4": (frame(HEADERS, 0xD, 1, b"\xff" + block()), PROTOCOL),
    "6.3/1": (frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    "6.4/1": (frame(RST_STREAM, 0, 0, number(8)), PROTOCOL),
    "6.4/3": (opened() + frame(RST_STREAM, 0, 1, bytes(3)), SIZE),
    "6.5/1": (frame(SETTINGS, ACK, 0, b"\0"), SIZE),
    "6.5/2": (frame(SETTINGS, 0, 1, b"\0\3\0\0\0\x64"), PROTOCOL),
    "6.5/3": (frame(SETTINGS, 0, 0, b"\0\3\0"), SIZE),
    "6.5.2/1": (setting(2, 2), PROTOCOL),
    "6.5.2/2, 6.9.2/3": (setting(4, 2**31), FLOW),
    "6.5.2/3": (setting(5, 16383), PROTOCOL),
    "6.5.2/4": (setting(5, 2**24), PROTOCOL),
    "6.7/4": (frame(PING, 0, 0, bytes(6)), SIZE),
    "6.8/1": (frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL),
    "6.9/1": (updated(0, 0), PROTOCOL),
    "6.9/3": (frame(WINDOW_UPDATE, 0, 0, bytes(3)), SIZE),
    "6.9.1/2": (updated(0, 2**31 - 1), FLOW),
    "6.9.2: a window that settings make too large": (opened() + updated(1, 2**30) + setting(4, 2**31 - 1), FLOW),
    "6.10/2": (opened(1, 0) + frame(CONTINUATION, 0, 1, b"") + frame(DATA, 1, 1, b"test"), PROTOCOL),
    "6.10/3": (opened(1, 0) + frame(CONTINUATION, END_HEADERS, 0, b""), PROTOCOL),
    "6.10/4": (opened() + REST, PROTOCOL),
    "6.10/5": (opened(1, 0) + REST + REST, PROTOCOL),
    "6.10/6": (opened(1, 0) + frame(DATA, END_STREAM, 1, b"test"), PROTOCOL),
    "8.2/1": (frame(PUSH_PROMISE, END_HEADERS, 1, number(3) + block()), PROTOCOL),
    "10.5.1: headers that are announced too large": (b"\1\0\1\1\5\0\0\0\1", CALM),
    "10.5.1: headers without end": (opened(1, 0) + frame(CONTINUATION, 0, 1, bytes(9000)) * 8, CALM),
}

# What costs a stream, and with which code.
ENDS_STREAM = {
    "5.1/5, 6.1/2": (opened(1, END_HEADERS | END_STREAM) + frame(DATA, END_STREAM, 1, b"test"), CLOSED),
    "5.1/6": (opened(1, END_HEADERS | END_STREAM) * 2, CLOSED),
    "6.3/2": (opened() + frame(PRIORITY, 0, 1, bytes(4)), SIZE),
    "6.9/2": (opened() + updated(1, 0), PROTOCOL),
    "6.9.1/3": (opened() + updated(1, 2**31 - 1), FLOW),
    "8.1/1": (opened() + frame(DATA, 0, 1, bytes(20)) + frame(HEADERS, END_HEADERS, 1, literal(b"x", b"y")), PROTOCOL),
    "8.1.2/1": (whole(("X-TEST", "ok")), PROTOCOL),
    "8.1.2.1/1": (whole((":test", "ok")), PROTOCOL),
    "8.1.2.1/2": (whole((":status", "200")), PROTOCOL),
    "8.1.2.1/3": (opened() + frame(HEADERS, 5, 1, literal(b":method", b"POST")), PROTOCOL),
    "8.1.2.1/4": (frame(HEADERS, 5, 1, literal(b"x-test", b"ok") + block()), PROTOCOL),
    "8.1.2.2/1": (whole(("connection", "keep-alive")), PROTOCOL),
    "8.1.2.2/2": (whole(("te", "trailers, deflate")), PROTOCOL),
    "8.1.2.3/1": (whole((":path", ""), without=":path"), PROTOCOL),
    "8.1.2.3/2": (whole(without=":method"), PROTOCOL),
    "8.1.2.3/3": (whole(without=":scheme"), PROTOCOL),
    "8.1.2.3/4": (whole(without=":path"), PROTOCOL),
    "8.1.2.3/5": (whole((":method", "POST")), PROTOCOL),
    "8.1.2.3/6": (whole((":scheme", "http")), PROTOCOL),
    "8.1.2.3/7": (whole((":path", "/")), PROTOCOL),
    "8.1.2.6/1": (opened(1, 4, ("content-length", "1")) + frame(DATA, END_STREAM, 1, b"test"), PROTOCOL),
    "8.1.2.6/2": (opened(1, 4, ("content-length", "1")) + frame(DATA, 0, 1, b"t") + frame(DATA, 1, 1, b"t"), PROTOCOL),
    "8.1.1: less than content-length": (opened(1, 4, ("content-length", "9")) + frame(DATA, 1, 1, b"test"), PROTOCOL),
    "8.1.1: more than content-length": (opened(1, 4, ("content-length", "1")) + frame(DATA, 0, 1, bytes(20)), PROTOCOL),
    "8.1.1: content-length and no body": (whole(("content-length", "9")), PROTOCOL),
    "8.1.1: two lengths": (whole(("content-length", "1"), ("content-length", "2")), PROTOCOL),
    "8.1.1: a length that is no number": (whole(("content-length", "-1")), PROTOCOL),
    "8.2.1: NUL": (whole(("x", "a\0b")), PROTOCOL),
    "8.2.1: CR LF": (whole(("x", "a\r\ny: b")), PROTOCOL),
    "8.2.1: LF in :path": (whole((":path", "/\n"), without=":path"), PROTOCOL),
    "8.2.1: a space in a name": (whole(("a b", "c")), PROTOCOL),
    "8.2.1: a colon in a name": (whole(("a:b", "c")), PROTOCOL),
    "8.2.1: a name without letters": (whole(("", "c")), PROTOCOL),
    "8.2.2: transfer-encoding": (whole(("transfer-encoding", "chunked")), PROTOCOL),
    "8.2.2: upgrade": (whole(("upgrade", "h2c")), PROTOCOL),
    "8.2.1: in trailers": (opened() + frame(HEADERS, 5, 1, literal(b"X", b"y")), PROTOCOL),
}

# What is answered as if it were not there, with the length of each DATA frame.
IS_ANSWERED = {
    "4.1/1, 5.5/1": (frame(0x16, 0, 0, bytes(8)) + ENDED, [5]),
    "4.1/2": (frame(PING, 0x16, 0, bytes(8)) + ENDED, [5]),
    "4.1/3": (b"\0\0\x08\x06\x16\x80\0\0\0" + bytes(8) + ENDED, [5]),
    "4.2/1": (opened() + frame(DATA, END_STREAM, 1, bytes(16384)), [5]),
    "4.2: a frame as large as was offered": (opened() + frame(DATA, END_STREAM, 1, bytes(1 << 20)), [5]),
    "4.2: an unknown frame as large as was offered": (frame(0x16, 0, 0, bytes(1 << 20)) + ENDED, [5]),
    "6.5.2/5": (setting(0xFF, 1) + ENDED, [5]),
    "6.5.3/1": (frame(SETTINGS, 0, 0, b"\0\4\0\0\0\x64\0\4\0\0\0\1") + ENDED + updated(1, 9), [1, 4]),
    "6.7/2": (frame(PING, ACK, 0, b"invalid!") + ENDED, [5]),
    "6.9.1/1": (setting(4, 1) + ENDED + updated(1, 9), [1, 4]),
    "6.9.2/1": (setting(4, 0) + ENDED + setting(4, 1) + updated(1, 9), [1, 4]),
    "6.9.2/2": (setting(4, 3) + ENDED + setting(4, 2) + updated(1, 2) + updated(1, 9), [3, 1, 1]),
    "6.10/1": (opened(1, END_STREAM) + frame(CONTINUATION, 0, 1, literal(b"x", bytes(20).hex().encode())) + REST, [5]),
    "7/1": (frame(GOAWAY, 0, 0, number(0) + number(0xFF)) + ENDED, [5]),
    "7/2": (opened(1) + frame(RST_STREAM, 0, 1, number(0xFF)) + opened(3, 5), [5]),
    "8.1: trailers": (opened() + frame(DATA, 0, 1, bytes(20)) + frame(HEADERS, 5, 1, literal(b"x", b"y")), [5]),
    "8.1.1: as much as content-length": (opened(1, 4, ("content-length", "4")) + frame(DATA, 1, 1, b"test"), [5]),
    "8.5: te": (whole(("te", "trailers")), [5]),
}


@pytest.mark.parametrize(("sent", "code"), ENDS_CONNECTION.values(), ids=ENDS_CONNECTION)
def test_what_ends_the_connection(sent: bytes, code: int) -> None:
    """A peer that breaks the protocol is told how, once, and nothing that it still sends is read."""
    peer = Peer()
    peer.send(sent)
    assert [made.error_code for made in peer.all(GoAwayFrame)] == [code]
    assert isinstance(peer.written[-1], GoAwayFrame)
    peer.send(opened(99, 5), frame(PING, 0, 0, bytes(8)))
    assert isinstance(peer.written[-1], GoAwayFrame)


@pytest.mark.parametrize(("sent", "code"), ENDS_STREAM.values(), ids=ENDS_STREAM)
def test_what_ends_a_stream_alone(sent: bytes, code: int) -> None:
    """A request that is wrong is reset, and others on its connection are answered."""
    peer = Peer()
    # In pieces: what comes behind the answer to a whole request is another case.
    peer.connection.receive(sent) if sent[4] & END_STREAM else peer.send(sent)
    peer.send(opened(3, END_HEADERS | END_STREAM))
    assert [(made.stream_id, made.error_code) for made in peer.all(RstStreamFrame)] == [(1, code)]
    assert not peer.all(GoAwayFrame)
    assert [made.stream_id for made in peer.all(DataFrame)] == [3]


@pytest.mark.parametrize(("sent", "lengths"), IS_ANSWERED.values(), ids=IS_ANSWERED)
def test_what_is_answered(sent: bytes, lengths: list[int]) -> None:
    """What is odd and allowed changes nothing."""
    peer = Peer()
    for piece in _frames(sent):
        peer.send(piece)
    assert [len(made.data) for made in peer.all(DataFrame)] == lengths
    assert "END_STREAM" in peer.all(HeadersFrame)[-1].flags
    assert not peer.all(GoAwayFrame)


def _frames(sent: bytes) -> list[bytes]:
    found = []
    while sent:
        size = 9 + int.from_bytes(sent[:3], "big")
        found.append(sent[:size])
        sent = sent[size:]
    return found


def test_frames_on_a_stream_that_was_answered_are_an_error_of_the_connection() -> None:
    """h2spec 5.1/11 and 5.1/12: DATA and HEADERS behind a whole exchange."""
    for late in (frame(DATA, END_STREAM, 1, b"test"), opened(1, 5)):
        peer = Peer()
        peer.send(ENDED)
        peer.send(late)
        assert [made.error_code for made in peer.all(GoAwayFrame)] == [CLOSED]


def test_frames_under_way_when_a_stream_was_reset_here_are_harmless() -> None:
    """A peer may have sent more before it read that its stream was reset, or answered early."""
    peer = Peer()
    peer.send(opened(), updated(1, 0), frame(DATA, 0, 1, bytes(100)), frame(HEADERS, 5, 1, literal(b"x", b"y")))
    peer.send(opened(3))
    peer.connection.send_trailers(3, b"\x88")
    peer.send(frame(DATA, END_STREAM, 3, bytes(100)), updated(3, 5), opened(5, 5))
    assert not peer.all(GoAwayFrame)
    assert [made.stream_id for made in peer.all(DataFrame)] == [5]


def test_the_preface() -> None:
    """h2spec 3.5: settings are the first that a server sends; what is no preface ends the connection."""
    peer = Peer(greeting=b"")
    peer.send(PREFACE[:7])
    peer.send(PREFACE[7:])
    first = Connection(dict, Limits()).output(0)[0][0]
    assert Frame.parse_frame_header(memoryview(first[:9]))[0].type == SETTINGS
    assert not peer.all(GoAwayFrame)
    peer.send(opened(1, 5))  # settings did not come
    assert [made.error_code for made in peer.all(GoAwayFrame)] == [PROTOCOL]
    other = Peer(greeting=b"INVALID CONNECTION PREFACE\r\n\r\n")
    assert other.connection.closed


def test_pings_and_settings_are_acknowledged() -> None:
    """h2spec 6.5.3/2 and 6.7/1."""
    peer = Peer()
    peer.send(frame(PING, 0, 0, b"h2spec!!"), setting(2, 0))
    assert [(made.opaque_data, set(made.flags)) for made in peer.all(PingFrame)] == [(b"h2spec!!", {"ACK"})]
    assert [set(made.flags) for made in peer.all(SettingsFrame)] == [{"ACK"}]


def test_one_stream_more_than_was_offered_is_refused() -> None:
    """h2spec 5.1.2/1; and those that are open are answered."""
    peer = Peer(max_streams=3)
    peer.send(*(opened(stream) for stream in (1, 3, 5, 7)))
    assert [(made.stream_id, made.error_code) for made in peer.all(RstStreamFrame)] == [(7, REFUSED)]
    peer.send(*(frame(DATA, END_STREAM, stream, b"test") for stream in (1, 3, 5)))
    peer.send(opened(9, 5))
    assert [made.stream_id for made in peer.all(DataFrame)] == [1, 3, 5, 9]


def test_headers_larger_than_offered_keep_the_table_in_step() -> None:
    """A request with too many headers is reported as one without any; those behind it are read by the same table."""
    peer, encoder = Peer(), Encoder()
    large = [*COMMON, ("x-large", "a" * 20_000), ("x-kept", "b")]
    blocks = [encoder.encode(headers) for headers in ([*COMMON, ("x-kept", "b")], large, [*COMMON, ("x-kept", "b")])]
    for stream, made in zip((1, 3, 5), blocks, strict=True):
        peer.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, made))
    assert peer.requests[3] is None
    assert peer.requests[1] == peer.requests[5] == {**{k.encode(): v.encode() for k, v in COMMON}, b"x-kept": b"b"}
    assert [made.stream_id for made in peer.all(DataFrame)] == [1, 3, 5]


@pytest.mark.parametrize("size", [0, 100])
def test_a_lowered_table_size_is_answered_with_an_update(size: int) -> None:
    """RFC 7541, 4.2: the next block of headers begins with the size of the table that its writer keeps; once."""
    peer = Peer()
    peer.send(setting(1, size), opened(1, 5))
    peer.send(opened(3, 5))
    blocks = [made.data for made in peer.all(HeadersFrame)]
    assert [made[:1] for made in blocks] == [b"\x20", b"\0", b"\x88", b"\0"]


def test_a_drain_refuses_no_stream_that_was_under_way() -> None:
    """RFC 9113, 6.8: the first GOAWAY refuses none; once its peer has read it, later ones never raise their id."""
    peer = Peer()
    peer.send(opened(1))
    peer.connection.drain()
    peer.send(opened(3))
    (ping,) = peer.all(PingFrame)
    peer.send(frame(PING, ACK, 0, bytes(8)), opened(5), frame(PING, ACK, 0, ping.opaque_data), opened(7))
    peer.connection.close(0)
    peer.send(b"")
    while peer.connection.has_output:
        peer.written += _read(b"".join(peer.connection.output(0)[0]))
    assert [made.last_stream_id for made in peer.all(GoAwayFrame)] == [2**31 - 1, 5, 5]
    assert sorted(peer.requests) == [1, 3, 5]
    assert [(made.stream_id, made.error_code) for made in peer.all(RstStreamFrame)] == [(7, REFUSED)]


def _read(written: bytes) -> list[Frame]:
    found = []
    for each in _frames(written):
        made, _ = Frame.parse_frame_header(memoryview(each[:9]))
        made.parse_body(memoryview(each[9:]))
        found.append(made)
    return found


@pytest.mark.parametrize(
    "provoke",
    [
        pytest.param(lambda n: updated(n, 0), id="a window that grows by nothing"),
        pytest.param(lambda n: updated(n, 2**31 - 1), id="a window too large"),
        pytest.param(lambda n: frame(PRIORITY, 0, n, bytes(4)), id="a short priority"),
        pytest.param(lambda n: frame(HEADERS, END_HEADERS, n, literal(b"x", b"y")), id="headers in the middle"),
        pytest.param(lambda n: frame(RST_STREAM, 0, n, number(8)), id="a reset of its own"),
    ],
)
def test_resets_that_the_peer_provokes_count_as_its_own(provoke: Any) -> None:
    """CVE-2023-44487 and CVE-2025-8671: opening streams only to have them reset ends the connection."""
    peer = Peer(idle_frames=100)
    for n in range(1, 2000, 2):
        peer.send(opened(n), provoke(n))
        if peer.connection.closed:
            break
    assert peer.connection.closed
    assert 90 < n / 2 < 110
    assert [made.error_code for made in peer.all(GoAwayFrame)] == [CALM]


def test_requests_pay_for_the_window_updates_of_ordinary_clients() -> None:
    """Two for each, however many are open; without requests they are as idle as pings."""
    peer = Peer(idle_frames=100, max_streams=1000)
    for n in range(1, 2000, 2):
        peer.send(opened(n), updated(0, 10), updated(n, 10))
    assert not peer.connection.closed
    peer.send(updated(0, 1) * 101)
    assert peer.connection.closed
