"""gRPC on the wire: what clients may send, what they may not, and what neither of them costs the others."""

from __future__ import annotations

import contextlib
import gzip
import re
import struct
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest

from serving.http2.hpack import CompressionError, Decoder
from serving.protocols.messages import message
from tests.conftest import Server, running
from tests.grpc_api.wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PATH,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Response,
    Wire,
    call,
    frame,
    framed,
    headers,
    infer,
    number,
)


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    with running("--grpc-port", "0") as server:
        yield server


@pytest.fixture(scope="module")
def port(served: Server) -> int:
    found = re.search(r"gRPC: 127\.0\.0\.1:(\d+)", served.output())
    assert found
    return int(found[1])


@pytest.fixture
def wire(port: int) -> Iterator[Wire]:
    made = Wire(port)
    yield made
    made.sock.close()


def label(data: bytes) -> bytes:
    response = Response.FromString(data[5:])
    position = [output.name for output in response.outputs].index("label")
    return bytes(response.raw_output_contents[position])


SETOSA = b"\x06\0\0\0setosa"


def test_planned_and_unplanned_requests_have_the_same_answer(wire: Wire) -> None:
    """The second request of a kind is read by a shorter way than the first, and answered with the same bytes."""
    first = call(wire, 1, infer(2))
    second = call(wire, 3, infer(2))
    assert first == second
    assert first[0][b"grpc-status"] == b"0"
    assert label(first[1]) == SETOSA * 2
    named = [Response.FromString(call(wire, n, infer(2, identity=str(n)))[1][5:]).id for n in (5, 7)]
    assert named == ["5", "7"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_request_may_come_in_pieces(wire: Wire, size: int) -> None:
    """Frames are cut anywhere by the network."""
    whole = frame(HEADERS, END_HEADERS, 1, headers()) + frame(DATA, END_STREAM, 1, framed(infer()))
    for place in range(0, len(whole), size):
        wire.send(whole[place : place + size])
    assert label(wire.answer(1)[1]) == SETOSA


def test_a_message_in_many_frames_padding_and_continuations(wire: Wire) -> None:
    """What HTTP/2 lets a client do to a request does not change it."""
    block, body = headers(), framed(infer(3))
    wire.send(
        frame(HEADERS, PADDED, 1, b"\x05" + block[:20] + bytes(5)),
        frame(CONTINUATION, 0, 1, block[20:50]),
        frame(CONTINUATION, END_HEADERS, 1, block[50:]),
        frame(DATA, 0, 1, body[:3]),
        frame(DATA, PADDED, 1, b"\x07" + body[3:20] + bytes(7)),
        frame(PING, 0, 0, b"12345678"),
        frame(0xFA, 0, 0, b"of a kind that nobody knows"),
        frame(DATA, 0, 1, body[20:]),
        frame(DATA, END_STREAM | PADDED, 1, b"\x03" + bytes(3)),
    )
    assert label(wire.answer(1)[1]) == SETOSA * 3


def test_pings_are_echoed_and_settings_acknowledged(wire: Wire) -> None:
    """A client may ask whether the server lives."""
    wire.send(frame(PING, 0, 0, b"abcdefgh"))
    assert wire.until(PING)[1:] == (ACK, 0, b"abcdefgh")


def test_an_answer_waits_for_the_clients_window(port: int) -> None:
    """A client that has room for 10 bytes gets 10 bytes, and the rest when it has more."""
    wire = Wire(port, greet=False)
    wire.send(PREFACE, frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 10)))
    wire.send(frame(HEADERS, END_HEADERS, 1, headers()), frame(DATA, END_STREAM, 1, framed(infer(50))))
    assert len(wire.until(DATA)[3]) == 5  # the message's flag and length
    assert len(wire.until(DATA)[3]) == 5
    wire.send(frame(WINDOW_UPDATE, 0, 1, number(100)))
    assert len(wire.until(DATA)[3]) == 100
    wire.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 100_000)))
    assert wire.until(HEADERS)[1] & END_STREAM
    wire.sock.close()


