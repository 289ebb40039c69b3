"""Slow clients and hostile input: short forms of the drills, without the clock, and what else defends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import httpx2 as httpx
import pytest

from serving.access.key_store import KeyStore
from serving.log_pipe import LogPipe
from serving.logs import JsonLines, TextLines, configure
from tests.conftest import MODELS, Server, running
from tests.drills import hostile, hostile_grpc, slow_clients, slow_clients_grpc
from tests.drills.drill import Report
from tests.http_api.test_fast_path import BODY, PATH, connected, labels, post


def test_slow_clients_are_cut() -> None:
    """Clients that trickle, stall or do not read are cut in time by fast path and ASGI; with endless patience not."""
    report = Report()
    slow_clients.run(report, sockets=24, patience=1.0, seconds=0, rounds=1)
    assert report.kept, report.broken()


def test_who_is_cut_is_counted(client: httpx.Client, server: Server) -> None:
    """Each connection that is ended for what its client did is counted by reason."""
    with connected(server) as connection:
        connection.send(b"GET /v2 HTTP/1.1\r\n\r\n")
        assert connection.answer()[0] == 400
    assert 'serving_connections_cut_total{reason="malformed"}' in client.get("/metrics").text


def test_hostile_input_is_refused() -> None:
    """Each piece of hostile input is refused or cut, tells nothing of the insides and leaves nothing."""
    report = Report()
    hostile.run(report, repetitions=1, warm=1, junk=500, timed=False)
    assert report.kept, report.broken()


def test_hostile_frames_are_refused() -> None:
    """Floods, lies and bombs over gRPC are refused or cut, tell nothing of the insides and leave nothing."""
    report = Report()
    hostile_grpc.run(report, repetitions=1, timed=False)
    assert report.kept, report.broken()


def test_slow_clients_of_grpc_are_cut() -> None:
    """Clients that trickle, stall, hold windows shut or take up room end in time, and take no more than their bound."""
    report = Report()
    slow_clients_grpc.run(report, sockets=15, patience=1.0, unread=40, at_once=True)
    assert report.kept, report.broken()


def test_java_asks_for_http_2_and_is_answered_in_http_1(server: Server) -> None:
    """A POST that offers to speak another protocol is answered all the same, and so is what follows it."""
    with connected(server) as connection:
        wish = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
        connection.send(post(headers=wish) + post())
        for _ in range(2):
            status, _, body = connection.answer()
            assert status == 200
            assert labels(body) == ["setosa"]


@pytest.mark.parametrize(("name", "value"), [("X-Request-Priority", "4"), ("X-Request-Timeout", "soon")])
def test_what_a_header_asks_wrongly_is_named(client: httpx.Client, name: str, value: str) -> None:
    """A priority or a timeout that can't be read is a 400 that names the header."""
    answer = client.post(PATH, content=BODY, headers={name: value})
    assert answer.status_code == 400
    assert name in answer.json()["error"]


def test_a_request_may_ask_for_priority_and_time(client: httpx.Client) -> None:
    """Priority and timeout are taken from headers in every dialect, and from parameters in v2."""
    headers = {"X-Request-Priority": "1", "X-Request-Timeout": "10"}
    assert client.post(PATH, content=BODY, headers=headers).status_code == 200
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}
    body = {"inputs": [tensor], "parameters": {"priority": 3, "timeout": 10_000_000}}
    assert client.post("/v2/models/iris/infer", json=body).status_code == 200
    late = client.post(PATH, content=BODY, headers={"X-Request-Timeout": "0.000001"})
    assert late.status_code in {429, 504}


def test_bytes_held_are_bounded(eventually: Callable[[Callable[[], bool]], None]) -> None:
    """Bodies beyond the bound are told to come back at once; when those before them are gone, they are taken."""
    body = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]] * 4000}).encode()
    for fast_path in ("--fast-path", "--no-fast-path"):
        with running(fast_path, "--max-held-bytes", str(len(body) + 1000)) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as first:
                first.sendall(post(body)[:-1])
                eventually(lambda: httpx.post(server.url + PATH, content=body, timeout=20).status_code == 429)
                assert httpx.post(server.url + PATH, content=BODY).status_code == 200
            eventually(lambda: httpx.post(server.url + PATH, content=body, timeout=20).status_code == 200)


