"""What ordinary clients do that a strict server might take for an attack, and what the server then says."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import h2.connection
import h2.events
import h2.settings
import hpack
import pytest
from fastapi.testclient import TestClient
from google.protobuf import descriptor_pb2

from serving.protocols.messages import HEALTH, REFLECTION, REFLECTION_ALPHA, SERVICE, message
from tests.conftest import running, with_grpc
from tests.grpc_api.wire import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PATH,
    PING,
    RST_STREAM,
    Wire,
    call,
    frame,
    framed,
    headers,
    infer,
    literal,
)

PROTOS = Path("serving/protocols/protos")


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    made = with_grpc(drain_s=1, max_body_bytes=1 << 22)
    with TestClient(made):
        yield made


@pytest.fixture
def port(app: Any) -> int:
    return int(app.state.serving.companion.port)


def test_a_thousand_calls_at_once_on_one_channel(port: int) -> None:
    """grpcio's client sends a WINDOW_UPDATE or two for each call before it has an answer: none is an attack."""

    async def ask() -> list[bytes]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            method = channel.unary_unary(PATH.decode())
            return await asyncio.gather(*(method(infer(), timeout=60) for _ in range(1000)))

    assert len(set(asyncio.run(ask()))) == 1


def test_metadata_that_is_too_large_costs_its_call_alone(port: int) -> None:
    """A call with 20 KB of metadata is told so; others on its connection, before and behind it, are answered."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary(PATH.decode())
        large = (("x-large", "a" * 20_000), ("x-kept", "b"))
        for _ in range(3):  # the header table is used from the second on
            futures = [method.future(infer(), timeout=20, metadata=more) for more in (None, large, (("x-kept", "b"),))]
            assert futures[1].exception().code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "metadata" in futures[1].exception().details()
            assert futures[0].result() == futures[2].result()


def test_a_client_without_a_header_table(port: int) -> None:
    """A client that allows no header table reads every answer: each block keeps to it from the first."""
    client = h2.connection.H2Connection()
    client.local_settings = h2.settings.Settings(True, {h2.settings.SettingCodes.HEADER_TABLE_SIZE: 0})
    client.initiate_connection()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        ended = []
        for stream in (1, 3):
            pairs = [(":method", "POST"), (":scheme", "http"), (":path", PATH.decode()), (":authority", "here")]
            client.send_headers(stream, [*pairs, ("content-type", "application/grpc"), ("te", "trailers")])
            client.send_data(stream, framed(infer()), end_stream=True)
            sock.sendall(client.data_to_send())
        while len(ended) < 2:
            for event in client.receive_data(sock.recv(65536)):
                if isinstance(event, h2.events.TrailersReceived):
                    ended.append(dict(event.headers))
    assert [trailers[b"grpc-status"] for trailers in ended] == [b"0", b"0"]


@pytest.mark.skipif(shutil.which("h2load") is None, reason="nghttp2's h2load is not installed")
@pytest.mark.parametrize("table", ["0", "4096"])
def test_h2load(port: int, table: str, tmp_path: Path) -> None:
    """nghttp2's client, with a header table and without, has all of 500 calls answered."""
    (tmp_path / "call").write_bytes(framed(infer()))
    headers = ["-Hcontent-type: application/grpc", "-Hte: trailers"]
    command = ["h2load", "-n500", "-c2", "-m50", f"--header-table-size={table}", f"-d{tmp_path / 'call'}", *headers]
    url = f"http://127.0.0.1:{port}{PATH.decode()}"
    said = subprocess.run([*command, url], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "500 succeeded, 0 failed" in said


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"content_type": b"application/json"}, b"415"),
        ({"content_type": b"application/grpcish"}, b"415"),
        ({"content_type": b"application/grpc+json"}, b"415"),
        ({"content_type": b"application/grpc+proto"}, b"200"),
        ({"content_type": b"application/grpc; charset=utf-8"}, b"200"),
    ],
)
def test_other_content_types_are_415(port: int, more: dict[str, bytes], status: bytes) -> None:
    """What is no gRPC gets the status of HTTP that gRPC's protocol names, and the connection goes on."""
    with Wire(port) as wire:
        wire.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, headers(**more)))
        assert wire.answer(1)[0][b":status"] == status
        assert call(wire, 3, infer())[0][b"grpc-status"] == b"0"


def test_another_method_than_post_is_405(port: int) -> None:
    """A browser that speaks HTTP/2 is told what would be right."""
    with Wire(port) as wire:
        block = headers().replace(literal(b":method", b"POST"), literal(b":method", b"GET"))
        wire.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block))
        found = wire.answer(1)[0]
        assert (found[b":status"], found[b"allow"]) == (b"405", b"POST")


def test_a_stream_that_ends_in_a_message_is_no_success(port: int) -> None:
    """Answers come for what was whole, and the status says that the rest was not."""
    with Wire(port) as wire:
        wire.send(frame(HEADERS, END_HEADERS, 1, headers(f"/{SERVICE}/ModelStreamInfer".encode())))
        wire.send(frame(DATA, END_STREAM, 1, framed(infer()) + framed(infer())[:-3]))
        found, data = wire.answer(1)
        assert found[b"grpc-status"] == b"3"
        assert data


