"""What sight costs the fast path: each thing that is watched alone, all that is on by default, and what can be added.

`python -m benchmarks.cost`: ratios of servers that all run and take turns. Of requests a second, which is
what counts, and of requests for a second of the server's processor, which others on the machine disturb less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import Contestant, contestants, resident_mib, running
from benchmarks.throughput import RESULTS, Case, load

OFF, DEFAULT = "everything off", "default: metrics and drift"
CASES = [Case("v2", 1, 32), Case("v1", 1, 32)]
KINDS = {"rate": "requests/s", "frugality": "a CPU second"}
_TRACED = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:{sink}",
    "OTEL_TRACES_SAMPLER": "traceidratio",
    "OTEL_TRACES_SAMPLER_ARG": "0.01",
    "OTEL_BSP_SCHEDULE_DELAY": "500",  # ms; so that a server's spans do not wait for another's turn
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


class Sink(BaseHTTPRequestHandler):
    """Takes spans, and looks at none: what a receiver does with them is not the server's cost."""

    def do_POST(self) -> None:
        """Read the body and say that it is well."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def sink() -> Iterator[int]:
    """Run a receiver of spans; give its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Sink) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def watched(models: Path, scratch: Path, spans: int) -> list[Contestant]:
    """Make a server of each row; spans: the port that takes them."""
    plain = contestants(models, scratch)["serving"]
    return [
        replace(
            plain,
            name=name,
            command=plain.command + tuple(flag.format(folder=scratch) for flag in flags),
            env={key: value.format(sink=spans) for key, value in env.items()},
        )
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


def measure(  # noqa: PLR0917  one session is all of these
    chosen: list[Contestant], starts: int, rounds: int, seconds: int, folder: Path, console: Console
) -> dict[str, Runs]:
    """Let the servers take turns; by case and server the run of each round.

    A process is faster or slower than its like by some percent for all its life, so each is started some times; and in
    each round they come in the other order, so that none is always behind the same.
    """
    found: dict[str, Runs] = {str(case): defaultdict(list) for case in CASES}
    for start in range(starts):
        with ExitStack() as stack:
            servers = [(one, *stack.enter_context(running(one, folder, "0"))[:2]) for one in chosen]
            for contestant, port, _ in servers:
                load(CASES[0], contestant, port, 1, "1", folder)  # to warm up
            for number in range(rounds):
                for contestant, port, pid in servers if number % 2 else reversed(servers):
                    for case in CASES:
                        before = processor_s(pid)
                        figure = load(case, contestant, port, seconds, "1", folder)
                        spent = processor_s(pid) - before
                        run = Run(figure.rate, figure.rate * seconds / spent, figure.failed)
                        found[str(case)][contestant.name].append(run)
                console.print(f"start {start + 1} of {starts}, round {number + 1} of {rounds}", highlight=False)
    return found


def ratios(runs: Runs, name: str, other: str, what: str) -> list[float]:
    """Return the ratio of each round: both servers ran within some seconds in each."""
    pairs = zip(runs[name], runs[other], strict=True)
    return [getattr(mine, what) / getattr(its, what) for mine, its in pairs]


def spread(found: list[float]) -> float:
    """Return by how much another median of as many rounds would differ, two times in three: its standard error."""
    return 1.25 * statistics.stdev(found) / len(found) ** 0.5


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write JSON; non-zero if a request failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--starts", type=int, default=2, help="of each server")
    parser.add_argument("--rounds", type=int, default=4, help="of each start")
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the results that are committed as they are")
    given = parser.parse_args(arguments)
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        models = folder / "models"
        subprocess.run([sys.executable, "-W", "ignore", "-m", "training", "forest", "--to", str(models)], check=True)
        with sink() as spans:
            chosen = watched(models, folder, spans)
            runs = measure(chosen, given.starts, given.rounds, given.seconds, folder, console)
    found: list[dict[str, Any]] = []
    for name, _, _, other, least in ROWS[1:]:
        row: dict[str, Any] = {"what": name, "of": other, "least": least}
        for case, what in itertools.product(CASES, KINDS):
            each = ratios(runs[str(case)], name, other, what)
            row |= {f"{case}, {what}": statistics.median(each), f"{case}, {what}, error": spread(each)}
        found.append(row)
    table = Table("", "as a share of", *(f"{case}, {text}" for case in CASES for text in KINDS.values()), "at least")
    for row in found:
        least = "" if row["least"] is None else f"{row['least']:.2f}"
        names = [f"{case}, {what}" for case in CASES for what in KINDS]
        cells = (f"{row[name]:.2f} ± {row[f'{name}, error']:.2f}" for name in names)
        table.add_row(str(row["what"]), str(row["of"]), *cells, least)
    console.print(table)
    if not given.keep:
        facts = {
            "command": "python -m benchmarks.cost "
            f"--starts {given.starts} --rounds {given.rounds} --seconds {given.seconds}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{os.cpu_count()} cores",
            "ratios": found,
        }
        (RESULTS / "cost.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if any(run.failed for by_name in runs.values() for each in by_name.values() for run in each) else 0


if __name__ == "__main__":
    raise SystemExit(main())
