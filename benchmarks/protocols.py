"""HTTP binary, JSON and gRPC beside each other: small rows, a megabyte, long JSON, and what large bodies cost others.

.venv/bin/python -m benchmarks.protocols; a part of `make bench`. With PERF_ANALYZER naming NVIDIA's perf_analyzer (its
libraries on LD_LIBRARY_PATH) gRPC is also measured with that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console
from sklearn.datasets import load_breast_cancer

from benchmarks.beside import beside
from benchmarks.bodies import WIDTH, binary_body, echo, json_body, texts, wide
from benchmarks.contestants import Contestant, contestants, free_port, running
from benchmarks.decoding import forest_codec
from benchmarks.findings import Finding, show
from benchmarks.grpc_load import load as grpc_load
from benchmarks.grpc_servers import compare as grpc_servers

SHIPPED = ("penguins", "docs_topic", "iris")
RESULTS = Path(__file__).parent / "results" / "protocols.json"
ROWS = 256


@dataclass(frozen=True)
class Load:
    """What wrk measured; milliseconds. cpu: the worker's own microseconds a request, kernel included."""

    rate: float
    p50: float
    p99: float
    cpu: float


def wrk(  # noqa: PLR0917  one run is all of these
    url: str, body: bytes, json_bytes: int | None, connections: int, seconds: int, pid: int, folder: Path
) -> Load:
    """Send a body again and again, from the second core."""
    (folder / "body").write_bytes(body)
    header = f'wrk.headers["inference-header-content-length"]="{json_bytes}"\n' if json_bytes is not None else ""
    (folder / "send.lua").write_text(
        f'wrk.method="POST"\nlocal f=io.open("{folder}/body","rb")\nwrk.body=f:read("*a")\nf:close()\n{header}'
        'wrk.headers["content-type"]="application/json"\n'
    )
    before = cpu_seconds(pid)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(folder / "send.lua"), url]
    text = subprocess.run([*second_core(), *command], capture_output=True, text=True, check=True).stdout
    spent = cpu_seconds(pid) - before
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"requests failed:\n{text}")
    done = int(_found(r"(\d+) requests in", text)[1])
    return Load(
        float(_found(r"Requests/sec:\s+([\d.]+)", text)[1]),
        _milliseconds("50%", text),
        _milliseconds("99%", text),
        spent / done * 1e6,
    )


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"wrk printed no {pattern}:\n{text}")
    return found


def _milliseconds(percent: str, text: str) -> float:
    found = _found(rf"{percent}\s+([\d.]+)(us|ms|s)", text)
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its children so far."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += [int(child) for child in task.read_text().split()]
    ticks = 0
    for each in pids:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def second_core() -> list[str]:
    """Return what keeps a client off the server's core."""
    return ["taskset", "-c", "1"] if (os.cpu_count() or 1) > 1 else []


@contextmanager
def serving(models: Path, folder: Path, *flags: str, cores: str | None = "0") -> Iterator[tuple[int, int, int]]:
    """Run the server; give its ports for HTTP and gRPC, and its pid."""
    made = contestants(models, folder)["serving"]
    grpc_port = free_port()
    command = (*made.command, "--grpc-port", str(grpc_port), *flags)
    with running(Contestant("serving", command, {}, made.ready), folder, cores) as (port, pid, _):
        yield port, grpc_port, pid