def test_a_strangers_body_takes_no_room(tmp_path: Path) -> None:
    """A large body that nobody may send is refused before it is read, and leaves its bytes to those who may."""
    store = KeyStore(tmp_path / "serving.keys")
    key = store.create("app", frozenset({"predict"}))
    body = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]] * 4000}).encode()
    for fast_path in ("--fast-path", "--no-fast-path"):
        bound = str(len(body) + 1000)
        flags = (fast_path, "--max-held-bytes", bound, "--keys", str(tmp_path / "serving.keys"))
        with running(*flags) as server, connected(server) as stranger:
            stranger.send(post(body)[:-1])
            assert stranger.answer()[0] == 401
            for _ in range(2):
                headers = {"Authorization": f"Bearer {key}"}
                answer = httpx.post(server.url + PATH, content=body, headers=headers, timeout=20)
                assert answer.status_code == 200


def test_a_refused_request_behind_another_leaves_the_log_clean() -> None:
    """What follows a request that is still being answered may be refused: the log holds no fault of the server's."""
    large = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]] * 4000}).encode()
    for fast_path in ("--fast-path", "--no-fast-path"):
        with running(fast_path) as server:
            for body in (BODY, large):
                with connected(server) as connection:
                    connection.send(post(body) + b"GET /v2 HTTP/1.1\r\n\r\n")
                    with contextlib.suppress(ConnectionResetError):
                        while connection.socket.recv(65536):
                            pass
            assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_log_holds_no_line_that_is_not_a_record(form: str, tmp_path: Path) -> None:
    """In JSON every line of stderr is an object and the announcement is on stdout; in text both are on stderr."""
    out, err = tmp_path / "out", tmp_path / "err"
    command = [sys.executable, "-m", "serving.cli", "run", "--port", "0", "--models", str(MODELS), "--log-format", form]
    with (
        out.open("wb") as stdout,
        err.open("wb") as stderr,
        subprocess.Popen(command, stdout=stdout, stderr=stderr) as process,
    ):
        try:
            said = out if form == "json" else err
            until = time.monotonic() + 60
            while "docs: http://" not in said.read_text() and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            process.terminate()
        assert process.wait(40) == 0
    assert "serving on http://127.0.0.1:" in said.read_text()
    if form == "json":
        assert all(json.loads(line)["process"] for line in err.read_text().splitlines())
    else:
        assert out.read_text() == ""


def test_lines_that_were_dropped_are_told_in_the_form_of_the_log() -> None:
    """In a JSON log the line that says how many lines were lost is JSON too."""
    reader, writer = os.pipe()
    before, hooks = list(logging.getLogger().handlers), (sys.excepthook, threading.excepthook)
    try:
        pipe = LogPipe(writer)
        configure("warning", "json", pipe)
        for _ in range(6000):
            logging.getLogger("serving.test").warning("%s", "x" * 100)
        got = b""
        while b"were dropped" not in got or not got.endswith(b"\n"):
            got += os.read(reader, 65536)
    finally:
        logging.getLogger().handlers[:] = before
        sys.excepthook, threading.excepthook = hooks
        logging.captureWarnings(False)
    lines = [json.loads(line) for line in got.decode().splitlines()]
    assert any("lines of the log were dropped" in line["message"] for line in lines)


def test_health_answers_though_connections_have_run_out(eventually: Callable[[Callable[[], bool]], None]) -> None:
    """At the cap the connections that are idle longest make room for a newcomer."""
    with running("--max-connections", "8") as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        assert httpx.post(server.url + PATH, content=BODY).status_code == 200
        for client in idle:
            client.close()


def test_nobody_writes_a_line_of_their_own_into_the_log() -> None:
    """Whatever is in a message, JSON logs are one object a line, and text logs hold no control character."""
    evil = 'x\r\n{"level": "forged"}\x1b[31m\x7f\u2028'
    for formatter in (JsonLines(), TextLines("%(message)s")):
        stream = StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger = logging.Logger("test")
        logger.addHandler(handler)
        try:
            raise ValueError(evil)
        except ValueError:
            logger.error("%s", evil, exc_info=isinstance(formatter, JsonLines))
        line = stream.getvalue()
        assert line.endswith("\n")
        assert line[:-1].isprintable()
        if isinstance(formatter, JsonLines):
            assert json.loads(line)["message"] == evil
            assert "ValueError" in json.loads(line)["exception"]


def test_onnxruntime_reports_to_nobody(tmp_path: Path) -> None:
    """Serving keeps models and failures to itself: onnxruntime's reports to its maker are off, in every process."""
    script = "import serving.engine.session, os; print(os.listdir(os.environ['HOME']))"
    clean = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}  # CI switches them off too
    text = subprocess.run(
        [sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert text == "[]\n"
