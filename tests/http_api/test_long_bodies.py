"""Long bodies are read in a process of their own: answers are those of short ones, and nobody else waits for them."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import signal
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.errors import InvalidRequest
from serving.protocols import strict_json
from tests.conftest import Server, running
from tests.drills.workers import workers

Wait = Callable[[Callable[[], bool]], None]

PREDICT = "/v1/models/iris:predict"
NAMES = ("sepal_length", "sepal_width", "petal_length", "petal_width")
ROWS = np.random.default_rng(4).random((4000, 4))


@pytest.fixture(scope="module")
def alone() -> Iterator[Server]:
    """A server that only these tests use: they crowd it."""
    with running() as started:
        yield started


def test_a_body_of_megabytes_is_read_as_a_short_one_is(client: httpx.Client) -> None:
    """Rows, columns and tensors in megabytes of text, right or wrong, in one length or in chunks, are read alike."""
    rows = ROWS.tolist()
    tensor = {"name": "features", "datatype": "FP32", "shape": list(ROWS.shape), "data": rows}
    flat = {**tensor, "data": ROWS.ravel().tolist()}
    asked: list[tuple[str, dict[str, Any]]] = [
        (PREDICT, {"instances": rows}),
        (PREDICT, {"instances": [dict(zip(NAMES, row, strict=True)) for row in rows]}),
        (PREDICT, {"inputs": dict(zip(NAMES, ROWS.T.tolist(), strict=True))}),
        (PREDICT, {"instances": rows, "signature_name": "serving_default"}),
        ("/v2/models/iris/infer", {"inputs": [tensor]}),
        ("/v2/models/iris/infer", {"inputs": [flat], "parameters": {}}),
    ]
    found = []
    for path, document in asked:
        body = json.dumps(document, separators=("," + " " * 64, ":")).encode()
        whole = client.post(path, content=body)
        assert whole.status_code == 200, whole.text[:300]
        chunks = client.post(path, content=(body[at : at + 65_536] for at in range(0, len(body), 65_536)))
        assert chunks.content == whole.content
        found.append(whole.json())
        spoilt = client.post(path, content=body[:-200_000] + b"x" + body[-199_999:])
        assert spoilt.status_code == 400
        assert "is not JSON" in spoilt.json()["error"]
    assert found[0] == found[1] == found[3]
    assert found[4] == found[5]
    few = [client.post(PREDICT, json={"instances": rows[at : at + 20]}).json()["predictions"] for at in (0, 3980)]
    assert found[0]["predictions"][:20] + found[0]["predictions"][-20:] == few[0] + few[1]


def test_wrong_rows_are_told_apart_from_many(client: httpx.Client) -> None:
    """The first faults are shown with their places; how many there are is exact for few rows, and a least for many."""
    rows: list[Any] = ROWS.tolist()
    for bad in range(3000, 3030):
        rows[bad] = [1, 2, "x", 4]
    answer = client.post(PREDICT, json={"instances": rows})
    assert answer.status_code == 422
    assert [each["path"] for each in answer.json()["details"]] == [f"/instances/{i}/2" for i in range(3000, 3020)]
    assert "(and at least 29 more)" in answer.json()["error"]
    few = client.post(PREDICT, json={"instances": rows[2900:3050]})
    assert "(and 29 more)" in few.json()["error"]
    columns = dict(zip(NAMES, map(list, zip(*rows, strict=True)), strict=True))
    answer = client.post(PREDICT, json={"inputs": columns})
    assert [d["path"] for d in answer.json()["details"]] == [f"/inputs/petal_length/{i}" for i in range(3000, 3020)]


def test_long_answers_come_whole_and_in_turn(server: Server) -> None:
    """A client that pipelines and reads slowly gets every long answer whole, none inside another."""
    rows = ROWS.round(3).tolist()
    address = urllib.parse.urlsplit(server.url)
    bodies = [json.dumps({"instances": rows[:count]}).encode() for count in (4000, 1, 4000, 2)]
    apart = [httpx.post(f"{server.url}{PREDICT}", content=body).content for body in bodies]
    assert len(apart[0]) > 8 * len(apart[1])
    head = b"POST /v1/models/iris:predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect((address.hostname, address.port))
        sent = b"".join(head % len(body) + body for body in bodies)
        sending = threading.Thread(target=sock.sendall, args=(sent,), daemon=True)
        sending.start()
        answers = sock.makefile("rb", buffering=1024)
        for expected in apart:
            assert answers.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := answers.readline()) != b"\r\n":
                if line.startswith(b"content-length:"):
                    length = int(line.split()[1])
            assert answers.read(length) == expected
        sending.join(20)


def test_json_has_a_limit_of_its_own(client: httpx.Client) -> None:
    """JSON over its limit is a 413 that says what carries more; the same in binary is served."""
    large = b'{"instances":[' + b" " * 8 * 2**20 + b"[1,2,3,4]]}"
    for content in (large, (large[at : at + 2**20] for at in range(0, len(large), 2**20))):
        answer = client.post(PREDICT, content=content)
        assert answer.status_code == 413
        assert "binary data" in answer.json()["error"]
    raw = np.zeros((4000, 4), np.float32).tobytes()
    shape = {"name": "features", "datatype": "FP32", "shape": [4000, 4], "parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [shape]}).encode()
    headers = {"inference-header-content-length": str(len(text))}
    assert client.post("/v2/models/iris/infer", content=text + raw, headers=headers).status_code == 200
    padded = text[:-1] + b" " * 8 * 2**20 + b"}"
    headers = {"inference-header-content-length": str(len(padded))}
    assert client.post("/v2/models/iris/infer", content=padded + raw, headers=headers).status_code == 413
    assert client.post(PREDICT, content=large, headers=headers).status_code == 413  # which V1 does not know


def test_many_strings_are_refused_and_told_how_to_send_them(client: httpx.Client) -> None:
    """More strings than one body of JSON may have are a 413 that names the binary protocol."""
    answer = client.post("/v1/models/docs_topic:predict", json={"instances": ["word"] * 100_001})
    assert answer.status_code == 413
    assert "100001 strings" in answer.json()["error"]
    assert "binary data" in answer.json()["error"]


# Attacks


def together(server: Server, requests: list[bytes]) -> list[bytes]:
    """Send many requests but for their last byte, then that of all at once; return the status lines."""
    address = urllib.parse.urlsplit(server.url)
    socks = []
    for request in requests:
        sock = socket.create_connection((address.hostname, address.port), timeout=60)
        sock.sendall(request[:-1])
        socks.append(sock)
    for sock, request in zip(socks, requests, strict=True):
        sock.sendall(request[-1:])
    return [_status(sock) for sock in socks]


def _status(sock: socket.socket) -> bytes:
    with sock, sock.makefile("rb") as answer:
        return answer.readline().split()[1]


def post(body: bytes, *headers: bytes, path: bytes = PREDICT.encode()) -> bytes:
    lines = [b"POST %b HTTP/1.1" % path, b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def health(server: Server, stop: threading.Event) -> float:
    """Ask for health again and again; return the longest that it took, in seconds."""
    longest = 0.0
    with httpx.Client(base_url=server.url, timeout=60) as asking:
        while not stop.is_set():
            began = time.monotonic()
            assert asking.get("/v2/health/live").status_code == 200
            longest = max(longest, time.monotonic() - began)
    return longest


def beside(server: Server, attack: Callable[[], Any]) -> tuple[Any, float]:
    """Attack while health is asked for; return what came of it, and the longest wait."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(health, server, stop)
        try:
            found = attack()
        finally:
            stop.set()
        return found, asking.result()


