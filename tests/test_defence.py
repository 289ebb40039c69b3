"""Slow clients, hostile input, overload: short forms of the drills, without the clock, and what else defends."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from io import StringIO

import httpx2 as httpx
import pytest

from serving.logs import JsonLines, TextLines
from tests.conftest import Server, running
from tests.drills import hostile, overload, slow_clients
from tests.drills.drill import Report
from tests.http_api.test_lane import BODY, PATH, connected, labels, post


def test_slow_clients_are_cut() -> None:
    """Clients that trickle, stall or do not read are cut in time, on lane and ASGI; with endless patience they stay."""
    report = Report()
    slow_clients.run(report, sockets=24, patience=1.0, timed=False)
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
    hostile.run(report, repetitions=2, junk=2000, timed=False)
    assert report.kept, report.broken()


def test_hostile_calls_are_refused() -> None:
    """Calls that are reset, oversized or malformed are refused, tell nothing and leave nothing."""
    report = Report()
    hostile.run_grpc(report, calls=500)
    assert report.kept, report.broken()


def test_overload_is_refused_at_once() -> None:
    """At twice the capacity the excess is told when to come back, and nothing is run that was not answered."""
    report = Report()
    overload.run(report, seconds=2.0, timed=False)
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
    for lane in ("--lane", "--no-lane"):
        with running(lane, "--max-held-bytes", str(len(body) + 1000)) as server:
            with socket.create_connection(("127.0.0.1", server.port)) as first:
                first.sendall(post(body)[:-1])
                eventually(lambda: httpx.post(server.url + PATH, content=body, timeout=20).status_code == 429)
                assert httpx.post(server.url + PATH, content=BODY).status_code == 200
            eventually(lambda: httpx.post(server.url + PATH, content=body, timeout=20).status_code == 200)


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
