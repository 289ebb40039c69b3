"""Requests that a model refuses, among healthy ones: who is answered right, and what it costs the others.

Three models, since what poison costs is a matter of arithmetic. Each refuses an index beyond its table of 64:

  tiny    A table and two small products: a run takes some 13 us with one row and 1 us more for each other, and
          onnxruntime takes some 40 us to say no, whatever the model (its exception is tried against each of 15 types).
          Who fails has failed alone, so that ten requests of which one is poisoned take at least a run that says no
          and, in groups or one by one, some 9 x 12 us of others; in whole batches they take 10 x 5 us. Reading and
          answering takes 34 us a request: 9 of 10 are answered in 340 + 40 + 108 us, where 9 without poison take
          9 x 39 us, which is 0.72 of the capacity at best; 0.55 is promised.
  early   A signal looked up by its number, then two convolutions: a row takes some 300 us, alone or in company. The
          look-up comes first, so that a run with a poisoned row costs next to nothing.
  late    The same, but what is refused is a second look-up at the very end: a failing run costs all of its rows, so
          that 0.9 is the best there is.

Where a row costs more than a refusal, as in the latter two, goodput has to be 0.8 of the capacity: that of the same
server and the same model under load without poison, measured in turns with the poisoned load. The load generator has
a core of its own: else it is measured, too.

All of this has poison from every client. Where one of 32 sends nothing else, the others run without it: they keep 0.8
of what they get beside a healthy one, whatever the model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill

TABLE = 64
"""Rows of the look-up tables: an index beyond them is refused by the model itself."""
CONNECTIONS = 32
CORES = os.sched_getaffinity(0)
"""The last is for load, the others for the server."""


def write(root: Path, name: str, nodes: list[Any], constants: dict[str, Any]) -> None:
    """Write a model from `index` to `score`."""
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder = root / name / "1"
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")


def tiny(root: Path) -> None:
    """Write the model that costs less than a refusal."""
    width = 256
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["row"], axis=0),
        helper.make_node("MatMul", ["row", "weights"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "last"], ["score"]),
    ]
    constants = {
        "table": np.eye(TABLE, width, dtype=np.float32),
        "weights": rng.normal(size=(width, width)).astype(np.float32),
        "last": rng.normal(size=(width, 1)).astype(np.float32),
    }
    write(root, "tiny", nodes, constants)


def signals(root: Path, *, late: bool) -> None:
    """Write the model that costs more than a refusal; `late` refuses once all is computed, and else before."""
    channels, filters, length = 64, 128, 176
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.normal(size=(TABLE, channels, length)).astype(np.float32),
        "first": (rng.normal(size=(filters, channels, 3)) / channels).astype(np.float32),
        "second": (rng.normal(size=(filters, filters, 3)) / filters).astype(np.float32),
        "weights": rng.normal(size=(filters, 1)).astype(np.float32),
        "biases": rng.normal(size=(TABLE, 1)).astype(np.float32),
        "axis": np.array([1]),
        "size": np.array(TABLE),
        "nothing": np.array(0, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Mod", ["index", "size"], ["place"]),
        helper.make_node("Gather", ["table", "place" if late else "index"], ["signal"], axis=0),
        helper.make_node("Conv", ["signal", "first"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "second"], ["c2"]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("ReduceMax", ["r2"], ["peaks"], axes=[2], keepdims=0),
        helper.make_node("MatMul", ["peaks", "weights"], ["sum"]),
        # The second index waits for the sum: onnxruntime would look up first what it can.
        helper.make_node("Mul", ["sum", "nothing"], ["zeros"]),
        helper.make_node("Cast", ["zeros"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Squeeze", ["whole", "axis"], ["flat"]),
        helper.make_node("Add", ["index", "flat"], ["last"]),
        helper.make_node("Gather", ["biases", "last"], ["bias"], axis=0),
        helper.make_node("Add", ["sum", "bias"], ["score"]),
    ]
    write(root, "late" if late else "early", nodes, constants)


def body(index: int) -> bytes:
    """Ask about one row."""
    tensor = {"name": "index", "datatype": "INT64", "shape": [1], "data": [index]}
    return json.dumps({"inputs": [tensor]}).encode()


LUA = """
local share = %(share)f
math.randomseed(7)
request = function()
  local index = math.random() < share and math.random(64, 1000000) or math.random(0, 63)
  return wrk.format("POST", "/v2/models/%(model)s/infer", nil,
    '{"inputs":[{"name":"index","datatype":"INT64","shape":[1],"data":[' .. index .. ']}]}')
