"""HTTP/2 against h2 and hpack, which nobody here wrote: whatever they send is understood, and the other way round."""

from __future__ import annotations

import random
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http2.connection import Connection
from serving.http2.events import DataReceived, RequestReceived, StreamReset
from serving.http2.frames import ResponseTemplate
from serving.http2.hpack import CompressionError, Decoder, HeadersTooLarge, literal
from serving.http2.limits import Limits

NAMES = st.sampled_from(["accept", "te", "x-a", "x-b", "grpc-timeout", "authorization", ":path", "cookie"])
FIELDS = st.lists(st.tuples(NAMES, st.text(st.characters(max_codepoint=0xFF), max_size=60)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(FIELDS, st.booleans(), st.sampled_from([None, 0, 64, 500, 4096])), max_size=12))
def test_blocks_of_hpack_are_read(blocks: list[tuple[list[tuple[str, str]], bool, int | None]]) -> None:
    """Blocks that share a table, with Huffman codes or without, the table resized in between."""
    encoder, decoder = hpack.Encoder(), Decoder()
    for fields, huffman, size in blocks:
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in fields]
        if size is not None:
            encoder.header_table_size = size
        assert decoder.decode(encoder.encode(pairs, huffman=huffman)) == pairs


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=4))
def test_blocks_that_hpack_refuses_are_refused(blocks: list[bytes]) -> None:
    """Of any bytes both make the same headers, or none; where one refuses, the connection is over for both."""
    theirs, ours = hpack.Decoder(), Decoder()
    theirs.max_allowed_table_size = 4096
    for block in blocks:
        try:
            due: Any = [(bytes(n), bytes(v)) for n, v in theirs.decode(block, raw=True)]
        except Exception:
            due = None
        try:
            made: Any = ours.decode(block)
        except (CompressionError, HeadersTooLarge):
            made = None
        assert made == due
        if due is None:
            return


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 255, 5000])
def test_literals_are_read_by_hpack(size: int) -> None:
    """What is sent is what was meant, at every length of the length."""
    assert hpack.Decoder().decode(literal(b"x-name", b"v" * size), raw=True) == [(b"x-name", b"v" * size)]


class Server:
    """Echoes each request's body, short ones at once and long ones in two parts, and counts what h2 told it."""

    TEMPLATE = ResponseTemplate(b"\x88", literal(b"done", b"1"))

    def __init__(self) -> None:
        self.connection = Connection(dict, Limits(stream_window=70_000, connection_window=200_000, idle_frames=10**6))
        self.bodies: dict[int, bytes] = {}
        self.resets: list[int] = []

    def receive(self, data: bytes) -> None:
        connection = self.connection
        for event in connection.receive(data):
            if isinstance(event, RequestReceived):
                self.bodies[event.stream_id] = b""
            elif isinstance(event, DataReceived):
                self.bodies[event.stream_id] += event.data
                connection.replenish(event.stream_id)
            elif isinstance(event, StreamReset):
                self.resets.append(event.stream_id)
            else:
                raise AssertionError(event.error)
            if not isinstance(event, StreamReset) and event.end_stream:
                body = self.bodies[event.stream_id]
                if not connection.respond(event.stream_id, self.TEMPLATE, body):
                    connection.send_headers(event.stream_id, b"\x88")
                    connection.send_data(event.stream_id, [body[:10], b"", memoryview(body)[10:]])
                    connection.send_trailers(event.stream_id, literal(b"done", b"1"))

    def output(self, limit: int) -> bytes:
        return b"".join(self.connection.output(limit)[0])


@pytest.mark.parametrize("seed", range(6))
def test_h2s_requests_are_echoed(seed: int) -> None:  # noqa: PLR0912  one turn of the loop is one of the network's
    """Hundreds of requests of every size at once, padded, cut anywhere, through small windows, some reset midway."""
    noise = random.Random(seed)
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=False))
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: noise.choice([1000, 65535, 1 << 20])})
    if seed % 2:
        client.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: 0})
    server = Server()
    bodies = {n: noise.randbytes(noise.choice([0, 1, 100, 17_000, 150_000])) for n in range(1, 160, 2)}
    unsent, found, ended, resets = dict(bodies), dict.fromkeys(bodies, b""), {}, set()
    waiting = list(bodies)
    for _ in range(20_000):
        if waiting and noise.random() < 0.5:
            stream = waiting.pop(0)
            pairs = [(":method", "POST"), (":scheme", "http"), (":path", f"/{stream % 6}"), (":authority", "here")]
            client.send_headers(stream, [*pairs, ("x-seed", str(seed))], end_stream=not unsent[stream])
            if not unsent[stream]:
                del unsent[stream]
        for stream in [n for n in unsent if n not in waiting]:
            room = min(client.local_flow_control_window(stream), client.max_outbound_frame_size)
            size = min(room - 20, len(unsent[stream]), noise.choice([50, 5000, 16_384]))
            if noise.random() < 0.01:
                client.reset_stream(stream)
                resets.add(stream)
                del unsent[stream]
            elif size > 0:
                piece, unsent[stream] = unsent[stream][:size], unsent[stream][size:]
                client.send_data(stream, piece, not unsent[stream], pad_length=noise.choice([None, 0, 9]))
                if not unsent[stream]:
                    del unsent[stream]
        sent = client.data_to_send()
        while sent:
            cut = noise.choice([1, 9, 500, 100_000])
            server.receive(sent[:cut])
            sent = sent[cut:]
        while server.connection.has_output:
            for event in client.receive_data(server.output(noise.choice([100, 20_000, 1 << 20]))):
                if isinstance(event, h2.events.DataReceived):
                    found[event.stream_id] += event.data
                    client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.TrailersReceived):
                    ended[event.stream_id] = dict(event.headers)
                elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    raise AssertionError(event)
        if not waiting and len(ended) + len(resets - set(ended)) == len(bodies):
            break
    assert {n: found[n] for n in ended} == {n: bodies[n] for n in ended}
    assert set(ended) | resets == set(bodies)
    assert all(trailers == {b"done": b"1"} for trailers in ended.values())
    assert not server.connection.streams