def worker(server: Server) -> set[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return {int(child) for child in children.split()}


@pytest.mark.parametrize("size", [2**20, 8 * 2**20 - 1024, 16 * 2**20])
def test_bombs_that_go_off_together_do_not_stop_a_worker(alone: Server, size: int) -> None:
    """Hundreds of small gzip bodies that inflate to megabytes, at once: each is answered, the worker lives."""
    before = worker(alone)
    bomb = gzip.compress(b'{"instances":[[1,2,3,4]]' + b" " * size + b"}")
    requests = [post(bomb, b"Content-Encoding: gzip")] * 100
    statuses, _ = beside(alone, lambda: together(alone, requests))
    assert set(statuses) <= {b"200", b"413", b"429"}
    assert len(statuses) == 100
    assert worker(alone) == before


def test_empty_rows_by_the_thousand_do_not_stop_the_loop(alone: Server) -> None:
    """Bodies of 65 kB of empty rows, sent together, are refused with the place of the first faults."""
    body = b'{"instances":[' + b"{}," * 21_000 + b"{}]}"
    statuses, _ = beside(alone, lambda: together(alone, [post(body)] * 60))
    assert set(statuses) == {b"422"}


def test_large_bodies_of_one_do_not_keep_others_past_their_deadline(alone: Server) -> None:
    """While one client sends the largest bodies of empty rows, another's longer body is read in its turn."""
    large = post(b'{"instances":[' + b"{}," * 600_000 + b"{}]}")
    usual = json.dumps({"instances": ROWS.tolist()}).encode()
    with ThreadPoolExecutor(3) as pool:
        hostile = [pool.submit(together, alone, [large]) for _ in range(3)]
        answer = httpx.post(f"{alone.url}{PREDICT}", content=usual, timeout=60)
        assert answer.status_code == 200
        assert {status for sending in hostile for status in sending.result()} <= {b"422", b"504", b"429"}


def test_a_deadline_holds_while_a_body_waits_to_be_read(alone: Server) -> None:
    """A request that allows itself little time is told when that is over, though its body is not read by then."""
    large = post(b'{"instances":[' + b"{}," * 600_000 + b"{}]}")
    usual = json.dumps({"instances": ROWS.tolist()}).encode()
    with ThreadPoolExecutor(3) as pool:
        hostile = [pool.submit(together, alone, [large]) for _ in range(3)]
        while not all(sending.running() for sending in hostile):
            time.sleep(0.01)
        answers = set()
        while not all(sending.done() for sending in hostile):
            answer = httpx.post(
                f"{alone.url}{PREDICT}", content=usual, headers={"x-request-timeout": "0.01"}, timeout=60
            )
            answers.add(answer.status_code)
    assert 504 in answers
    assert answers <= {504, 429, 200}


def codec_processes(server: Server) -> dict[int, int]:
    """Return the processes that a server's workers started, with the ticks of processor time that each has used."""
    found = {}
    for number in worker(server):
        for task in Path(f"/proc/{number}/task").glob("*/children"):
            for child in task.read_text().split():
                if b"codec_process" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found[int(child)] = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11])
    return found


