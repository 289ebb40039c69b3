"""Memory that does not grow: a million requests, and one that is large."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2 as httpx

from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.steady import PATH, ROW
from tests.drills.workers import workers

MIB = 2**20


def resident(server: Server) -> float:
    """Return the resident bytes of all workers together."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in workers(server)]
    return sum(pages) * 4096.0


def ask(server: Server, requests: int) -> int:
    """Send about so many one-row predictions at 32 connections; return how many there were."""
    with TemporaryDirectory() as folder:
        script = Path(folder) / "row.lua"
        script.write_text(
            f"wrk.method = 'POST'\nwrk.body = '{ROW.decode()}'\n"
            "done = function(s) io.write(string.format('RESULT %d %d\\n', s.requests, s.errors.status)) end\n"
        )
        sent, seconds = 0, 1
        while sent < requests:
            command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "-s", str(script), f"{server.url}{PATH}"]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = re.search(r"RESULT (\d+) (\d+)", text)
            assert found is not None, text
            assert found[2] == "0", "a request failed"
            sent += int(found[1])
            seconds = max(1, min(60, round((requests - sent) * seconds / int(found[1]))))
    return sent


@drill("memory", "a worker's resident memory grows by less than 1 MiB for 100,000 requests")
def memory(report: Report, *, requests: int = 1_000_000, warm: int = 200_000) -> None:
    """Warm up, send a million, compare; the control leaves 64 bytes of each batch behind."""
    for leak in (0, 4096):
        with faulty({"leak": leak} if leak else {}) as server:
            ask(server, warm)
            before = resident(server)
            sent = ask(server, requests if not leak else max(20_000, requests // 5))
            time.sleep(1)
            grown = (resident(server) - before) / MIB / (sent / 100_000)
        if leak:
            report.control(f"{leak} bytes a batch left behind are seen", grown > 1)
        else:
            report.at_least("requests sent", sent, requests)
            report.at_most("growth for each 100,000 requests", grown, 1, "MiB")


@drill("arena", "the memory of the largest batch is given back")
def arena(report: Report, *, rows: int = 4096) -> None:
    """Send one request whose intermediate tensors take hundreds of MiB, then small ones; the control keeps it."""
    for off in ((), ("shrink",)):
        with TemporaryDirectory() as folder, faulty({"off": off}, models=wide(Path(folder))) as server:
            small = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [1.0] * 8}]}
            large = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 8], "data": [1.0] * 8 * rows}]}
            url = f"{server.url}/v2/models/wide/infer"
            httpx.post(url, json=small, timeout=60)
            before = resident(server)
            assert httpx.post(url, json=large, timeout=120).status_code == 200
            for _ in range(20):
                httpx.post(url, json=small, timeout=60)
            time.sleep(3)
            grown = (resident(server) - before) / MIB
        if off:
            report.control("with onnxruntime's default it is kept", grown > 64)
        else:
            report.at_most("resident memory kept after the largest request", grown, 64, "MiB")


def wide(root: Path) -> Path:
    """Write a model whose intermediate tensor has 16,384 numbers a row."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.ones((8, 16384), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("ReduceSum", ["r"], ["y"], axes=[1], keepdims=1),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)
    folder = root / "wide" / "1"
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    return root
