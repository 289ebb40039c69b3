"""Rows in bulk: streams against single rows, what they cost in memory and to others, and files against onnxruntime.

`python -m benchmarks.bulk` on a machine where nothing else runs. All ratios are of figures of one run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import orjson
import pyarrow as pa
from pyarrow import csv, ipc, parquet
from rich.console import Console
from sklearn.datasets import load_breast_cancer

from benchmarks.beside import p99
from benchmarks.contestants import resident_mib
from benchmarks.findings import Finding, show
from benchmarks.protocols import serving, wrk

MODELS = Path(__file__).parent.parent / "models"
FOREST = "/v1/models/breast_cancer:predict"
TYPES = {
    "arrow": "application/vnd.apache.arrow.stream",
    "csv": "text/csv",
    "ndjson": "application/x-ndjson",
}
TIMES = {"arrow": 60.0, "csv": 20.0, "ndjson": 20.0}
"""By how much a stream should be faster than single rows; onnxruntime alone says what is possible."""
THREADS = {"one thread": 1, "all threads": 0}
MEMORY_MIB = 150.0
LIVE_TIMES = 2.0
SCORE_SHARE = 0.8
BATCH = 16384


def files(folder: Path, rows: int) -> dict[str, Path]:
    """Write made-up rows of the 30 features in each format."""
    data = load_breast_cancer()
    chance = np.random.default_rng(0)
    names = [str(name) for name in data.feature_names]
    matrix = (data.data[chance.integers(0, len(data.data), rows)] * chance.uniform(0.9, 1.1, (rows, 30))).round(5)
    table = pa.table(dict(zip(names, matrix.T, strict=True)))
    made = {kind: folder / f"rows.{kind}" for kind in (*TYPES, "parquet")}
    parquet.write_table(table, made["parquet"], row_group_size=1 << 17)
    with ipc.new_stream(made["arrow"], table.schema) as stream:
        stream.write_table(table, max_chunksize=BATCH)
    csv.write_csv(table, made["csv"], csv.WriteOptions(quoting_style="none"))
    with made["ndjson"].open("wb") as file:
        for row in matrix.tolist():
            file.write(orjson.dumps(dict(zip(names, row, strict=True))) + b"\n")
    return made


def sending(port: int, path: Path, kind: str) -> list[str]:
    """Give the command that sends a file as a stream and reads its answer."""
    command = ["curl", "-sS", "--fail", "-T", str(path), "-X", "POST", "-H", f"Content-Type: {TYPES[kind]}"]
    return [*command, "-H", "Expect:", "-o", "/dev/null", f"http://127.0.0.1:{port}{FOREST}"]


def send(port: int, path: Path, kind: str) -> float:
    """Send a file as a stream and read its answer; return seconds."""
    began = time.monotonic()
    subprocess.run(sending(port, path, kind), check=True)
    return time.monotonic() - began


@contextmanager
def peak(pid: int, before: float) -> Iterator[list[float]]:
    """Watch the memory of a process and its children; what it had grown by at the most, in MiB, is the last."""
    grown = [0.0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            grown.append(max(grown[-1], proportional_mib(pid) - before))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield grown
    finally:
        ended.set()
        watching.join()


def proportional_mib(pid: int) -> float:
    """Return the memory of a process and its children in MiB, each page once: those that are forked share many."""
    kilobytes = 0
    for each in resident_mib(pid):
        with suppress(OSError, IndexError):  # it has ended
            kilobytes += int(Path(f"/proc/{each}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
    return kilobytes / 1024


def streams(folder: Path, made: dict[str, Path], rows: int, rounds: int, seconds: int) -> list[Finding]:
    """Each form of stream against single rows over 32 connections, taking turns; memory; and live requests beside."""
    data = load_breast_cancer()
    one = dict(zip(map(str, data.feature_names), data.data[0].tolist(), strict=True))
    body = json.dumps({"instances": [one]}).encode()
    rates: dict[str, list[float]] = {kind: [] for kind in ("single", *TYPES)}
    bare: dict[str, list[float]] = {name: [] for name in THREADS}
    live: dict[str, list[float]] = {kind: [] for kind in ("alone", *TYPES)}
    with serving(MODELS, folder, "--workers", "1", cores=None) as (port, _, pid):
        wrk(f"http://127.0.0.1:{port}{FOREST}", body, None, 32, 1, pid, folder)
        idle = proportional_mib(pid)
        for _ in range(rounds):
            rates["single"].append(wrk(f"http://127.0.0.1:{port}{FOREST}", body, None, 32, seconds, pid, folder).rate)
            time.sleep(1.5)  # for a second behind single requests rows in bulk rest
            for kind in TYPES:
                rates[kind].append(rows / send(port, made[kind], kind))
            for name, threads in THREADS.items():
                bare[name].append(alone(made["parquet"], threads))
        with peak(pid, idle) as grown:  # looking takes its time
            for kind in TYPES:
                send(port, made[kind], kind)
        for _ in range(rounds):
            live["alone"].append(p99(port, seconds, FOREST, body))
            for kind in TYPES:
                with streaming(port, made[kind], kind):
                    live[kind].append(p99(port, seconds, FOREST, body))
    middle = {kind: median(found) for kind, found in (rates | bare).items()}
    waits = {kind: median(found) * 1000 for kind, found in live.items()}
    return [
        Finding("single rows, 32 connections", middle["single"], "rows/s"),
        *(Finding(f"a stream of {kind}", middle[kind], "rows/s") for kind in TYPES),
        *(Finding(f"onnxruntime alone, in memory, {name}", middle[name], "rows/s") for name in THREADS),
        *(Finding(f"{kind} to single rows", middle[kind] / middle["single"], "times", TIMES[kind]) for kind in TYPES),
        *(Finding(f"onnxruntime alone to them, {name}", middle[name] / middle["single"], "times") for name in THREADS),
        *(
            Finding(f"{kind}, of what onnxruntime alone reaches on one thread", middle[kind] / middle["one thread"], "")
            for kind in TYPES
        ),
        Finding("memory above idle", grown[-1], "MiB", MEMORY_MIB, most=True),
        Finding("p99 of single rows, alone", waits["alone"], "ms"),
        *(
            Finding(f"p99 beside {kind}", waits[kind] / waits["alone"], "times", LIVE_TIMES, most=True)
            for kind in TYPES
        ),
    ]


@contextmanager
def streaming(port: int, path: Path, kind: str) -> Iterator[None]:
    """Send a file again and again meanwhile."""
    *command, url = sending(port, path, kind)
    process = subprocess.Popen([*command, f"{url}#[1-1000]"])
    time.sleep(0.5)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def alone(path: Path, threads: int = 0) -> float:
    """Return the rows/s of onnxruntime by itself, on columns in memory; threads: 0 is its own choice."""
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(MODELS / "breast_cancer" / "1" / "model.onnx", options)
    columns = parquet.read_table(path)
    matrix = np.column_stack([column.to_numpy() for column in columns.columns]).astype(np.float32)
    name = session.get_inputs()[0].name
    session.run(None, {name: matrix[:BATCH]})
    began = time.monotonic()
    for at in range(0, len(matrix), BATCH):
        session.run(None, {name: matrix[at : at + BATCH]})
    return len(matrix) / (time.monotonic() - began)


def score(folder: Path, path: Path) -> float:
    """Return the rows/s of `serving score` from Parquet to Parquet, without its start."""
    command = [sys.executable, "-m", "serving.cli", "score", str(path), "--model", "breast_cancer"]
    command += ["--models", str(MODELS), "--out", str(folder / "scored.parquet")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.search(r"\(([\d,]+) rows/s\)", told)
    if found is None:
        raise RuntimeError(told)
    return float(found[1].replace(",", ""))


def scoring(folder: Path, path: Path, rounds: int) -> list[Finding]:
    """Files against onnxruntime alone, taking turns."""
    bare, whole = [], []
    score(folder, path)
    for _ in range(rounds):
        bare.append(alone(path))
        whole.append(score(folder, path))
    share = median(ours / theirs for ours, theirs in zip(whole, bare, strict=True))
    return [
        Finding("onnxruntime alone, in memory", median(bare), "rows/s"),
        Finding("serving score, Parquet to Parquet", median(whole), "rows/s"),
        Finding("serving score to onnxruntime alone", share, "times", SCORE_SHARE),
    ]


def main() -> int:
    """Measure, and say what was aimed at; status 1 where an aim was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--only", choices=["streams", "score"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = files(folder, given.rows)
        findings = []
        if given.only != "score":
            findings += streams(folder, made, given.rows, given.rounds, given.seconds)
        if given.only != "streams":
            findings += scoring(folder, made["parquet"], given.rounds)
    show(findings, Console())
    return int(any(finding.verdict == "MISSED" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