def test_compressed_messages_are_inflated_and_bombs_are_not(wire: Wire) -> None:
    """gzip is taken up to the limit; what would inflate beyond it is refused."""
    for stream, body, due in ((1, infer(), b"0"), (3, bytes(64 * 1024 * 1024), b"8")):
        wire.send(
            frame(HEADERS, END_HEADERS, stream, headers(grpc_encoding=b"gzip")),
            frame(DATA, END_STREAM, stream, framed(gzip.compress(body), 1)),
        )
        assert wire.answer(stream)[0][b"grpc-status"] == due


@pytest.mark.parametrize(
    ("more", "body", "status"),
    [
        ({"path": b"/inference.GRPCInferenceService/Nope"}, infer(), b"12"),
        ({"grpc_timeout": b"soon"}, infer(), b"13"),
        ({"grpc_encoding": b"br"}, infer(), b"12"),
        ({}, b"\xff\xff\xff", b"3"),
        ({}, infer()[:-3], b"3"),
        ({}, infer() + infer()[-20:], b"3"),
        ({"grpc_timeout": b"1n"}, infer(), b"4"),
    ],
)
def test_wrong_calls_have_a_status(wire: Wire, more: dict[str, bytes], body: bytes, status: bytes) -> None:
    """A call that can't be answered says why, and the connection goes on."""
    found, _ = call(wire, 1, body, **more)
    assert found[b"grpc-status"] == status
    assert found[b"grpc-message"]
    assert label(call(wire, 3, infer())[1]) == SETOSA


def test_a_message_over_the_limit_is_refused_before_it_is_sent(wire: Wire) -> None:
    """Its announced length is enough."""
    wire.send(
        frame(HEADERS, END_HEADERS, 1, headers()), frame(DATA, 0, 1, b"\0" + (2**31).to_bytes(4, "big") + bytes(100))
    )
    assert wire.answer(1)[0][b"grpc-status"] == b"8"
    assert label(call(wire, 3, infer())[1]) == SETOSA


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        pytest.param([frame(DATA, 0, 1, b"x")], 1, id="data before headers"),
        pytest.param([frame(HEADERS, END_HEADERS, 2, headers())], 1, id="an even stream"),
        pytest.param([frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff")], 9, id="no header block"),
        pytest.param([frame(HEADERS, 0, 1, headers()), frame(PING, 0, 0, bytes(8))], 1, id="a block interrupted"),
        pytest.param(
            [frame(HEADERS, 0, 1, headers()), *[frame(CONTINUATION, 0, 1, bytes(9000))] * 9], 11, id="endless headers"
        ),
        pytest.param([frame(PING, 0, 0, bytes(17000))], 6, id="a frame too large"),
        pytest.param([frame(SETTINGS, 0, 0, b"123")], 6, id="half a setting"),
        pytest.param([frame(WINDOW_UPDATE, 0, 0, number(2**31 - 1))], 3, id="a window too large"),
        pytest.param(
            [frame(HEADERS, END_HEADERS, 1, headers()), b"\xff\xff\xff\0\0\0\0\0\x01"], 6, id="a giant frame announced"
        ),
        pytest.param([frame(RST_STREAM, 0, 9, number(8))], 1, id="a reset of nothing"),
    ],
)
def test_broken_http2_ends_the_connection_alone(port: int, frames: list[bytes], code: int) -> None:
    """Whoever breaks the protocol is told how, and nobody else notices."""
    other, wire = Wire(port), Wire(port)
    wire.send(*frames)
    assert wire.goaway() == code
    assert label(call(other, 1, infer())[1]) == SETOSA
    wire.sock.close()
    other.sock.close()


def test_more_than_the_window_is_refused(wire: Wire) -> None:
    """A client can't make the server keep more than it offered."""
    wire.send(frame(HEADERS, END_HEADERS, 1, headers()), frame(DATA, 0, 1, b"\0\0\xff" + bytes(32000)))
    wire.send(struct.pack(">HBBBI", (1 << 20) >> 8, 0, DATA, 0, 1))
    assert wire.goaway() == 3


def test_rapid_resets_end_the_connection(port: int) -> None:
    """Opening and resetting without end is no way to keep the server busy (CVE-2023-44487)."""
    with Wire(port) as wire:
        with contextlib.suppress(ConnectionError):  # it may be closed before all is sent
            for n in range(1, 6001, 2):
                wire.send(frame(HEADERS, END_HEADERS, n, headers()), frame(RST_STREAM, 0, n, number(8)))
        with contextlib.suppress(ConnectionResetError):  # what was sent behind the end may cost us its reason
            assert wire.goaway() == 11


