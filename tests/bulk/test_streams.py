"""Streams of rows over HTTP: each row's own answer, in bounded memory, behind all others, for those who may."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import ipc
from typer.testing import CliRunner

from serving.access.key_store import KeyStore
from serving.access.rate_limits import Rates
from serving.command_line import app
from serving.engine.session import OnnxSession
from serving.repository.traffic import choose
from tests.bulk.test_formats import IRIS, ndjson
from tests.conftest import MODELS, Server, running

CSV, NDJSON, ARROW = "text/csv", "application/x-ndjson", "application/vnd.apache.arrow.stream"
ROWS = [{name: value + index % 7 / 3 for name, value in IRIS.items()} for index in range(3000)]
Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make a key without limits and one that may ask for 1000 rows a second."""
    path = tmp_path_factory.mktemp("keys") / "serving.keys"
    store = KeyStore(path)
    made = {"free": store.create("free", frozenset({"predict"}))}
    made["limited"] = store.create("limited", frozenset({"predict"}), rates=Rates(rows_per_s=1000))
    return {"path": str(path), **made}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, str]) -> Iterator[Server]:
    """Serve iris, and under another name with a canary, to clients that have to be quick."""
    folder = tmp_path_factory.mktemp("models")
    canary = {"version": "2", "percent": 50, "sticky": {"header": "x-user"}}
    for name, traffic in {"iris": {"stable": "2"}, "tried": {"stable": "1", "canary": canary}}.items():
        shutil.copytree(MODELS / "iris", folder / name)
        (folder / name / "traffic.json").write_text(json.dumps(traffic))
    flags = ["--keys", keys["path"], "--write-s", "1", "--body-s", "4"]
    with running(*flags, models=folder) as started:
        yield started


@pytest.fixture
def client(server: Server, keys: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20, headers={"authorization": f"Bearer {keys['free']}"}) as made:
        yield made


def ask(client: httpx.Client, body: bytes, kind: str, *, model: str = "iris", **headers: str) -> httpx.Response:
    given = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(f"/v1/models/{model}:predict", content=body, headers=given)


def written(kind: str) -> bytes:
    if kind == NDJSON:
        return ndjson(ROWS)
    sink = io.BytesIO()
    if kind == CSV:
        pd.DataFrame(ROWS).to_csv(sink, index=False)
    else:
        table = pa.Table.from_pylist(ROWS)
        with ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=1000)
    return sink.getvalue()


@pytest.mark.parametrize(("given", "wanted"), [(CSV, NDJSON), (NDJSON, ARROW), (ARROW, CSV)])
def test_each_row_has_the_answer_that_it_has_alone(client: httpx.Client, given: str, wanted: str) -> None:
    """Whatever the formats in and out, the answers are those of single requests, in the order of the rows."""
    path = "/v1/models/iris:predict"
    expected = client.post(path, json={"instances": ROWS}).json()["predictions"]
    answer = ask(client, written(given), given, accept=wanted)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith(wanted)
    assert answer.headers["x-model-version"] == "2"
    if wanted == NDJSON:
        *lines, last = answer.text.splitlines()
        answers = [json.loads(line)["prediction"] for line in lines]
        assert [each["label"] for each in answers] == [each["label"] for each in expected]
        for each, alone in zip(answers, expected, strict=True):
            assert each["probabilities"] == pytest.approx(alone["probabilities"], rel=1e-6)
        assert json.loads(last) == {"summary": {"good": len(ROWS), "bad": 0}}
        return
    body = io.BytesIO(answer.content)
    frame = pd.read_csv(body) if wanted == CSV else ipc.open_stream(body).read_pandas()
    assert frame["label"].tolist() == [each["label"] for each in expected]
    for name in expected[0]["probabilities"]:
        scores = [each["probabilities"][name] for each in expected]
        assert frame[f"probabilities.{name}"].tolist() == pytest.approx(scores, rel=1e-6)


