"""A gRPC client that writes frames by hand, right ones and wrong ones, and shares none of the code that it tests."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

import numpy as np
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple

from serving.protocols.messages import message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 1
END_HEADERS, PADDED = 4, 8
CANCEL = 8

PATH = b"/inference.GRPCInferenceService/ModelInfer"
Request, Response = message("ModelInferRequest"), message("ModelInferResponse")
ROW = np.array([5.1, 3.5, 1.4, 0.2], np.float32)


def infer(rows: int = 1, identity: str = "", **more: Any) -> bytes:
    return Request(
        model_name="iris",
        id=identity,
        inputs=[{"name": "features", "datatype": "FP32", "shape": [rows, 4]}],
        raw_input_contents=[np.tile(ROW, rows).tobytes()],
        **more,
    ).SerializeToString()


def framed(body: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(body).to_bytes(4, "big") + body


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


def literal(name: bytes, value: bytes) -> bytes:
    """Write a header that no table keeps, so that the same bytes do for every connection."""
    return Encoder().encode([NeverIndexedHeaderTuple(name, value)], huffman=False)


def headers(path: bytes = PATH, **more: bytes) -> bytes:
    pairs = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"here"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *((name.replace("_", "-").encode(), value) for name, value in more.items()),
    ]
    return b"".join(literal(*pair) for pair in pairs)


class Wire:
    """A client that writes frames by hand."""

    def __init__(self, port: int, *, greet: bool = True) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._data = b""
        self._decoder = Decoder()
        if greet:
            self.send(PREFACE, frame(SETTINGS, 0, 0))

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    def next(self) -> tuple[int, int, int, bytes]:
        """Return kind, flags, stream and payload of the next frame."""
        while len(self._data) < 9 or len(self._data) < 9 + int.from_bytes(self._data[:3], "big"):
            more = self.sock.recv(65536)
            if not more:
                raise ConnectionError("the server closed")
            self._data += more
        size = int.from_bytes(self._data[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", self._data[3:9])
        payload, self._data = self._data[9 : 9 + size], self._data[9 + size :]
        return kind, flags, stream, payload

    def until(self, wanted: int) -> tuple[int, int, int, bytes]:
        while (found := self.next())[0] != wanted:
            pass
        return found

    def answer(self, stream: int) -> tuple[dict[bytes, bytes], bytes]:
        """Return the headers, trailers among them, and the data of a whole answer."""
        found: dict[bytes, bytes] = {}
        data = b""
        while True:
            kind, flags, of, payload = self.next()
            if kind == GOAWAY and (any(payload[4:8]) or int.from_bytes(payload[:4], "big") < stream):
                raise ConnectionError(payload[8:].decode())
            if of != stream:
                continue
            if kind == HEADERS:
                found.update(self._decoder.decode(payload, raw=True))
            elif kind == DATA:
                data += payload
            elif kind == RST_STREAM:
                raise ConnectionError(f"reset with {int.from_bytes(payload, 'big')}")
            if flags & END_STREAM and kind in (HEADERS, DATA):
                return found, data

    def goaway(self) -> int:
        """Return the code with which the server ends the connection."""
        code = int.from_bytes(self.until(GOAWAY)[3][4:8], "big")
        with contextlib.suppress(ConnectionError):
            while True:
                self.next()
        return code

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def call(wire: Wire, stream: int, body: bytes, **more: bytes) -> tuple[dict[bytes, bytes], bytes]:
    wire.send(frame(HEADERS, END_HEADERS, stream, headers(**more)), frame(DATA, END_STREAM, stream, framed(body)))
    return wire.answer(stream)