def test_a_body_whose_reader_is_killed_is_read_all_the_same(alone: Server, eventually: Wait) -> None:
    """Where the process that reads a long body is killed, another one reads it, and the caller gets the answer."""
    usual = json.dumps({"instances": ROWS.tolist()}).encode()
    expected = httpx.post(f"{alone.url}{PREDICT}", content=usual, timeout=60).content
    ((number, used),) = codec_processes(alone).items()
    large = post(b'{"instances":[' + b"{}," * 600_000 + b"{}]}")
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(together, alone, [large])
        eventually(lambda: codec_processes(alone).get(number, 0) > used)
        os.kill(number, signal.SIGKILL)
        assert sending.result() == [b"422"]
    assert httpx.post(f"{alone.url}{PREDICT}", content=usual, timeout=60).content == expected
    assert number not in codec_processes(alone)


# Strict JSON

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from([":", '"a":1', "é", "\u0000", "x" * 40])
)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
)
TOKENS = b'[ ] { } , : " \\ 1 null true NaN -1e999 1e5 "a" [] {} ,"a":1 "a":1, \xff 123456789012345678901'.split(b" ")


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    body = json.dumps(draw(documents), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):  # an object in it says its first member twice
        body = re.sub(rb'\{("[^"]*": [^,{}\[\]]+)', rb"{\1, \1", body, count=1)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.sampled_from([b"", *TOKENS])) + body[at + draw(st.integers(0, 3)) :]
    return body or b" "


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(texts())
def test_json_is_read_as_the_strictest_parser_reads_it(body: bytes) -> None:
    """What is read is what the standard library reads, told to refuse all that two parsers could read in two ways."""
    try:
        text = body.decode()
        due = repr(json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_refused, parse_float=_no_infinity))
    except ValueError:
        due = ""
    try:
        assert repr(strict_json.loads(body)) == due
    except InvalidRequest:
        assert not due


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs) if len(dict(pairs)) == len(pairs) else _refused("a key")


def _no_infinity(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refused(text)


def _refused(text: str) -> Any:
    raise ValueError(text)


def test_many_who_send_at_once_do_not_wait_for_the_process() -> None:
    """Bodies that are quick to read are read by the worker itself, however many come together, and all are answered."""
    document = {"instances": [dict(zip(NAMES, row, strict=True)) for row in ROWS[:250].tolist()]}
    body = json.dumps(document).encode()
    assert 256 * 1024 < 48 * len(body) < 48 * 64 * 1024
    head = f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with running("--max-queued-rows", "50000") as server:
        for _ in range(2):
            with ExitStack() as stack:
                address = ("127.0.0.1", server.port)
                clients = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(48)]
                for one in clients:
                    one.sendall(head + body)
                assert {one.recv(12) for one in clients} == {b"HTTP/1.1 200"}
        started = [Path(f"/proc/{pid}/cmdline") for worker in workers(server) for pid in _children(worker)]
        assert not [path for path in started if b"codec_process" in path.read_bytes()]


def _children(pid: int) -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}
