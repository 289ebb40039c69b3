"""A Unix socket instead of an address."""

from __future__ import annotations

import shutil
import socket
import stat
from pathlib import Path

import httpx2 as httpx
import pytest

from serving.server import CannotStart, bind_unix
from tests.conftest import MODELS, Server

ROW = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


def test_workers_share_a_unix_socket(tmp_path: Path) -> None:
    """Requests over the socket are answered, also to a client that says no more; only owner and group may; it goes."""
    path = tmp_path / "serving.sock"
    shutil.copytree(MODELS / "iris", tmp_path / "models" / "iris")
    server = Server("--uds", str(path), "--workers", "2", models=tmp_path / "models")
    try:
        server.wait()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with httpx.Client(base_url="http://localhost", transport=httpx.HTTPTransport(uds=str(path))) as client:
            for _ in range(3):
                answer = client.post("/v1/models/iris:predict", json={"instances": [ROW]})
                assert answer.json()["predictions"][0]["label"] == "setosa"
            document = client.get("/openapi.json", headers={"x-forwarded-prefix": "/ml"}).json()
            assert document["servers"][0]["url"] == "/ml"
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n")
            raw.shutdown(socket.SHUT_WR)
            assert raw.recv(4096).startswith(b"HTTP/1.1 200")
        with pytest.raises(CannotStart, match="address already in use"):
            bind_unix(path)
    finally:
        assert server.stop() == 0
    assert not path.exists()


def test_what_a_dead_server_left_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    """The file of a server that has gone is no obstacle; a file of another kind stays, and the start is refused."""
    path = tmp_path / "serving.sock"
    bind_unix(path).close()
    assert path.is_socket()
    bind_unix(path).close()
    other = tmp_path / "notes"
    other.write_text("mine")
    with pytest.raises(CannotStart, match="address already in use; choose another with --uds"):
        bind_unix(other)
    assert other.read_text() == "mine"
    with pytest.raises(CannotStart, match="path too long"):
        bind_unix(tmp_path / ("long" * 40))
