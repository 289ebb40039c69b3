"""What the prepared form of a large model saves: memory and loading time for 1, 2 and 4 workers, beside plain loading.

.venv/bin/python -m benchmarks.prepared
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from serving.engine.session import OnnxSession
from serving.gate import gate, prepared
from serving.gate.gate import Gate
from serving.linux.memory import bound_free_memory
from serving.repository import manifest
from serving.repository.manifest import MODEL_FILE, Hashes

RESULTS = Path(__file__).parent / "results" / "prepared.json"
WIDTH, LAYERS, ROWS, RUNS = 2560, 8, 16, 15


def dense(path: Path) -> None:
    """Write a network of 8 dense layers of 2560: 200 MB of weights."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(LAYERS):
        weights.append(numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH), np.float32) / 50, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [last := f"r{i}"]))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", WIDTH]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "dense", ports[:1], ports[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def worker(path: Path, is_prepared: bool, pipe: Connection) -> None:
    """Be a worker: load, say so, and answer what is asked: time a batch, or measure memory."""
    bound_free_memory()
    before = proportional()
    began = time.perf_counter()
    session = OnnxSession(path, threads=1, warm_rows=ROWS, prepared=is_prepared)
    pipe.send(time.perf_counter() - began)
    rows = (np.ones((ROWS, WIDTH), dtype=np.float32),)
    while (asked := pipe.recv()) != "end":
        if asked == "memory":
            pipe.send(proportional() - before)
            continue
        taken = []
        for _ in range(RUNS):
            start = time.perf_counter()
            session.run(rows)
            taken.append(time.perf_counter() - start)
        pipe.send(statistics.median(taken))


def proportional(pid: int | str = "self") -> int:
    """Return a process's proportional set size in bytes: shared pages count by their share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(path: Path, is_prepared: bool, workers: int) -> dict[str, float]:
    """Start workers one after another; time a batch in the first while the others rest."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, loads = [], [], []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(path, is_prepared, theirs))
        process.start()
        loads.append(ours.recv())
        pipes.append(ours)
        processes.append(process)
    pipes[0].send("time")
    batch = pipes[0].recv()
    memory = [(pipe.send("memory"), pipe.recv())[1] for pipe in pipes]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("end")
        process.join()
    return {"load_s": statistics.median(loads), "memory_mb": statistics.mean(memory) / 1e6, "batch_ms": batch * 1e3}


def main() -> int:
    """Measure, print the table, and keep the figures."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="prepared-", dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
        folder = Path(temporary) / "dense" / "1"
        folder.mkdir(parents=True)
        dense(folder / MODEL_FILE)
        state = Path(temporary) / "state"
        state.mkdir()
        declared = manifest.of(folder, Hashes())
        began = time.perf_counter()
        with prepared.written(state, declared) as into, Gate() as examiner:
            report = examiner.examine(folder, prepare_in=into)
        results["gate_s"] = time.perf_counter() - began
        path = prepared.locate(state, declared.content)
        if not report.ok or path is None:
            print("; ".join(report.reasons) or "no prepared form")
            return 1
        for workers in (1, 2, 4):
            results[str(workers)] = {
                "plain": measure(folder / MODEL_FILE, False, workers),
                "prepared": measure(path, True, workers),
            }
    results["onnxruntime"] = gate.runtime()
    table = Table(title=f"{declared.size / 1e6:.0f} MB of dense layers", title_justify="left")
    for column in (
        "workers",
        "memory each, MB: plain",
        "prepared",
        "load, s: plain",
        "prepared",
        "16 rows, ms: plain",
        "prepared",
    ):
        table.add_column(column, justify="right")
    for workers in ("1", "2", "4"):
        plain, form = results[workers]["plain"], results[workers]["prepared"]
        cells = [(plain["memory_mb"], form["memory_mb"], "{:.0f}"), (plain["load_s"], form["load_s"], "{:.2f}")]
        cells.append((plain["batch_ms"], form["batch_ms"], "{:.1f}"))
        table.add_row(workers, *(form.format(value) for a, b, form in cells for value in (a, b)))
    Console(width=120).print(table, f"the gate, with both forms written and compared: {results['gate_s']:.1f} s")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