def test_http1_on_this_port_is_closed(port: int) -> None:
    """A browser or a probe that speaks HTTP/1 is not left hanging."""
    with Wire(port, greet=False) as wire:
        wire.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wire.goaway() == 1


def test_grpcs_own_client_has_many_calls_in_flight(port: int) -> None:
    """A real channel, 100 calls of four sizes at a time, each with its own answer; a megabyte in another."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary(PATH.decode())
        futures = [(rows, ask.future(infer(rows, identity=str(i)))) for i, rows in enumerate([1, 40, 100, 7] * 25)]
        for i, (rows, future) in enumerate(futures):
            response = Response.FromString(future.result(timeout=60))
            assert response.id == str(i)
            assert response.outputs[0].shape[0] == rows
        large = infer(70_000)
        with pytest.raises(grpc.RpcError) as refused:
            ask(large, timeout=60)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # more rows than the queue takes


def test_a_stream_answers_all_and_ends(port: int) -> None:
    """1,000 requests on one stream, more than are answered at a time, and the stream ends when the client's does."""
    StreamResponse = message("ModelStreamInferResponse")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        requests = (infer(identity=str(i)) if i % 100 else b"\xff" for i in range(1, 1001))
        answers = [StreamResponse.FromString(answer) for answer in ask(requests, timeout=60)]
    assert len(answers) == 1000
    assert sum(bool(answer.error_message) for answer in answers) == 10
    assert len({answer.infer_response.id for answer in answers}) == 991


def test_clients_that_cancel_leave_nothing(served: Server, port: int, eventually: Callable[..., None]) -> None:
    """Calls cancelled in flight, and connections that vanish, leave no rows in the queue."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary(PATH.decode())
        for future in [ask.future(infer(2000)) for _ in range(50)]:
            future.cancel()
    wire = Wire(port)
    for n in range(1, 41, 2):
        wire.send(frame(HEADERS, END_HEADERS, n, headers()), frame(DATA, END_STREAM, n, framed(infer(100))))
    wire.sock.close()
    other = Wire(port)
    eventually(lambda: call(other, 1, infer())[0][b"grpc-status"] == b"0")
    other.sock.close()


def test_draining_finishes_what_was_accepted() -> None:
    """After SIGTERM calls in progress are answered, new ones are refused, and watchers of health are told."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with running("--grpc-port", "0", "--max-delay-ms", "800") as server:
        found = re.search(r"gRPC: 127\.0\.0\.1:(\d+)", server.output())
        assert found
        wire = Wire(int(found[1]))
        with grpc.insecure_channel(f"127.0.0.1:{found[1]}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            wire.send(frame(HEADERS, END_HEADERS, 1, headers()), frame(DATA, END_STREAM, 1, framed(infer())))
            wire.send(frame(PING, 0, 0, bytes(8)))
            wire.until(PING)  # it was read
            ending = threading.Thread(target=server.stop)
            ending.start()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            wire.until(GOAWAY)
            found_headers, data = wire.answer(1)
            assert found_headers[b"grpc-status"] == b"0"
            assert label(data) == SETOSA
            ending.join(30)
            wire.sock.close()
            assert server.process.returncode == 0


@pytest.mark.parametrize(
    "block", [b"\x80", b"\xbf\x00", b"\x3f\xe2\x1f", b"\x00\x05ab", b"\x00\x81\xff\x00", b"\x7f\xff\xff\xff\xff\x0f"]
)
def test_header_blocks_that_are_none_are_refused(block: bytes) -> None:
    """A block that can't be read is never guessed at."""
    with pytest.raises(CompressionError):
        Decoder().decode(block)


def test_the_examples_of_the_rfc_are_read() -> None:
    """RFC 7541, C.4: three requests with Huffman codes on one connection."""
    decoder = Decoder()
    blocks = (
        "828684418cf1e3c2e5f23a6ba0ab90f4ff",
        "828684be5886a8eb10649cbf",
        "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
    )
    last = [decoder.decode(bytes.fromhex(block)) for block in blocks][-1]
    assert dict(last) == {
        b":method": b"GET",
        b":scheme": b"https",
        b":path": b"/index.html",
        b":authority": b"www.example.com",
        b"custom-key": b"custom-value",
    }