@pytest.mark.parametrize("encoding", [b"identity", b"gzip"])
def test_a_stream_whose_later_request_is_refused_says_so(app: Any, port: int, encoding: bytes) -> None:
    """A message too large, or one that does not inflate, behind a right one: its status ends the stream."""
    bad = b"\0" + (2**31).to_bytes(4, "big") if encoding == b"identity" else framed(b"no gzip" * 20_000, 1)
    with Wire(port) as wire:
        path = f"/{SERVICE}/ModelStreamInfer".encode()
        wire.send(frame(HEADERS, END_HEADERS, 1, headers(path, grpc_encoding=encoding)))
        whole = framed(infer()) + bad
        for place in range(0, len(whole), 16_000):
            last = place + 16_000 >= len(whole)
            wire.send(frame(DATA, END_STREAM if last else 0, 1, whole[place : place + 16_000]))
        assert wire.answer(1)[0][b"grpc-status"] == (b"8" if encoding == b"identity" else b"3")


def test_reflection_describes_every_service(port: int) -> None:
    """Both versions list the services, and give a file by name and by symbol; what is not there is NOT_FOUND."""
    for service in (REFLECTION, REFLECTION_ALPHA):
        package = service.rpartition(".")[0]
        Question, Answer = (message(f"ServerReflection{n}", package) for n in ("Request", "Response"))
        asked = [
            Question(list_services=""),
            Question(file_containing_symbol=SERVICE),
            Question(file_containing_symbol=HEALTH),
            Question(file_by_filename="grpc_service.proto"),
            Question(file_containing_symbol="no.such.Service"),
            Question(all_extension_numbers_of_type="inference.ModelInferRequest"),
        ]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = channel.stream_stream(f"/{service}/ServerReflectionInfo")
            sent = (question.SerializeToString() for question in asked)
            answers = [Answer.FromString(answer) for answer in stub(sent, timeout=20)]
        listed = {one.name for one in answers[0].list_services_response.service}
        assert listed == {SERVICE, HEALTH, REFLECTION, REFLECTION_ALPHA}
        described = [
            descriptor_pb2.FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
            for answer in answers[1:4]
        ]
        assert [file.service[0].name for file in described] == [
            "GRPCInferenceService",
            "Health",
            "GRPCInferenceService",
        ]
        assert answers[4].error_response.error_code == 5
        assert not answers[5].HasField("error_response")
        assert [answer.original_request for answer in answers] == asked


def test_health_of_what_is_not_served(port: int) -> None:
    """Check says NOT_FOUND, as gRPC's health protocol has it; Watch answers SERVICE_UNKNOWN and stays."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status == 1
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=20)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        watching = stub.Watch(health_pb2.HealthCheckRequest(service="nope"), timeout=20)
        assert next(watching).status == 3
        watching.cancel()


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    """`make protos` was run: protoc makes the same bytes of the .proto files."""
    import sys

    names = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={tmp_path / 'made'}", *names]
    subprocess.run(command, cwd=PROTOS, check=True)
    assert (tmp_path / "made").read_bytes() == (PROTOS / "descriptors.binpb").read_bytes()


def test_the_end_of_a_drain_and_the_next_start(eventually: Callable[..., None]) -> None:
    """Calls that a client began before it knew are answered; what goes on too long gets UNAVAILABLE behind a GOAWAY.

    The next server has the port at once, though clients are still there.
    """
    with running("--grpc-port", "0", "--drain-s", "1") as server:
        found = re.search(r"gRPC: 127\.0\.0\.1:(\d+)", server.output())
        assert found
        with Wire(int(found[1])) as wire:
            path = f"/{SERVICE}/ModelStreamInfer".encode()
            wire.send(frame(HEADERS, END_HEADERS, 1, headers(path)), frame(DATA, 0, 1, framed(infer())))
            wire.until(DATA)
            server.process.terminate()
            assert int.from_bytes(wire.until(GOAWAY)[3][:4], "big") == 2**31 - 1
            ping = wire.until(PING)[3]
            assert call(wire, 3, infer())[0][b"grpc-status"] == b"0"
            wire.send(frame(PING, ACK, 0, ping))
            assert int.from_bytes(wire.until(GOAWAY)[3][:4], "big") == 3
            wire.send(frame(HEADERS, END_HEADERS, 5, headers()), frame(DATA, END_STREAM, 5, framed(infer())))
            kind, _, stream, payload = wire.until(RST_STREAM)
            assert (stream, payload) == (5, b"\0\0\0\x07")  # REFUSED_STREAM: to be tried elsewhere
            kind, flags, stream, payload = wire.until(HEADERS)
            trailers = dict(hpack.Decoder().decode(payload, raw=True))
            assert (kind, stream, flags & END_STREAM, trailers[b"grpc-status"]) == (HEADERS, 1, END_STREAM, b"14")
            assert int.from_bytes(wire.until(GOAWAY)[3][:4], "big") == 3
            assert server.process.wait(20) == 0
            with running("--grpc-port", found[1]) as again, Wire(int(found[1])) as other:
                assert call(other, 1, infer())[0][b"grpc-status"] == b"0"
                assert again.process.poll() is None
