"""Graphs whose first dimension is no batch, asked by many at once: each caller gets what it would get alone."""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.mixing_graphs import mixing

# onnxruntime answers the left out one differently each time, alone too: it goes on training.
NAMES = tuple(name for name in mixing() if name != "batch_statistics")


@drill("strangers", "whatever a graph does with its first dimension, no caller's rows have a part in another's answer")
def strangers(report: Report, *, clients: int = 12, requests: int = 40, names: Collection[str] = NAMES) -> None:
    """Ask each graph from all clients at once; the control believes that all keep rows apart."""
    with tempfile.TemporaryDirectory(prefix="strangers-") as temporary:
        folder = Path(temporary)
        for name in names:
            (folder / name / "1").mkdir(parents=True)
            (folder / name / "1" / "model.onnx").write_bytes(mixing()[name].SerializeToString())
        number = len(names) * clients * requests
        with faulty({}, "--max-delay-ms", "2", models=folder) as server:
            answered, wrong, _ = ask_all(server, folder, names, clients, requests)
            report.exactly("answered with 200", answered, number, f"of {number:,}")
            report.exactly("wrong among them", wrong, 0)
        with faulty({"off": ["proof"]}, "--max-delay-ms", "2", models=folder) as server:
            _, wrong, graphs = ask_all(server, folder, names, clients, requests)
            report.control(f"without proof {wrong:,} answers are wrong, of {graphs} graphs", graphs > len(names) / 2)


def ask_all(server: Server, folder: Path, names: Collection[str], clients: int, requests: int) -> tuple[int, int, int]:
    """Return how many requests were answered, how many answers were wrong, and of how many graphs."""
    answered = wrong = graphs = 0
    with ThreadPoolExecutor(clients) as pool:
        for name in names:
            start = threading.Barrier(clients)
            found = list(
                pool.map(lambda seed, n=name, s=start: _ask(server, folder, n, requests, seed, s), range(clients))
            )
            answered += sum(a for a, _ in found)
            wrong += sum(w for _, w in found)
            graphs += any(w for _, w in found)
    return answered, wrong, graphs


def _ask(  # noqa: PLR0917  what one client does
    server: Server, folder: Path, name: str, requests: int, seed: int, start: threading.Barrier
) -> tuple[int, int]:
    alone = ort.InferenceSession(str(folder / name / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    trailing = [int(dim) for dim in alone.get_inputs()[0].shape[1:]]
    chance = np.random.default_rng(seed)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    answered = wrong = 0
    start.wait(60)
    for _ in range(requests):
        rows = chance.normal(size=(int(chance.integers(1, 6)), *trailing)).astype(np.float32)
        given = {"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
        connection.request("POST", f"/v2/models/{name}/infer", json.dumps({"inputs": [given]}))
        answer = connection.getresponse()
        body = json.loads(answer.read())
        if answer.status == 200:
            answered += 1
            due = alone.run(["y"], {"x": rows})[0]
            got = np.array(next(o["data"] for o in body["outputs"] if o["name"] == "y"), np.float32)
            wrong += got.size != due.size or not np.allclose(
                got.reshape(due.shape), due, rtol=1e-3, atol=1e-4, equal_nan=True
            )
    connection.close()
    return answered, wrong
