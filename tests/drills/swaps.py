"""Loading and letting go: the memory of a version that went comes back."""

from __future__ import annotations

import http.client
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.access.key_store import KeyStore
from serving.deploy.publish import publish
from serving.gate.gate import Gate
from tests.commands.test_command import children
from tests.conftest import MODELS, Server, faulty, running
from tests.drills.drill import Report, drill

MIB = 1024 * 1024


def dense(mebibytes: int, seed: int) -> onnx.ModelProto:
    """Make a model of 32 inputs and outputs with square layers of weights between, `mebibytes` together."""
    side, layers = (1024, mebibytes // 4) if mebibytes else (32, 1)
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
def served(
    mebibytes: int, *flags: str, faults: dict[str, Any] | None = None, alone: bool = False
) -> Iterator[tuple[Server, str]]:
    """Serve iris and two versions of a dense model, of which the second is stable, and stays loaded.

    alone: neither stays loaded but where it is stable; a third and small version does.
    """
    run = running if faults is None else partial(faulty, faults)
    with tempfile.TemporaryDirectory() as folder:
        models, file = Path(folder) / "models", Path(folder) / "dense.onnx"
        models.mkdir()
        with Gate() as gate:
            publish(models, "iris", MODELS / "iris" / "2" / "model.onnx", who="drill", examiner=gate)
            for seed, size in ((1, mebibytes), (2, mebibytes), (3, 0)):
                file.write_bytes(dense(size, seed).SerializeToString())
                publish(models, "dense", file, who="drill", examiner=gate)
        kept = "3" if alone else "2"
        (models / "dense" / "traffic.json").write_text(f'{{"generation": 1, "stable": "2", "keep": ["{kept}"]}}')
        key = KeyStore(Path(folder) / "keys").create("drill", frozenset({"deploy"}))
        with run("--keys", f"{folder}/keys", *flags, models=models) as server:
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
def swaps(report: Report, *, times: int = 1000, mebibytes: int = 16, warm: int = 100, share: float = 0.1) -> None:
    """Load and let go one of two versions `times` times, and compare the resident memory of the worker.

    Not from the start: the first hundred or so grow the heap once, whatever comes after. share: of one version, that
    may stay in all.
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
    report.at_most(
        f"growth of resident memory; the model has {mebibytes} MiB", after - before, mebibytes * share, "MiB"
    )
    report.control("a version that is kept would show", loaded - before > mebibytes * share)


def settled(pid: int) -> float:
    """Return the least resident memory within two seconds: what has been let go is given back a moment later."""
    until, least = time.monotonic() + 2, resident(pid)
    while time.monotonic() < until:
        time.sleep(0.1)
        least = min(least, resident(pid))
    return least