def test_streams_without_rows_have_no_answers(client: httpx.Client) -> None:
    """Blank lines are no rows."""
    for body in (b"", b"\n\n"):
        assert ask(client, body, NDJSON).text == '{"summary":{"good":0,"bad":0}}\n'
    assert len(pd.read_csv(io.StringIO(ask(client, ",".join(IRIS).encode(), CSV).text))) == 0


def test_bad_rows_are_told_in_their_place_and_counted(client: httpx.Client) -> None:
    """A bad row ends nothing: its record is where its answer would be, and metrics count it."""
    before = total(client, "serving_bad_rows_total")
    rows: list[Any] = [*ROWS[:5], IRIS | {"petal_width": "wide"}, *ROWS[:5]]
    lines = [json.loads(line) for line in ask(client, ndjson(rows), NDJSON).text.splitlines()]
    assert [*lines[5]] == ["error"]
    assert lines[5]["error"] == {
        "line": 6,
        "path": "/petal_width",
        "message": "should be a number, and is a string",
    }
    assert lines[-1] == {"summary": {"good": 10, "bad": 1}}
    assert total(client, "serving_bad_rows_total") == before + 1


def total(client: httpx.Client, name: str, labels: str = "") -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{") and labels in line)


@pytest.mark.parametrize(
    ("body", "kind", "headers", "status", "said"),
    [
        (b"sepal_length,petal_width\n1,2\n", CSV, {}, 422, "/sepal_width: is missing"),
        (b"PAR1", "application/vnd.apache.parquet", {}, 415, "Arrow stream"),
        (b"\x1f\x8b", CSV, {"content_encoding": "gzip"}, 415, "Content-Encoding"),
        (b"no stream", ARROW, {}, 400, "an Arrow message"),
        (b"", CSV, {}, 400, "there is no header"),
        (ndjson([IRIS]), NDJSON, {"x_request_timeout": "0"}, 400, "X-Request-Timeout"),
        (ndjson([IRIS]), NDJSON, {"authorization": "Bearer nobody"}, 401, ""),
        (ndjson([IRIS]), NDJSON, {"x_request_timeout": "0.000001"}, 504, "the time that it may take is over"),
    ],
)
def test_what_is_no_stream_of_rows_is_refused(  # noqa: PLR0917
    client: httpx.Client, body: bytes, kind: str, headers: dict[str, str], status: int, said: str
) -> None:
    """What is wrong with all of it has a status and is named, as with any request."""
    answer = ask(client, body, kind, **headers)
    assert answer.status_code == status
    assert said in answer.json()["error"]


class Duplex:
    """A connection with a stream in progress, whose ends are in the test's hands."""

    def __init__(self, server: Server, key: str, kind: str, *, window: int | None = None) -> None:
        self.socket = socket.socket()
        if window is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.sendall(
            f"POST /v1/models/iris:predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )

    def send(self, data: bytes, times: int = 1) -> None:
        """Send some rows, so many times."""
        for _ in range(times):
            self._send(data)

    def _send(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def read_until(self, mark: bytes) -> bytes:
        got = b""
        while mark not in got:
            some = self.socket.recv(65536)
            assert some, got
            got += some
        return got

    def read_all(self) -> bytes:
        got = b""
        while some := self.socket.recv(65536):
            got += some
        return got


Connect = Callable[..., Duplex]


@pytest.fixture
def connect(server: Server, keys: dict[str, str]) -> Iterator[Connect]:
    """Open streams with the key that has no limits, by the type of their rows."""
    with contextlib.ExitStack() as stack:

        def opened(kind: str, **given: Any) -> Duplex:
            made = Duplex(server, keys["free"], kind, **given)
            stack.enter_context(made.socket)
            return made

        yield opened


def test_rows_that_come_one_by_one_are_answered_one_by_one(connect: Connect) -> None:
    """A row is answered though the request goes on."""
    stream = connect(NDJSON)
    for _ in range(3):
        stream.send(ndjson([IRIS]))
        assert b'"label":"setosa"' in stream.read_until(b"}}}\n")
    stream.socket.sendall(b"0\r\n\r\n")
    assert b'{"summary":{"good":3,"bad":0}}' in stream.read_until(b"\r\n0\r\n\r\n")


def test_what_breaks_amid_a_stream_is_told_and_the_answer_has_no_end(connect: Connect, server: Server) -> None:
    """After an answer has begun, an error is its last record; the connection ends, so nobody takes it for whole."""
    data = written(ARROW)
    stream = connect(ARROW)
    stream.send(data[: len(data) // 2])
    stream.read_until(b"HTTP/1.1 200")
    stream.send(b"x" * 100_000)
    rest = stream.read_all()
    assert b"the Arrow stream can't be read behind row 1000" in rest or b"an Arrow message has" in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert "Traceback" not in server.output()
    assert "ASGI callable" not in server.output()


def test_a_server_that_ends_tells_streams_so(keys: dict[str, str]) -> None:
    """Streams whose rows still come when the drain is over get a last record, and who has no answer yet a 503."""
    with running("--drain-s", "1") as server:
        begun, silent = (Duplex(server, keys["free"], NDJSON) for _ in range(2))
        with begun.socket, silent.socket:
            begun.send(ndjson([IRIS]))
            begun.read_until(b"}}}\n")
            server.process.send_signal(signal.SIGTERM)
            rest = begun.read_all()
            assert b'{"error":{"line":2,"path":"","message":"this server is going away"}}' in rest
            assert not rest.endswith(b"0\r\n\r\n")
            assert silent.read_all().startswith(b"HTTP/1.1 503 ")
        assert server.process.wait(20) == 0


def test_who_does_not_read_is_not_read_from_and_is_cut(connect: Connect, client: httpx.Client) -> None:
    """Rows are taken only as fast as answers are; whoever takes none is cut by the bound on writing."""
    cut = total(client, "serving_connections_cut_total", 'reason="slow_reader"')
    stream = connect(NDJSON, window=4096)
    with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
        stream.send(ndjson(ROWS) * 3, 60)  # 50 MB: more than sockets hold, and some batches
    assert total(client, "serving_connections_cut_total", 'reason="slow_reader"') == cut + 1


def test_who_stops_sending_is_cut(connect: Connect, client: httpx.Client) -> None:
    """A stream that stands still holds its place for no longer than a body may take."""
    stream = connect(NDJSON)
    stream.send(ndjson([IRIS]))
    stream.read_until(b"}}}\n")
    with pytest.raises(ConnectionResetError):
        stream.read_all()


def test_who_leaves_frees_the_place(connect: Connect, client: httpx.Client, eventually: Wait) -> None:
    """A client that goes away, amid its rows or behind them, is counted as gone, and others have its place."""
    name, labels = "serving_predictions_total", 'outcome="gone"'
    before = total(client, name, labels)
    for whole in (False, True):
        for _ in range(8):
            stream = connect(NDJSON, window=4096)
            stream.send(ndjson(ROWS) * 2)
            if whole:
                stream.socket.sendall(b"0\r\n\r\n")
            stream.read_until(b"HTTP/1.1 200")
            stream.socket.close()
    eventually(lambda: total(client, name, labels) >= before + 8)
    eventually(lambda: ask(client, ndjson([IRIS]), NDJSON).status_code == 200)


def test_no_more_streams_than_there_are_places(connect: Connect, client: httpx.Client) -> None:
    """Streams that wait hold places; one more is told to come back, and single requests are answered as ever."""
    streams = [connect(NDJSON) for _ in range(8)]
    for stream in streams:
        stream.send(ndjson([IRIS]))
    for stream in streams:
        stream.read_until(b"}}}\n")
    assert ask(client, ndjson([IRIS]), NDJSON).status_code == 429
    assert client.post("/v1/models/iris:predict", json={"instances": [IRIS]}).status_code == 200
    for stream in streams:
        stream.socket.sendall(b"0\r\n\r\n")
        stream.read_until(b"summary")


def test_a_rate_of_rows_slows_a_stream_down(client: httpx.Client, keys: dict[str, str]) -> None:
    """A stream takes its caller's rate, however many rows it has: they wait, and none is refused."""
    began = time.monotonic()
    answer = ask(client, ndjson(ROWS[:1500]), NDJSON, authorization=f"Bearer {keys['limited']}")
    assert answer.text.count('"prediction"') == 1500
    assert time.monotonic() - began > 0.4


def test_one_version_answers_all_of_a_stream(client: httpx.Client) -> None:
    """A canary is chosen as for a single request, once, and named."""
    for caller in map(str, range(8)):
        answer = ask(client, ndjson(ROWS), NDJSON, model="tried", x_user=caller)
        expected = "2" if choose(b"tried/2/" + caller.encode(), 50) else "1"
        assert answer.headers["x-model-version"] == expected
        path = f"/v1/models/tried/versions/{expected}:predict"
        alone = client.post(path, json={"instances": ROWS[-3:]}).json()["predictions"]
        lines = answer.text.splitlines()
        assert [json.loads(line)["prediction"] for line in lines[-4:-1]] == alone


def test_live_requests_go_first(server: Server, client: httpx.Client) -> None:
    """While a stream keeps the model busy, single requests are answered, none refused."""
    ended = threading.Event()

    def bulk() -> None:
        with httpx.Client(base_url=server.url, timeout=20, headers=client.headers) as other:
            assert ask(other, ndjson(ROWS) * 10, NDJSON).text.count('"prediction"') == 30_000
        ended.set()

    stream = threading.Thread(target=bulk)
    stream.start()
    answers = 0
    while not ended.is_set():
        assert client.post("/v1/models/iris:predict", json={"instances": [IRIS]}).status_code == 200
        answers += 1
    stream.join()
    assert answers > 3


def test_streams_are_asked_for_where_predictions_are(client: httpx.Client) -> None:
    """By version too, and by label; an unknown model is a 404."""
    for path, status in [("iris/versions/1", 200), ("iris/versions/9", 404), ("nobody", 404)]:
        answer = client.post(f"/v1/models/{path}:predict", content=ndjson([IRIS]), headers={"content-type": NDJSON})
        assert answer.status_code == status


@pytest.mark.parametrize("wanted", ["ndjson", "parquet"])
def test_files_are_scored_by_a_server(server: Server, keys: dict[str, str], tmp_path: Path, wanted: str) -> None:
    """`serving score --url` has the rows answered by streams, and says what it says of files here."""
    rows, out = tmp_path / "rows.csv", tmp_path / f"out.{wanted}"
    pd.DataFrame(ROWS).to_csv(rows, index=False)
    with rows.open("a") as file:
        file.write("1,2,x,4\n")
    command = ["score", str(rows), "--model", "iris", "--out", str(out), "--url", server.url]
    result = CliRunner().invoke(app, command, env={"SERVING_API_KEY": keys["free"]})
    assert result.exit_code == 3, result.output
    assert "3,000 rows answered, 1 bad" in result.stderr
    labels = OnnxSession(MODELS / "iris" / "2" / "model.onnx").run((pd.DataFrame(ROWS).to_numpy(np.float32),))[0]
    if wanted == "ndjson":
        *good, bad = [json.loads(line) for line in out.read_text().splitlines()]
        assert [each["prediction"]["label"] for each in good] == labels.tolist()
        assert bad["error"]["line"] == 3002
    else:
        frame = pd.read_parquet(out)
        assert frame["label"].tolist()[:-1] == labels.tolist()
        assert frame["error.line"].tolist()[-1] == 3002
    refused = CliRunner().invoke(app, command, env={"SERVING_API_KEY": "nobody"})
    assert refused.exit_code != 0
    assert "the server says" in refused.stderr
