"""Requests as bytes, right or wrong, over one plain socket; and the way to gRPC."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import grpc

from tests.conftest import Server

LENGTH = "inference-header-content-length"


class Answer(NamedTuple):
    """A whole HTTP answer; status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    def content(self) -> bytes:
        """Return the body without its coding."""
        return zlib.decompress(self.body, 47) if "content-encoding" in self.headers else self.body


CLOSED = Answer(0, {}, b"")


def post(path: str, body: bytes, *, length: object = None, **headers: object) -> bytes:
    """Write a request as it goes over the wire; `length` is what Content-Length says, true where it is None."""
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Connection:
    """A keep-alive connection that sends what it is given; silence for `patience` seconds is a TimeoutError."""

    def __init__(self, port: int, *, patience: float = 20) -> None:
        self._port = port
        self._patience = patience
        self._socket: socket.socket | None = None
        self._left = b""

    def ask(self, request: bytes, *, end: bool = False) -> Answer:
        """Send, and read one answer; `end` says that nothing follows, as a client does that has died midway."""
        self.send(request)
        if end:
            self.end()
        return self.next()

    def send(self, data: bytes) -> None:
        """Send, and read nothing; connects where it has to."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), self._patience)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Closed by a reset: tens of thousands of connections would use up the ports otherwise.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._left = b""
        with contextlib.suppress(ConnectionError):  # it was refused before it was whole: the answer says why
            self._socket.sendall(data)

    def end(self) -> None:
        """Say that nothing follows, as a client does that has died midway."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def readable(self, seconds: float) -> bool:
        """Wait a little for something to read."""
        return bool(self._socket and select.select([self._socket], [], [], seconds)[0])

    def next(self) -> Answer:
        """Read one answer."""
        while (head := self._left.find(b"\r\n\r\n")) < 0:
            if not self._more():
                return CLOSED
        lines = self._left[:head].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = end = head + 4
        if lines[0].split()[1].startswith("1"):
            pass  # 100 Continue: the answer itself follows
        elif "content-length" in headers:
            end = body + int(headers["content-length"])
            while len(self._left) < end:
                if not self._more():
                    return CLOSED
        else:  # uvicorn's own refusal of what is no HTTP ends with the connection
            while self._more():
                pass
            end = len(self._left)
        answer = Answer(int(lines[0].split()[1]), headers, self._left[body:end])
        self._left = self._left[end:]
        if headers.get("connection") == "close":
            self.close()
        return answer

    def _more(self) -> bool:
        if self._socket is None:
            return False
        try:
            got = self._socket.recv(1 << 20)
        except ConnectionError:
            got = b""
        if not got:
            self.close()
        self._left += got
        return bool(got)

    def close(self) -> None:
        """Close; the next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def grpc_channel(server: Server) -> grpc.Channel:
    """Connect to a server that runs with `--grpc-port 0`."""
    until = time.monotonic() + 10
    while not (found := re.search(r"gRPC: (\S+)", server.output())):  # stands in the last line of its greeting
        assert time.monotonic() < until, server.output()
        time.sleep(0.02)
    return grpc.insecure_channel(found[1], [("grpc.max_receive_message_length", -1)])


def workers(server: Server) -> list[int]:
    """Return the pids of a server's worker processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == server.process.pid and b"spawn_main" in command:
            found.append(int(stat.parent.name))
    return sorted(found)


def resident(pid: int) -> float:
    """Return a process's resident memory in MiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024
