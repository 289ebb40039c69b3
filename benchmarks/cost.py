"""What sight costs the fast path: each thing that is watched alone, all that is on by default, and what can be added.

Ratios of requests a second in one run, the servers taking turns: `python -m benchmarks.cost`.
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
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import Contestant, contestants
from benchmarks.throughput import RESULTS, Case, Figure, measure

OFF, DEFAULT = "everything off", "default: metrics and drift"
CASES = [Case("v2", 1, 32), Case("v1", 1, 32)]
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


def ratio(figures: dict[str, list[Figure]], name: str, other: str) -> float:
    """Return the median of the rounds' ratios: both servers ran in the same minute in each."""
    return statistics.median(mine.rate / its.rate for mine, its in zip(figures[name], figures[other], strict=True))


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
        figures = measure(watched(models, folder), CASES, given.rounds, given.seconds, folder, console)
    found = [
        {"what": name, "of": other, "least": least} | {str(c): ratio(figures[str(c)], name, other) for c in CASES}
        for name, _, _, other, least in ROWS[1:]
    ]
    table = Table("requests/s", "as a share of", *map(str, CASES), "at least")
    for row in found:
        least = "" if row["least"] is None else f"{row['least']:.2f}"
        table.add_row(str(row["what"]), str(row["of"]), *(f"{row[str(c)]:.3f}" for c in CASES), least)
    console.print(table)
    if not given.keep:
        facts = {
            "command": f"python -m benchmarks.cost --rounds {given.rounds} --seconds {given.seconds}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{os.cpu_count()} cores",
            "ratios": found,
        }
        (RESULTS / "cost.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if any(f.failed for by_name in figures.values() for runs in by_name.values() for f in runs) else 0


if __name__ == "__main__":
    raise SystemExit(main())
