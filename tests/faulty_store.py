"""An object store as the world has them: moto's S3 server in a process, and a proxy before it that breaks answers."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3

FAULTS = ("error", "lost", "slow_down", "truncated", "wrong", "stale", "slow", "away", "refused")
"""500 before and after it is done; 503; half a body; other bytes; yesterday's listing; late; no answer; 403."""
_BODY = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>no</Message></Error>"


class FaultyStore:
    """A running S3 store, `environment` for its clients. fault(method, path): the fault of a request, '' for none."""

    def __init__(self, port: int) -> None:
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.failed = 0
        self.slow_s = 0.5
        self._port = port
        self._listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
        self._puts = threading.Lock()  # the server checks If-Match and writes in two steps
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                fault = store.fault(self.command, self.path)
                store.failed += bool(fault)
                if fault == "away":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if fault == "slow":
                    time.sleep(store.slow_s)
                if fault in ("error", "slow_down", "refused"):
                    status, code = {
                        "error": (500, b"InternalError"),
                        "slow_down": (503, b"SlowDown"),
                        "refused": (403, b"AccessDenied"),
                    }[fault]
                    self._send(status, [], _BODY % code)
                    return
                listing = self.command == "GET" and "list-type" in self.path
                if fault == "stale" and listing and self.path in store._listings:
                    self._send(*store._listings[self.path])
                    return
                status, headers, content = store._ask(self.command, self.path, body, dict(self.headers.items()))
                if listing and fault != "stale":
                    store._listings[self.path] = status, headers, content
                if fault == "lost":
                    self._send(500, [], _BODY % b"InternalError")
                elif fault == "wrong" and content:
                    self._send(status, headers, content[:-1] + bytes([content[-1] ^ 1]))
                else:
                    self._send(status, headers, content, half=fault == "truncated")

            def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, half: bool = False) -> None:
                self.send_response_only(status)
                told = {name.lower() for name, _ in headers}
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                if "content-length" not in told:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if half else content)
                self.close_connection = self.close_connection or half

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

            def log_message(self, *_: Any) -> None: ...

        class Proxy(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None: ...  # clients leave

        self._server = Proxy(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="a",
            aws_secret_access_key="b",
            region_name="us-east-1",
        )
        """Straight to the store, past all faults."""

    def _ask(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        with self._puts if method == "PUT" else threading.Lock():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

    def names(self) -> list[str]:
        """Return the keys of all objects."""
        return [each["Key"] for each in self.client.list_objects_v2(Bucket="bucket").get("Contents", [])]

    def put(self, key: str, folder: Path, *, but: str = "") -> None:
        """Copy the files of a folder, as `aws s3 cp --recursive` does."""
        for file in folder.iterdir():
            if file.name != but:
                self.client.put_object(Bucket="bucket", Key=f"{key}/{file.name}", Body=file.read_bytes())

    def remove(self, key: str) -> None:
        """Remove all objects below a key."""
        for each in self.names():
            if each.startswith(f"{key.rstrip('/')}/"):
                self.client.delete_object(Bucket="bucket", Key=each)

    def stale_now(self, *, without: str) -> None:
        """Have stale listings lack objects."""
        for path, (status, headers, content) in self._listings.items():
            parts = re.split(rb"(?=<Contents>)|(?<=</Contents>)", content)
            kept = b"".join(part for part in parts if without.encode() not in part)
            self._listings[path] = status, [h for h in headers if h[0].lower() != "content-length"], kept

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    """Run a store with an empty bucket, called bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    store = None
    try:
        until = time.monotonic() + 30
        while not _listens(port):
            assert time.monotonic() < until, "the store did not start"
            time.sleep(0.05)
        store = FaultyStore(port)
        store.client.create_bucket(Bucket="bucket")
        yield store
    finally:
        if store is not None:
            store.close()
        process.kill()
        process.wait()
