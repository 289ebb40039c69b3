"""What sight costs the fast path: each thing that is watched alone, all that is on by default, and what can be added.

Ratios in one run, the servers taking turns: `python -m benchmarks.cost`. Of requests a second, which is what counts,
and of requests for a second of the server's processor, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import Contestant, contestants, resident_mib, running
from benchmarks.throughput import RESULTS, Case, load

OFF, DEFAULT = "everything off", "default: metrics and drift"
CASES = [Case("v2", 1, 32), Case("v1", 1, 32)]
KINDS = {"rate": "requests/s", "frugality": "a CPU second"}
_TRACED = {
    "OTEL_TRACES_EXPORTER": "console",
    "OTEL_TRACES_SAMPLER": "traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": "0.01",
}
ROWS: tuple[tuple[str, tuple[str, ...], dict[str, str], str, float | None], ...] = (
    # what, its flags, its environment, what it is compared with, and the least ratio
    (OFF, ("--no-metrics", "--no-drift"), {}, OFF, None),
    ("metrics", ("--no-drift",), {}, OFF, 0.9),
    ("drift", ("--no-metrics",), {}, OFF, None),
    (DEFAULT, (), {}, OFF, 0.85),
    ("default and traces of 1 %", (), _TRACED, DEFAULT, 0.95),
    ("default and capture of 1 %", ("--capture-dir", "{folder}/capture"), {}, DEFAULT, None),
    ("default and lines of the log for 1 %", ("--access-log", "0.01"), {}, DEFAULT, None),
)


def watched(models: Path, scratch: Path) -> list[Contestant]:
    """Make a server of each row."""
    plain = contestants(models, scratch)["serving"]
    return [
        replace(plain, name=name, command=plain.command + tuple(f.format(folder=scratch) for f in flags), env=env)
        for name, flags, env, _, _ in ROWS
    ]


Runs: TypeAlias = "dict[str, list[Run]]"


@dataclass(frozen=True)
class Run:
    """What one run of wrk found: requests a second, and for a second of the server's processor."""

    rate: float
    frugality: float
    failed: int


def processor_s(pid: int) -> float:
    """Return the processor time that a server's processes have taken."""
    ticks = 0
    for each in resident_mib(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(chosen: list[Contestant], rounds: int, seconds: int, folder: Path, console: Console) -> dict[str, Runs]:
    """Let the servers take turns; by case and server the run of each round."""
    found: dict[str, Runs] = {str(case): defaultdict(list) for case in CASES}
    for number in range(rounds):
        for contestant in chosen:
            with running(contestant, folder, "0") as (port, pid, _):
                load(CASES[0], contestant, port, 1, "1", folder)
                for case in CASES:
                    before = processor_s(pid)
                    figure = load(case, contestant, port, seconds, "1", folder)
                    spent = processor_s(pid) - before
                    run = Run(figure.rate, figure.rate * seconds / spent, figure.failed)
                    found[str(case)][contestant.name].append(run)
            console.print(f"round {number + 1} of {rounds}: {contestant.name}", highlight=False)
    return found


def ratio(runs: Runs, name: str, other: str, what: str) -> float:
    """Return the median of the rounds' ratios: both servers ran in the same minute in each."""
    pairs = zip(runs[name], runs[other], strict=True)
    return statistics.median(getattr(mine, what) / getattr(its, what) for mine, its in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write JSON; non-zero if a request failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the results that are committed as they are")
    given = parser.parse_args(arguments)
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        models = folder / "models"
        subprocess.run([sys.executable, "-W", "ignore", "-m", "training", "forest", "--to", str(models)], check=True)
        runs = measure(watched(models, folder), given.rounds, given.seconds, folder, console)
    found = [
        {"what": name, "of": other, "least": least}
        | {f"{case}, {what}": ratio(runs[str(case)], name, other, what) for case in CASES for what in KINDS}
        for name, _, _, other, least in ROWS[1:]
    ]
    table = Table("", "as a share of", *(f"{case}, {text}" for case in CASES for text in KINDS.values()), "at least")
    for row in found:
        least = "" if row["least"] is None else f"{row['least']:.2f}"
        cells = (f"{row[f'{case}, {what}']:.2f}" for case in CASES for what in KINDS)
        table.add_row(str(row["what"]), str(row["of"]), *cells, least)
    console.print(table)
    if not given.keep:
        facts = {
            "command": f"python -m benchmarks.cost --rounds {given.rounds} --seconds {given.seconds}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{os.cpu_count()} cores",
            "ratios": found,
        }
        (RESULTS / "cost.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if any(run.failed for by_name in runs.values() for each in by_name.values() for run in each) else 0


if __name__ == "__main__":
    raise SystemExit(main())