def small_rows(models: Path, folder: Path, rounds: int, seconds: int) -> list[Finding]:
    """One row at 32 connections: JSON, binary and gRPC, taking turns."""
    row = load_breast_cancer().data[:1].astype(np.float32)
    text = json_body(load_breast_cancer().data[:1])
    raw, head = binary_body(row)
    found: dict[str, list[Load]] = {"JSON": [], "binary": [], "gRPC": []}
    analyzed: list[float] = []
    with serving(models, folder) as (port, grpc_port, pid):
        url = f"http://127.0.0.1:{port}/v2/models/forest/infer"
        wrk(url, text, None, 32, 1, pid, folder)
        for _ in range(rounds):
            found["JSON"].append(wrk(url, text, None, 32, seconds, pid, folder))
            found["binary"].append(wrk(url, raw, head, 32, seconds, pid, folder))
            before = cpu_seconds(pid)
            rate, p50, p99, done = grpc_load(f"127.0.0.1:{grpc_port}", row, 32, seconds, second_core())
            found["gRPC"].append(Load(rate, p50, p99, (cpu_seconds(pid) - before) / done * 1e6))
            analyzed += perf_analyzer(grpc_port, folder)
    rate = {name: median(load.rate for load in loads) for name, loads in found.items()}
    cpu = {name: median(load.cpu for load in loads) for name, loads in found.items()}
    p99 = {name: median(load.p99 for load in loads) for name, loads in found.items()}
    findings = [Finding("binary against JSON, 1 row, 32 connections", rate["binary"] / rate["JSON"], "times", 1.0)]
    for name in found:
        findings += [
            Finding(f"{name}, 1 row, 32 in flight: requests", rate[name], "/s"),
            Finding(f"{name}, 1 row, 32 in flight: p99", p99[name], "ms"),
            Finding(f"{name}, 1 row, 32 in flight: processor time of the server", cpu[name], "us a request"),
        ]
    if analyzed:
        findings.append(Finding("gRPC, 1 row, 32 in flight, perf_analyzer: requests", median(analyzed), "/s"))
    return findings


def perf_analyzer(grpc_port: int, folder: Path) -> list[float]:
    """Run NVIDIA's load generator where there is one."""
    program = os.environ.get("PERF_ANALYZER")
    if not program:
        return []
    report = folder / "perf.csv"
    flags = ["-i", "grpc", "--concurrency-range", "32", "-s", "90", "-p", "2000", "-r", "3", "-f", str(report)]
    command = [program, "-m", "forest", "-u", f"127.0.0.1:{grpc_port}", "--input-data", "random", *flags]
    report.unlink(missing_ok=True)
    subprocess.run([*second_core(), *command], capture_output=True, check=False)  # it fails where figures scatter
    return [float(line.split(",")[1]) for line in report.read_text().splitlines()[1:2]] if report.exists() else []


def megabyte(models: Path, folder: Path, rounds: int, seconds: int) -> list[Finding]:
    """256 rows of 1,024 floats: the server's part of the time, and the typical service's rate with the same in JSON."""
    rows = np.random.default_rng(0).random((ROWS, WIDTH)).round(4)
    raw, head = binary_body(rows)
    text = json_body(rows)
    beside, whole, ours, json_ours, theirs = [], [], [], [], []
    typical = contestants(models, folder)["typical FastAPI"]
    typical = Contestant(
        typical.name, typical.command, typical.paths, "/ready", {"MODEL": str(models / "wide" / "1" / "model.onnx")}
    )
    for _ in range(rounds):
        with serving(models, folder) as (port, _, pid):
            url = f"http://127.0.0.1:{port}/v2/models/wide/infer"
            wrk(url, raw, head, 1, 1, pid, folder)
            before = totals(port)
            load = wrk(url, raw, head, 1, seconds, pid, folder)
            count, prediction, inference = (b - a for a, b in zip(before, totals(port), strict=True))
            beside.append((prediction - inference) / count * 1e3)
            whole.append(load.p50 - inference / count * 1e3)
            ours.append(wrk(url, raw, head, 4, seconds, pid, folder).rate)
            json_ours.append(wrk(url, text, None, 4, seconds, pid, folder).rate)
        with running(typical, folder, "0") as (port, pid, _):
            theirs.append(wrk(f"http://127.0.0.1:{port}/infer", text, None, 4, seconds, pid, folder).rate)
    return [
        Finding("1 MB binary: server's time beside the model's, mean", median(beside), "ms", 0.3, most=True),
        Finding("1 MB binary: client's p50 beside the model's, wire included", median(whole), "ms"),
        Finding("1 MB binary against the typical service's JSON", median(ours) / median(theirs), "times", 10.0),
        Finding("1 MB binary: requests", median(ours), "/s"),
        Finding("the same as JSON: requests", median(json_ours), "/s"),
        Finding("the same as JSON, typical FastAPI: requests", median(theirs), "/s"),
    ]


