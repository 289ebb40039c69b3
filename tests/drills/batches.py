"""Faults inside batches: poisoned requests among healthy ones, and clients that leave."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2 as httpx

from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.steady import PATH, ROW, until

TABLE = 64
"""Rows of the look-up table in the model that poison breaks: an index beyond it is refused by the model itself."""


def fussy(root: Path) -> Path:
    """Write a model that looks its one input up in a table, which fails for an index beyond it, and adds features."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    width = 256
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "index"], ["row"], axis=0),
            helper.make_node("MatMul", ["row", "weights"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["active"]),
            helper.make_node("MatMul", ["active", "last"], ["score"]),
        ],
        "fussy",
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
        [
            numpy_helper.from_array(np.eye(TABLE, width, dtype=np.float32), "table"),
            numpy_helper.from_array(rng.normal(size=(width, width)).astype(np.float32), "weights"),
            numpy_helper.from_array(rng.normal(size=(width, 1)).astype(np.float32), "last"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder = root / "fussy" / "1"
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    return root


def body(index: int) -> bytes:
    """Ask the fussy model about one row."""
    tensor = {"name": "index", "datatype": "INT64", "shape": [1], "data": [index]}
    return json.dumps({"inputs": [tensor]}).encode()


LUA = """
local share = %(share)f
math.randomseed(7)
request = function()
  local index = math.random() < share and math.random(64, 1000000) or math.random(0, 63)
  return wrk.format("POST", "/v2/models/fussy/infer", nil,
    '{"inputs":[{"name":"index","datatype":"INT64","shape":[1],"data":[' .. index .. ']}]}')
end
done = function(summary, latency, requests)
  io.write(string.format("RESULT %%d %%d %%d\\n", summary.requests, summary.errors.status, summary.duration))
end
"""


def rates(server: Server, share: float, seconds: int) -> tuple[float, float]:
    """Return healthy answers and refusals a second at 32 connections."""
    with TemporaryDirectory() as folder:
        script = Path(folder) / "poison.lua"
        script.write_text(LUA % {"share": share})
        command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "-s", str(script), server.url]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+)", text)
    assert found is not None, text
    requests, failed, microseconds = map(int, found.groups())
    return (requests - failed) / microseconds * 1e6, failed / microseconds * 1e6


@drill("poison", "with 10 % poisoned requests all healthy answers are right, and goodput is 0.8 of capacity")
def poison(report: Report, *, seconds: int = 10, rounds: int = 3, requests: int = 2000) -> None:
    """Compare clean and poisoned load in turns, then check every answer; the control fails whole batches."""
    with TemporaryDirectory() as folder:
        root = fussy(Path(folder))
        with faulty({}, models=root) as server:
            report.exactly("wrong answers", wrong(server, requests), 0)
            shares = []
            for _ in range(rounds):
                clean, _ = rates(server, 0.0, seconds)
                healthy, _ = rates(server, 0.1, seconds)
                shares.append(healthy / clean)
            if rounds:
                report.at_least("goodput as a share of capacity, median", sorted(shares)[rounds // 2], 0.8)
        with faulty({"off": ["bisection"]}, models=root) as server:
            report.control("where whole batches fail, healthy requests do", wrong(server, requests) > 0)


def wrong(server: Server, requests: int, *, threads: int = 16) -> int:
    """Send every tenth request poisoned, from many threads; count answers that are not what they should be."""
    url = f"{server.url}/v2/models/fussy/infer"
    due = {i: httpx.post(url, content=body(i), timeout=30).json()["outputs"][0]["data"][0] for i in range(TABLE)}
    bad: list[int] = []

    def ask(first: int) -> None:
        with httpx.Client(timeout=60) as client:
            for number in range(first, requests, threads):
                poisoned = number // threads % 10 == first % 10
                answer = client.post(url, content=body(TABLE + number if poisoned else number % TABLE))
                if poisoned:
                    right = answer.status_code == 400
                else:
                    value = answer.json()["outputs"][0]["data"][0] if answer.status_code == 200 else None
                    right = value is not None and abs(value - due[number % TABLE]) <= 1e-4 * max(1, abs(value))
                if not right:
                    bad.append(number)

    asking = [threading.Thread(target=ask, args=(n,)) for n in range(threads)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return len(bad)


@drill("departed", "a client that leaves while it waits costs no prediction, and one that leaves later nobody else")
def departed(report: Report, *, clients: int = 1000) -> None:
    """Have clients leave while the model is busy, some while it runs theirs; the control runs them all."""
    with faulty({"slow": 1.0}) as server:
        executed, stayed = leave(server, clients)
        report.at_most("departed requests that were executed", executed, clients / 100)
        report.exactly("those that stayed got their answers, of 20", stayed, 20)
    with faulty({"slow": 1.0, "off": ["departed"]}) as server:
        executed, _ = leave(server, clients)
        report.control("where nobody notices they are all executed", executed > clients / 100)


def leave(server: Server, clients: int) -> tuple[int, int]:
    """Make the model busy, ask from so many clients that leave at once, and from 20 that stay.

    Returns how many rows of those that left were run, and how many of those that stayed were answered.
    """
    before = rows(server)
    first = _asked(server, 1)  # leaves while it runs
    time.sleep(0.3)
    gone = _asked(server, clients)
    stay = _asked(server, 20)
    _close(first)
    _close(gone)
    stayed = 0
    for connection in stay:
        connection.settimeout(60)
        stayed += connection.recv(65536).startswith(b"HTTP/1.1 200")
    _close(stay)
    until(lambda: rows(server) - before >= 21, 10)
    return round(rows(server) - before - 21), stayed


def _asked(server: Server, times: int) -> list[socket.socket]:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ROW)}\r\n\r\n".encode()
    connections = []
    for _ in range(times):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head + ROW)
        connections.append(connection)
    return connections


def _close(connections: Sequence[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def rows(server: Server) -> float:
    """Return how many rows of iris were run."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(n) for n in re.findall(r'^serving_batch_rows_sum\{model="iris".*\} (\S+)$', text, re.M))
