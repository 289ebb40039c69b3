"""The gRPC side of a worker and what it stands on: models that come and go, bounds on what is held, endings."""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from fastapi.testclient import TestClient

from serving.engine.request import LOW
from serving.grpc_api import connection as connections
from serving.grpc_api.message_reader import MessageReader
from serving.protocols.infer_codec import cut_up
from serving.protocols.messages import SERVICE, message
from tests.conftest import running, with_grpc
from tests.grpc_api.wire import (
    CANCEL,
    DATA,
    END_HEADERS,
    GOAWAY,
    HEADERS,
    PATH,
    PING,
    RST_STREAM,
    SETTINGS,
    Request,
    Wire,
    call,
    frame,
    framed,
    headers,
    infer,
    number,
)

Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture
def app() -> Iterator[Any]:
    made = with_grpc(max_queued_rows=60_000, drain_s=1, max_body_bytes=1 << 22)
    with TestClient(made) as client:
        made.state.portal = client.portal
        yield made


def test_a_model_goes_with_its_last_call(app: Any, eventually: Wait) -> None:
    """No call that was answered, refused or left holds a version that was unloaded, without the help of a collector."""

    async def unload() -> None:
        app.state.serving.fleet.models.pop("iris")
        for hook in app.state.serving.fleet.changed:
            hook()

    with grpc.insecure_channel(f"127.0.0.1:{app.state.serving.companion.port}") as channel:
        ask = channel.unary_unary(PATH.decode())
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        gc.disable()
        try:
            for body in (infer(), infer(), infer(5000)):
                ask(body, timeout=20)
            assert len(list(stream(iter([infer(), b"\xff", infer(20_000)]), timeout=20))) == 3
            with pytest.raises(grpc.RpcError):
                ask(infer(100_000), timeout=20)  # more than the queue takes
            for body in (infer(), infer(20_000)):
                ask.future(body).cancel()
            ask(infer(), timeout=20)
            last = weakref.ref(app.state.serving.fleet.models["iris"].default)
            app.state.portal.call(unload)
            eventually(lambda: last() is None)
        finally:
            gc.enable()


def test_a_planned_request_keeps_its_priority(app: Any) -> None:
    """What a request asks of the queue counts each time, not only the first time that it is seen."""
    codec = app.state.serving.fleet.models["iris"].default.codecs["grpc"]
    body = Request.FromString(infer())
    body.parameters["priority"].int64_param = 3
    data = body.SerializeToString()
    cut = cut_up(data)
    assert cut is not None
    assert codec.read(data, cut, body).priority == LOW
    assert codec.read(data, cut).priority == LOW


def test_calls_in_progress_are_bounded(app: Any, monkeypatch: pytest.MonkeyPatch, eventually: Wait) -> None:
    """Where a worker has all the calls that it takes, the next is told so, and taken again when one has ended."""
    monkeypatch.setattr(connections, "MOST_CALLS", 2)
    with Wire(app.state.serving.companion.port) as wire:
        for stream in (1, 3):
            wire.send(frame(HEADERS, END_HEADERS, stream, headers()))
        assert call(wire, 5, infer())[0][b"grpc-status"] == b"8"
        wire.send(frame(RST_STREAM, 0, 1, number(CANCEL)))
        assert call(wire, 7, infer())[0][b"grpc-status"] == b"0"
    eventually(lambda: app.state.serving.companion.in_progress == 0)


def test_bytes_that_are_held_are_bounded(app: Any, eventually: Wait) -> None:
    """A message counts from its announcement until its call ends; what is too much is refused before it comes."""
    bodies = app.state.serving.shared.bodies
    bodies.limit = 300_000
    announced = b"\0" + (200_000).to_bytes(4, "big")
    with Wire(app.state.serving.companion.port) as wire:
        for stream, path in ((1, PATH), (101, f"/{SERVICE}/ModelStreamInfer".encode())):
            wire.send(frame(HEADERS, END_HEADERS, stream, headers(path)), frame(DATA, 0, stream, announced))
            wire.send(frame(PING, 0, 0, bytes(8)))
            wire.until(PING)
            assert 200_000 <= bodies.held < 200_500
            found, _ = call(wire, stream + 2, infer(50_000))
            assert (found[b"grpc-status"], found[b"retry-after"]) == (b"8", b"1")
            wire.send(frame(RST_STREAM, 0, stream, number(CANCEL)))
            eventually(lambda: bodies.held == 0)
        assert call(wire, 201, infer(5_000, outputs=[{"name": "label"}]))[0][b"grpc-status"] == b"0"
    with grpc.insecure_channel(f"127.0.0.1:{app.state.serving.companion.port}") as channel:
        ask = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            for _ in range(3):  # three of 80 KB fit, and go when they are answered
                answers = list(ask(iter([infer(5_000)] * 3), timeout=20, compression=compression))
                assert not any(message("ModelStreamInferResponse").FromString(a).error_message for a in answers)
    eventually(lambda: bodies.held == 0)


def test_messages_of_nothing_are_counted(app: Any, eventually: Wait) -> None:
    """A stream of empty messages, of which a megabyte is 200,000, takes no more memory than others may."""
    bodies = app.state.serving.shared.bodies
    bodies.limit = 300_000
    with Wire(app.state.serving.companion.port) as wire:
        path = f"/{SERVICE}/ModelStreamInfer".encode()
        wire.send(frame(HEADERS, END_HEADERS, 1, headers(path)), frame(DATA, 0, 1, bytes(5 * 100_000)))
        assert wire.answer(1)[0][b"grpc-status"] == b"8"
    eventually(lambda: bodies.held == 0)


def test_many_messages_at_once_leave_others_their_turn() -> None:
    """Whoever takes a thousand messages that have come gives the event loop back again and again."""

    async def take() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        connection = SimpleNamespace(server=SimpleNamespace(max_bytes=100))
        call = SimpleNamespace(connection=connection, hold=lambda _: None, release=lambda _: None)
        reader = MessageReader(call, streaming=True)  # type: ignore[arg-type]
        reader.feed(bytes(5 * 1000))
        beside = asyncio.create_task(other())
        while reader.messages:
            assert await reader.take() == b""
        beside.cancel()
        return turns

    assert asyncio.run(take()) > 50


def test_a_second_signal_cuts_streams_short() -> None:
    """A stream that stays open holds up the drain; a second signal ends both, and tells the caller so."""
    with running("--grpc-port", "0", "--drain-s", "600") as server:
        found = re.search(r"gRPC: 127\.0\.0\.1:(\d+)", server.output())
        assert found
        with Wire(int(found[1])) as wire:
            wire.send(frame(HEADERS, END_HEADERS, 1, headers(f"/{SERVICE}/ModelStreamInfer".encode())))
            wire.send(frame(DATA, 0, 1, framed(infer())))
            wire.until(DATA)
            server.process.send_signal(signal.SIGTERM)
            wire.until(GOAWAY)
            wire.send(frame(DATA, 0, 1, framed(infer())))
            wire.until(DATA)
            server.process.send_signal(signal.SIGTERM)
            assert wire.answer(1)[0][b"grpc-status"] == b"14"
            with pytest.raises(ConnectionError):
                wire.until(SETTINGS)  # there is none, only the end
            wire.send(frame(PING, 0, 0, bytes(8)))  # as clients do that have not heard of it yet
        assert server.stop() == 0
        assert "Traceback" not in server.output()
