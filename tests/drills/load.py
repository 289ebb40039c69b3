"""Load from other processes that remembers every answer: when it was asked, when it came, and which version gave it."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NamedTuple


class Answer(NamedTuple):
    """One answer; times are monotonic seconds. version: empty where it is no answer at all, and `error` says why."""

    asked: float
    came: float
    version: str
    error: str = ""


class Asker:
    """One HTTP connection to a V1 prediction path; blocking, and as bare as can be."""

    def __init__(self, port: int, path: str, row: list[float]) -> None:
        self._port = port
        body = json.dumps({"instances": [row]}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._socket: socket.socket | None = None

    def ask(self) -> Answer:
        """Ask once; connects where it has to."""
        asked = time.monotonic()
        try:
            if self._socket is None:
                self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=30)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(self._request)
            status, body, last = self._read(self._socket)
        except OSError as error:
            self.close()
            return Answer(asked, time.monotonic(), "", f"{type(error).__name__}: {error}")
        came = time.monotonic()
        if last:
            self.close()
        if status != b"200":
            return Answer(asked, came, "", f"{status.decode()} {body[:200].decode()}")
        return Answer(asked, came, json.loads(body)["model_version"])

    @staticmethod
    def _read(sock: socket.socket) -> tuple[bytes, bytes, bool]:
        data = b""
        while b"\r\n\r\n" not in data:
            more = sock.recv(65536)
            if not more:
                raise ConnectionError("closed before the answer")
            data += more
        head, body = data.split(b"\r\n\r\n", 1)
        lines = head.lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
        while len(body) < length:
            more = sock.recv(65536)
            if not more:
                raise ConnectionError("closed within the answer")
            body += more
        return lines[0].split(b" ")[1], body, b"connection: close" in lines

    def close(self) -> None:
        """Drop the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _http(  # noqa: PLR0917  what a spawned process gets is positional
    port: int, path: str, row: list[float], stop: Event, pause: float, results: Connection
) -> None:
    asker = Asker(port, path, row)
    answers = []
    while not stop.is_set():
        answers.append(asker.ask())
        if pause:
            time.sleep(pause)
    results.send(answers)


def _grpc(  # noqa: PLR0917
    address: str, model: str, row: list[float], stop: Event, pause: float, results: Connection
) -> None:
    import grpc
    import numpy as np
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address))
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="features", datatype="FP32", shape=[1, len(row)])
    request.raw_input_contents.append(np.array(row, np.float32).tobytes())
    answers = []
    while not stop.is_set():
        asked = time.monotonic()
        try:
            response = stub.ModelInfer(request, timeout=30, wait_for_ready=True)
            answers.append(Answer(asked, time.monotonic(), response.model_version))
        except grpc.RpcError as error:
            answers.append(Answer(asked, time.monotonic(), "", f"{error.code()} {error.details()}"))  # type: ignore[attr-defined]
        if pause:
            time.sleep(pause)
    results.send(answers)


class Load:
    """The askers that run; `stop` ends them and returns what they got."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._running: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def http(self, port: int, path: str, row: list[float], *, askers: int, pause: float = 0.0) -> None:
        """Start closed-loop HTTP askers, each a process with one connection."""
        for _ in range(askers):
            self._start(_http, port, path, row, self._stop, pause)

    def grpc(self, address: str, model: str, row: list[float], *, askers: int, pause: float = 0.0) -> None:
        """Start closed-loop gRPC askers, each a process with one channel."""
        for _ in range(askers):
            self._start(_grpc, address, model, row, self._stop, pause)

    def _start(self, target: object, *arguments: object) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=target, args=(*arguments, theirs), daemon=True)  # type: ignore[arg-type]
        process.start()
        theirs.close()
        self._running.append((process, ours))

    def stop(self) -> list[Answer]:
        """End the load and return every answer, in no particular order."""
        self._stop.set()
        answers: list[Answer] = []
        for process, results in self._running:
            answers += [Answer(*answer) for answer in results.recv()]
            process.join(30)
        self._running.clear()
        return answers


@contextmanager
def load() -> Iterator[Load]:
    """Have askers around something; they end with it whatever happens."""
    made = Load()
    try:
        yield made
    finally:
        made.stop()
