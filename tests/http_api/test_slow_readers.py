"""Clients that take their answers slowly, and requests that are in progress meanwhile."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import httpx2 as httpx
import pytest

from tests.conftest import Server, running
from tests.http_api.test_fast_path import BODY, PATH, connected, post

ROW = [5.1, 3.5, 1.4, 0.2]
MANY = json.dumps({"instances": [ROW] * 80_000}).encode()
FLAGS = ("--max-queued-rows", "200000")
Wait = Callable[[Callable[[], bool]], None]


def asked(server: Server, body: bytes) -> socket.socket:
    """Ask for a large answer with a small window, and read none of it."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(20)
    made.connect(("127.0.0.1", server.port))
    made.sendall(post(body))
    return made


def read_slowly(made: socket.socket) -> None:
    """Take some kilobytes fifty times a second, to the end."""
    while made.recv(65536):
        time.sleep(0.02)


@pytest.mark.parametrize("fast_path", ["--fast-path", "--no-fast-path"])
def test_a_slow_reader_is_held_to_a_rate(fast_path: str) -> None:
    """Who takes a little of an answer now and then, below the least rate, is cut as one who takes nothing."""
    with (
        running(fast_path, *FLAGS, "--write-s", "1", "--min-bytes-per-s", "100000000") as server,
        asked(server, MANY) as slow,
    ):
        with pytest.raises(ConnectionResetError):
            read_slowly(slow)
        assert 'cut_total{reason="slow_reader"} 1' in httpx.get(f"{server.url}/metrics").text


@pytest.mark.parametrize("fast_path", ["--fast-path", "--no-fast-path"])
def test_answers_that_nobody_takes_are_bytes_held(fast_path: str, eventually: Wait) -> None:
    """While a large answer waits for its client, others' large bodies find no room; they do when it has gone."""
    other = json.dumps({"instances": [ROW] * 5000}).encode()
    with running(fast_path, *FLAGS, "--max-held-bytes", str(2_000_000)) as server:

        def status() -> int:
            return httpx.post(server.url + PATH, content=other, timeout=20).status_code

        with asked(server, MANY):
            eventually(lambda: status() == 429)
            assert httpx.post(server.url + PATH, content=BODY).status_code == 200
        eventually(lambda: status() == 200)


def test_requests_in_progress_are_counted_whoever_answers_them(server: Server, eventually: Wait) -> None:
    """A request that is being read is in flight, on the short path from its body on and by ASGI from its head on."""

    def in_flight() -> float:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        which = 'serving_http_in_flight{method="POST",route="/v1/models/{model}:predict"} '
        return sum(float(line.removeprefix(which)) for line in lines if line.startswith(which))

    eventually(lambda: in_flight() == 0)
    with connected(server) as connection:
        connection.send(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        eventually(lambda: in_flight() == 1)
        connection.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert connection.answer()[0] == 200
    eventually(lambda: in_flight() == 0)
