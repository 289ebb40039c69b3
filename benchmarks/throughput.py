"""wrk on its own core against each server on another, contestants alternating, medians of the rounds."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer

from benchmarks.contestants import Contestant, contestants, resident_mib, running
from benchmarks.plot import draw

RESULTS = Path(__file__).parent / "results"
TARGETS = [
    # what, case, ours, theirs, least ratio (figures of p50 are turned over, so that more is better)
    ("v2, 1 row, 32 connections: typical FastAPI", "v2 1 row 32c", "serving", "typical FastAPI", 7.0),
    ("v2, 1 row, 32 connections: bare uvicorn", "v2 1 row 32c", "serving", "bare uvicorn hello", 1.2),
    ("v2, 1 row, 32 connections: nginx static", "v2 1 row 32c", "serving", "nginx static reply", 0.33),
    ("V1, 1 row, 32 connections: typical FastAPI", "v1 1 row 32c", "serving", "typical FastAPI", 6.0),
    (
        "in the example application, v2: plain ASGI",
        "v2 1 row 32c",
        "serving, in the example application",
        "serving, plain ASGI",
        0.9,
    ),
    ("plain ASGI, v2: typical FastAPI", "v2 1 row 32c", "serving, plain ASGI", "typical FastAPI", 3.0),
    ("v2, 32 rows, 32 connections: typical FastAPI", "v2 32 rows 32c", "serving", "typical FastAPI", 5.0),
    ("V1, 32 rows, 32 connections: typical FastAPI", "v1 32 rows 32c", "serving", "typical FastAPI", 5.0),
]


@dataclass(frozen=True)
class Case:
    """One load: dialect, rows in a request, connections."""

    dialect: str
    rows: int
    connections: int

    def __str__(self) -> str:
        return f"{self.dialect} {self.rows} row{'s' if self.rows > 1 else ''} {self.connections}c"


@dataclass(frozen=True)
class Figure:
    """What one wrk run measured; latencies in milliseconds."""

    rate: float
    p50: float
    p99: float
    failed: int


def request_body(case: Case, contestant: Contestant) -> str:
    """Write the JSON of a request."""
    data = load_breast_cancer()
    rows = data.data[: case.rows].tolist()
    if case.dialect == "v1":
        names = [str(n) for n in data.feature_names]
        if contestant.name == "typical FastAPI":
            names = [n.replace(" ", "_") for n in names]
        body: Any = {"instances": [dict(zip(names, row, strict=True)) for row in rows]}
    else:
        flat = [value for row in rows for value in row]
        body = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [len(rows), 30], "data": flat}]}
    return json.dumps(body, separators=(",", ":"))


def load(  # noqa: PLR0917  one run is all of these
    case: Case, contestant: Contestant, port: int, seconds: int, core: str | None, folder: Path
) -> Figure:
    """Run wrk once against a contestant."""
    url = f"http://127.0.0.1:{port}{contestant.paths[case.dialect]}"
    return wrk(url, request_body(case, contestant), case.connections, seconds, core, folder)


def wrk(  # noqa: PLR0917  one run is all of these
    url: str, body: str, connections: int, seconds: int, core: str | None, folder: Path
) -> Figure:
    """Post a body for some seconds."""
    lua = folder / "load.lua"
    lua.write_text(f'wrk.method="POST"\nwrk.headers["content-type"]="application/json"\nwrk.body=[==[{body}]==]\n')
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(lua), url]
    if core is not None:
        command = ["taskset", "-c", core, *command]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = (int(bad[1]) if bad else 0) + (sum(int(n) for n in errors.groups()) if errors else 0)
    return Figure(_number(r"Requests/sec:\s+([\d.]+)", text), _latency("50%", text), _latency("99%", text), failed)


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"wrk printed no {pattern}:\n{text}")
    return float(found[1])


def _latency(percent: str, text: str) -> float:
    found = re.search(rf"{percent}\s+([\d.]+)(us|ms|s)", text)
    if not found:
        raise RuntimeError(f"wrk printed no {percent}:\n{text}")
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def measure(  # noqa: PLR0917  one session is all of these
    chosen: list[Contestant], cases: list[Case], rounds: int, seconds: int, folder: Path, console: Console
) -> dict[str, dict[str, list[Figure]]]:
    """Let the contestants take turns, each alive only while it is measured, so that none disturbs another."""
    pinned = (os.cpu_count() or 1) > 1
    figures: dict[str, dict[str, list[Figure]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for contestant in chosen:
            many = "workers" in contestant.name
            with running(contestant, folder, "0" if pinned and not many else None) as (port, _, _):
                load(cases[0], contestant, port, 1, "1" if pinned else None, folder)
                for case in cases:
                    core = "1" if pinned and not many else None
                    figure = load(case, contestant, port, seconds, core, folder)
                    figures[str(case)][contestant.name].append(figure)
            console.print(f"round {number + 1} of {rounds}: {contestant.name}", highlight=False)
    return figures


def medians(figures: dict[str, dict[str, list[Figure]]]) -> dict[str, dict[str, Figure]]:
    """Take the median of each figure over the rounds; failures add up."""
    return {
        case: {
            name: Figure(
                statistics.median(f.rate for f in runs),
                statistics.median(f.p50 for f in runs),
                statistics.median(f.p99 for f in runs),
                sum(f.failed for f in runs),
            )
            for name, runs in by_name.items()
        }
        for case, by_name in figures.items()
    }


def start_up(models: Path, folder: Path) -> dict[str, float]:
    """Measure seconds to ready and resident MiB of a worker with all shipped models."""
    made = contestants(models, folder)["serving"]
    command = tuple(str(models) if part == str(models) else part for part in made.command)
    with running(Contestant("serving", command, {}, made.ready), folder, None) as (_, pid, seconds):
        sizes = resident_mib(pid)
        workers = [size for each, size in sizes.items() if each != pid]
        return {"ready_s": seconds, "worker_mib": max(workers), "parent_mib": sizes[pid]}


def check(middle: dict[str, dict[str, Figure]]) -> list[tuple[str, float, float]]:
    """Compare with the targets: (what, ratio, least)."""
    found = []
    for what, case, ours, theirs, least in TARGETS:
        by_name = middle.get(case, {})
        if ours in by_name and theirs in by_name:
            found.append((what, by_name[ours].rate / by_name[theirs].rate, least))
    one = middle.get("v2 1 row 1c", {})
    if "serving" in one and "typical FastAPI" in one:
        ratio = one["serving"].p50 / one["typical FastAPI"].p50
        found.append(("v2, 1 row, 1 connection: p50 of typical FastAPI (at most)", ratio, -0.45))
    return found


def passed(ratio: float, least: float) -> bool:
    """Tell whether a ratio reaches its target; a negative target is a most."""
    return ratio >= least if least > 0 else ratio <= -least


def show(middle: dict[str, dict[str, Figure]], console: Console) -> None:
    """Print a table for each case."""
    for case, by_name in middle.items():
        table = Table("", "requests/s", "p50 ms", "p99 ms", "failed", title=case, title_justify="left")
        for name, figure in by_name.items():
            cells = (f"{figure.rate:,.0f}", f"{figure.p50:.3f}", f"{figure.p99:.3f}", str(figure.failed))
            table.add_row(name, *cells)
        console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write JSON and draw; non-zero if a request failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--only", default=".", help="regular expression of contestants")
    parser.add_argument("--cases", default=".", help="regular expression of cases, such as 'v2 1 row 32c'")
    parser.add_argument("--keep", action="store_true", help="leave the results that are committed as they are")
    given = parser.parse_args(arguments)
    console = Console(width=110)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subprocess.run([sys.executable, "-W", "ignore", "-m", "training", "forest", "--to", str(folder)], check=True)
        known = contestants(folder, folder)
        chosen = [c for name, c in known.items() if re.search(given.only, name)]
        cases = [Case(d, r, c) for d in ("v2", "v1") for r in (1, 32) for c in (32, 8, 1)]
        cases = [case for case in cases if re.search(given.cases, str(case))]
        middle = medians(measure(chosen, cases, given.rounds, given.seconds, folder, console))
        started = start_up(Path("models"), folder)
    show(middle, console)
    targets = check(middle)
    table = Table("ratio of serving to", "measured", "target", "", title="targets", title_justify="left")
    for what, ratio, least in targets:
        table.add_row(what, f"{ratio:.2f}", f"{abs(least):.2f}", "reached" if passed(ratio, least) else "MISSED")
    console.print(table)
    console.print(
        f"ready in {started['ready_s']:.2f} s (target 3); a worker with all shipped models takes "
        f"{started['worker_mib']:.0f} MiB resident (target 150), the parent {started['parent_mib']:.0f} MiB"
    )
    if "serving, 2 workers" in {c.name for c in chosen}:
        console.print("2 workers share both cores with wrk, so their figure is a lower bound.")
    if not given.keep:
        _write(middle, targets, started, given)
    return 1 if any(f.failed for by_name in middle.values() for f in by_name.values()) else 0


def _write(
    middle: dict[str, dict[str, Figure]],
    targets: list[tuple[str, float, float]],
    started: dict[str, float],
    given: argparse.Namespace,
) -> None:
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "command": f"python -m benchmarks --rounds {given.rounds} --seconds {given.seconds:g}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("onnxruntime", "fastapi", "uvicorn", "pydantic", "orjson", "pysimdjson")},
        "start_up": started,
        "targets": [{"what": w, "ratio": r, "target": t, "reached": passed(r, t)} for w, r, t in targets],
        "figures": {case: {n: asdict(f) for n, f in by_name.items()} for case, by_name in middle.items()},
    }
    (RESULTS / "throughput.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(middle, RESULTS / "throughput.png", facts["machine"])
