"""Loading and letting go: a version's memory comes back, and live traffic does not notice that one is loaded."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.access.key_store import KeyStore
from serving.engine.session import OnnxSession, write_prepared
from serving.fleet.publish import publish
from tests.conftest import MODELS, Server, running
from tests.drills.drill import Report, drill
from tests.drills.load import load
from tests.test_command import children

MIB = 1024 * 1024


def dense(mebibytes: int, seed: int) -> onnx.ModelProto:
    """Make a model of 32 inputs and outputs with square layers of weights between, `mebibytes` together."""
    side, layers = 1024, max(1, mebibytes // 4)
    noise = np.random.default_rng(seed)
    shapes = [(32, side), *[(side, side)] * layers, (side, 32)]
    weights = [
        numpy_helper.from_array((noise.standard_normal(shape) / 32).astype(np.float32), f"w{i}")
        for i, shape in enumerate(shapes)
    ]
    names = ["x", *(f"h{i}" for i in range(len(shapes) - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(len(shapes))]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "dense", [ports[0]], [ports[1]], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@contextmanager
def served(mebibytes: int, *flags: str) -> Iterator[tuple[Server, str]]:
    """Serve iris and two versions of a dense model, of which only what has a role is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        models, file = Path(folder) / "models", Path(folder) / "dense.onnx"
        models.mkdir()
        publish(models, "iris", MODELS / "iris" / "2" / "model.onnx", who="drill")
        for seed in (1, 2):
            file.write_bytes(dense(mebibytes, seed).SerializeToString())
            publish(models, "dense", file, who="drill")
        (models / "dense" / "traffic.json").write_text('{"generation": 1, "stable": "2", "keep": {"latest": 1}}')
        key = KeyStore(Path(folder) / "keys").create("drill", frozenset({"deploy"}))
        with running("--keys", f"{folder}/keys", *flags, models=models) as server:
            yield server, key


def promote(server: Server, key: str, version: str) -> None:
    """Make a version stable, and wait until it serves."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request(
        "POST",
        "/v1/repository/models/dense/promote",
        json.dumps({"version": version}),
        {"Authorization": f"Bearer {key}"},
    )
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 200, text


def resident(pid: int) -> float:
    """Return a process's resident memory in MiB."""
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def worker(server: Server) -> int:
    """Return the pid of the only worker: the child that holds most."""
    return max(children(server.process.pid), key=resident)


@drill("swaps", "a thousand versions come and go, and the memory of each comes back")
def swaps(report: Report, *, times: int = 1000, mebibytes: int = 16, warm: int = 100) -> None:
    """Load and let go one of two versions `times` times, and compare the resident memory of the worker.

    Not from the start: the first hundred or so grow the heap once, whatever comes after.
    """
    with served(mebibytes) as (server, key):
        for _ in range(warm // 2):
            promote(server, key, "1")
            promote(server, key, "2")
        pid = worker(server)
        before = settled(pid)
        promote(server, key, "1")
        loaded = settled(pid)
        promote(server, key, "2")
        for _ in range(times // 2):
            promote(server, key, "1")
            promote(server, key, "2")
        after = settled(pid)
        same = worker(server) == pid
    report.exactly("swaps", times // 2 * 2, times)
    report.exactly("the worker is the same process (1: yes)", float(same), 1)
    report.at_most(f"growth of resident memory; the model has {mebibytes} MiB", after - before, mebibytes / 10, "MiB")
    report.control("a version that is kept would show", loaded - before > mebibytes / 10)


def settled(pid: int) -> float:
    """Return the least resident memory within two seconds: what has been let go is given back a moment later."""
    until, least = time.monotonic() + 2, resident(pid)
    while time.monotonic() < until:
        time.sleep(0.1)
        least = min(least, resident(pid))
    return least


@contextmanager
def elsewhere(mebibytes: int) -> Iterator[Callable[[], None]]:
    """Give what loads a version in a process that has nothing to do with the server, at the lowest priority."""
    with tempfile.TemporaryDirectory() as folder:
        file, prepared = Path(folder) / "dense.onnx", Path(folder) / "model.onnx"
        file.write_bytes(dense(mebibytes, 3).SerializeToString())
        write_prepared(file, prepared)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_load_often, args=(prepared, theirs), daemon=True)
        process.start()
        ours.recv()

        def once() -> None:
            ours.send("load")
            ours.recv()

        yield once
        process.kill()
        process.join()


def _load_often(path: Path, pipe: Connection) -> None:
    os.nice(19)
    pipe.send("ready")
    while pipe.recv():
        OnnxSession(path, warm_rows=512, prepared=True)
        pipe.send("done")


@drill("loading", "live traffic does not notice that a large version is loaded beside it")
def loading(report: Report, *, times: int = 20, mebibytes: int = 200) -> None:
    """Compare the latency of iris while a large version is loaded again and again with that of quiet times.

    The same is done with loads in an unrelated process of the lowest priority: what that costs, the machine costs.
    """
    with served(mebibytes) as (server, key), elsewhere(mebibytes) as load_elsewhere, load() as askers:
        promote(server, key, "2")
        spans: dict[str, list[tuple[float, float]]] = {"here": [], "elsewhere": [], "quiet": []}
        askers.http(server.port, "/v1/models/iris:predict", [5.1, 3.5, 1.4, 0.2], askers=2, pause=0.002)
        time.sleep(3)
        for _ in range(times):
            with _spanned(spans["here"]):
                promote(server, key, "1")
            promote(server, key, "2")
            time.sleep(1)
            with _spanned(spans["elsewhere"]):
                load_elsewhere()
            time.sleep(0.3)
            with _spanned(spans["quiet"]):
                time.sleep(0.3)
        answers = askers.stop()
    seconds = {
        kind: sorted(a.came - a.asked for a in answers if any(b <= a.came and a.asked <= e for b, e in found))
        for kind, found in spans.items()
    }
    here, quiet = seconds["here"], seconds["quiet"]
    late = {kind: found[int(len(found) * 0.99)] for kind, found in seconds.items()}
    report.exactly("failed", sum(not answer.version for answer in answers), 0)
    report.at_least("seconds of one load, median", statistics.median(e - b for b, e in spans["here"]), 0.01, "s")
    report.at_least("requests during loads", len(here), 100)
    report.at_least("p99 while another process loads, times that without", late["elsewhere"] / late["quiet"], 0)
    report.at_most("p99 during a load, times that without", late["here"] / late["quiet"], 1.5)
    report.control("p99 of the largest thousandth would show", here[-1] / quiet[int(len(quiet) * 0.5)] > 1.5)


@contextmanager
def _spanned(spans: list[tuple[float, float]]) -> Iterator[None]:
    began = time.monotonic()
    yield
    spans.append((began, time.monotonic()))