def totals(port: int) -> tuple[float, float, float]:
    """Return predictions of the wide model so far, their seconds, and the model's own."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()

    def value(name: str) -> float:
        return float(_found(rf'(?m)^{name}{{model="wide",version="1"}} (\S+)$', text)[1]) if name in text else 0.0

    return (
        value("serving_prediction_seconds_count"),
        value("serving_prediction_seconds_sum"),
        value("serving_inference_seconds_sum"),
    )


def decoding(models: Path) -> list[Finding]:
    """1,000 rows of 30: the decoder beside Pydantic's strict list of lists, both up to the model's array."""
    codec = forest_codec(models)
    data = load_breast_cancer().data
    rows = np.concatenate([data, data])[:1000]
    body = json_body(rows)
    adapter = TypeAdapter(list[list[float]])
    lists = json.dumps(rows.tolist(), separators=(",", ":")).encode()

    def pydantic() -> Any:
        return np.array(adapter.validate_json(lists, strict=True), dtype=np.float32)

    assert np.array_equal(codec.decode([], body).inputs[0], pydantic())
    ours, theirs, bare = (
        best(call)
        for call in (
            lambda: codec.decode([], body),
            pydantic,
            lambda: adapter.validate_json(lists, strict=True),
        )
    )
    return [
        Finding("JSON of 1,000 x 30, decoded: Pydantic's time by ours, to the array", theirs / ours, "times", 2.5),
        Finding("the same, Pydantic stopping at the lists", bare / ours, "times"),
        Finding("JSON of 1,000 x 30: decoding", ours * 1e3, "ms"),
    ]


def best(call: Callable[[], Any]) -> float:
    """Return the least seconds of a call."""
    return min(timeit.repeat(call, number=10, repeat=15)) / 10


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protocols", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument(
        "--only", default=".", help="regular expression of parts: small_rows grpc megabyte decoding beside"
    )
    parser.add_argument("--keep", action="store_true", help="leave the results that are committed as they are")
    given = parser.parse_args(arguments)
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subprocess.run([sys.executable, "-W", "ignore", "-m", "training", "forest", "--to", str(models)], check=True)
        wide(models)
        echo(models)
        texts(models)
        for shipped in SHIPPED:
            shutil.copytree(Path("models") / shipped, models / shipped)
        parts: dict[str, Callable[[], list[Finding]]] = {
            "small_rows": lambda: small_rows(models, folder, given.rounds, given.seconds),
            "grpc": lambda: grpc_servers(
                models,
                folder,
                load_breast_cancer().data[:1].astype(np.float32),
                given.rounds,
                given.seconds,
                second_core(),
            ),
            "megabyte": lambda: megabyte(models, folder, given.rounds, given.seconds),
            "decoding": lambda: decoding(models),
            "beside": lambda: beside(models, folder, given.rounds, given.seconds),
        }
        findings = [f for name, part in parts.items() if re.search(given.only, name) for f in part()]
    show(findings, Console(width=130))
    if not given.keep:
        facts: dict[str, Any] = {
            "command": f"python -m benchmarks.protocols --rounds {given.rounds} --seconds {given.seconds}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "findings": [{**asdict(f), "verdict": f.verdict} for f in findings],
        }
        if given.only != ".":  # a part that was measured alone takes the place of its old figures
            old, new = json.loads(RESULTS.read_text()), facts["findings"]
            names = {finding["what"] for finding in new}
            facts = {**old, "findings": [*(f for f in old["findings"] if f["what"] not in names), *new]}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
