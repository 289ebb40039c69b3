"""Rows answered by a running server, as streams of some thousands each, so that one that fails is sent again."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import quote, urlsplit

import pyarrow as pa
from pyarrow import ipc

from serving.bulk.batch import BadRow, Lines
from serving.bulk.columns import columns_of
from serving.bulk.formats import Format
from serving.bulk.scoring import Answer, Answered
from serving.engine.signature import Described, Signature
from serving.errors import InvalidRequest, NotReady
from serving.tensors import Tensors

_ARROW, _NDJSON = "application/vnd.apache.arrow.stream", "application/x-ndjson"
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Between tries, where the server does not say how long; it may be restarting, or others come first."""
_TIMEOUT_S = 120.0


class Remote:
    """A model of a server. A connection belongs to a thread."""

    def __init__(self, url: str, api_key: str | None, model: str, version: str | None) -> None:
        try:
            self._parts = urlsplit(url)
            known = self._parts.scheme in ("http", "https") and self._parts.hostname and self._parts.port != 0
        except ValueError:  # a bracket, or a port
            known = False
        if not known:
            raise InvalidRequest(f"--url: {url[:200]} is no address of a server")
        if not (api_key or "").isascii() or not (api_key or "").isprintable():
            raise InvalidRequest("$SERVING_API_KEY: is no key: it has characters that no header takes")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._model = model
        self._version = version
        self._own = threading.local()
        self._connections: list[http.client.HTTPConnection] = []
        self._closed = threading.Event()

    def describe(self) -> Described:
        """Ask what the model is like, and keep to the version that answers. Raises ServingError."""
        body = json.loads(self._asked("GET", self._path(), None, {}))
        self._version = str(body["version"])
        known = {name: body[name] for name in Signature.model_fields if name in body}
        # A server that is newer than this may say more.
        return Described(self._model, self._version, Signature.model_validate(known, extra="ignore"))

    def answering(self, described: Described, kind: Format) -> Answer:
        """Give what answers rows, as the form of a kind has them."""
        path = self._path() + ":predict"
        headers = {"Content-Type": _ARROW, "Accept": _NDJSON if kind == "ndjson" else _ARROW}
        answers = _lines if kind == "ndjson" else _tables

        def answer(inputs: Tensors, lines: Lines) -> Iterator[Answered]:
            sink = io.BytesIO()
            table = columns_of(described.signature, inputs)
            with ipc.new_stream(sink, table.schema) as stream:
                stream.write_batch(table)
            return answers(self._asked("POST", path, sink.getvalue(), headers), lines)

        return answer

    def close(self) -> None:
        """Have nobody wait for the server any more, on whatever thread."""
        self._closed.set()
        for connection in self._connections:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)  # wakes who reads; closing does not
            connection.close()

    def _path(self) -> str:
        path = f"{self._parts.path.rstrip('/')}/v1/models/{quote(self._model, safe='')}"
        return path if self._version is None else f"{path}/versions/{quote(self._version, safe='')}"

    def _asked(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> bytes:
        """Ask until there is an answer. Raises ServingError."""
        said = "it can't be reached"
        for pause in (*_PAUSES_S, 0.0):
            if self._closed.is_set():
                break
            try:
                connection = self._connection()
                connection.request(method, path, body, self._headers | headers)
                response = connection.getresponse()
                answer = response.read()
                if response.status < 400:
                    return answer
            except (OSError, http.client.HTTPException) as error:  # cut short too
                self._own.connection = None
                said = type(error).__name__ if isinstance(error, http.client.HTTPException) else str(error).lower()
            else:
                said = _said(answer) or f"status {response.status}"
                if response.status not in (429, 503):
                    kind = InvalidRequest if response.status < 500 else NotReady
                    raise kind(f"the server says: {said}")
            self._closed.wait(pause)
        raise NotReady(f"the server does not answer: {said}")

    def _connection(self) -> http.client.HTTPConnection:
        made: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if made is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            made = self._own.connection = kind(str(self._parts.hostname), self._parts.port, timeout=_TIMEOUT_S)
            self._connections.append(made)
        return made


def _said(answer: bytes) -> str | None:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return None


def _lines(answer: bytes, lines: Lines) -> Iterator[Answered]:
    found = answer.splitlines(keepends=True)[:-1]  # the last has the counts
    _check_count(len(found), lines)
    for index, line in enumerate(found):
        if line.startswith(b'{"error"'):
            error = json.loads(line)["error"]
            yield BadRow(int(lines[index]), error["path"], error["message"])
        else:
            yield [line], lines[index : index + 1]


def _tables(answer: bytes, lines: Lines) -> Iterator[Answered]:
    with ipc.open_stream(answer) as stream:
        table = stream.read_all().combine_chunks()
    _check_count(len(table), lines)
    refused = table["error.message"].is_valid().to_numpy()
    if not refused.any():
        yield table.to_batches()[0], lines
        return
    bad = table.filter(pa.array(refused))
    for number, path, message in zip(
        lines[refused], bad["error.path"].to_pylist(), bad["error.message"].to_pylist(), strict=True
    ):
        yield BadRow(int(number), path, message)
    if not refused.all():
        yield table.filter(pa.array(~refused)).combine_chunks().to_batches()[0], lines[~refused]


def _check_count(rows: int, lines: Lines) -> None:
    if rows != len(lines):
        raise NotReady(f"the server answered {rows} rows of {len(lines)}")