end
done = function(summary, latency, requests)
  io.write(string.format("RESULT %%d %%d %%d\\n", summary.requests, summary.errors.status, summary.duration))
end
"""


@contextmanager
def on(cores: set[int]) -> Iterator[None]:
    """Have what is started meanwhile run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Load:
    """Load in closed loop from `connections`, a share of it poisoned; it runs from the start of the object."""

    def __init__(self, server: Server, model: str, share: float, seconds: int, connections: int = CONNECTIONS) -> None:
        self._folder = TemporaryDirectory()
        script = Path(self._folder.name) / "poison.lua"
        script.write_text(LUA % {"share": share, "model": model})
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), server.url]
        with on({max(CORES)}):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def healthy(self) -> float:
        """Wait for its end, and return healthy answers a second."""
        text, _ = self._process.communicate()
        self._folder.cleanup()
        found = re.search(r"RESULT (\d+) (\d+) (\d+)", text)
        assert found is not None, text
        requests, failed, microseconds = map(int, found.groups())
        return (requests - failed) / microseconds * 1e6


def goodput(server: Server, model: str, seconds: int) -> float:
    """Return the healthy answers at 10 % poison as a share of those without."""
    clean = Load(server, model, 0.0, seconds).healthy()
    return Load(server, model, 0.1, seconds).healthy() / clean


def beside_one(server: Server, model: str, seconds: int) -> float:
    """Return what the other clients get while one sends nothing but poison, as a share of that beside a healthy one."""
    got = []
    for share in (0.0, 1.0):
        one = Load(server, model, share, seconds, 1)
        got.append(Load(server, model, 0.0, seconds, CONNECTIONS - 1).healthy())
        one.healthy()
    return got[1] / got[0]


def median(figures: list[float]) -> float:
    return sorted(figures)[len(figures) // 2]


@drill("poison", "with 10 % poisoned requests all healthy answers are right, and goodput is 0.8 of capacity")
def poison(report: Report, *, seconds: int = 2, rounds: int = 3, requests: int = 1000) -> None:
    """Check every answer, then compare clean and poisoned load in turns; the control fails whole batches."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        tiny(root)
        signals(root, late=True)
        if rounds:
            signals(root, late=False)
        with on(CORES - {max(CORES)} or CORES), faulty({}, models=root) as server:
            for model in ("tiny", "late"):
                report.exactly(f"{model}: wrong answers", wrong(server, model, requests), 0)
            if rounds:
                for model, due in (("early", 0.8), ("late", 0.8), ("tiny", 0.55)):
                    shares = [goodput(server, model, seconds) for _ in range(rounds)]
                    report.at_least(f"{model}: goodput as a share of capacity, median", median(shares), due)
                for model in ("late", "tiny"):
                    shares = [beside_one(server, model, seconds) for _ in range(rounds)]
                    report.at_least(
                        f"{model}: 31 clients beside one that sends only poison, median", median(shares), 0.8
                    )
        with faulty({"off": ["bisection"]}, models=root) as server:
            report.control("where whole batches fail, healthy requests do", wrong(server, "tiny", requests) > 0)


def wrong(server: Server, model: str, requests: int, *, threads: int = 16) -> int:
    """Send every tenth request poisoned, from many threads; count answers that are not what they should be."""
    url = f"{server.url}/v2/models/{model}/infer"
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
