"""A server of the shipped models with gRPC, and one that answers as it is told, to count what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest

from tests.conformance.own import grpc_address
from tests.conftest import running


class Addresses(NamedTuple):
    http: str
    grpc: str


@pytest.fixture(scope="session")
def addresses() -> Iterator[Addresses]:
    with running("--grpc-port", "0") as server:
        yield Addresses(server.url, grpc_address(server))


class Told:
    """Answers each request by the next of `answers`: (status, headers, body), or None to close without a word."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes] | None] = []
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.connections: set[Any] = set()
        self.piece = 1 << 20  # bytes of a body that come at a time
        self.slow = threading.Event()
        told = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                told.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                told.connections.add(self.client_address)
                answer = told.answers.pop(0)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, body = answer
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                for start in range(0, len(body), told.piece):
                    told.slow.wait(0.2 if start else 0)
                    self.wfile.write(body[start : start + told.piece])

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self.slow.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def told() -> Iterator[Told]:
    stub = Told()
    yield stub
    stub.stop()
