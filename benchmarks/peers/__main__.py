"""This server and its peers around the same ONNX file: one core for each server, taking turns, medians.

`--url NAME=URL` adds one that runs already, such as Triton: `--url triton=http://127.0.0.1:8000/v2/models/forest/infer`.
Its form is Open Inference's JSON, or what stands before the address: `v1:http://...` for `instances`.
"""

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import httpx2 as httpx
import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer

from benchmarks.contestants import Contestant, contestants, resident_mib, running
from benchmarks.cost import processor_s
from benchmarks.peers.environments import NotInstalled, environment, versions
from benchmarks.peers.forms import FORMS
from benchmarks.peers.report import CASES, RESULTS, case_name, comparison
from benchmarks.peers.servers import peers
from benchmarks.plot import draw
from benchmarks.prepared import proportional
from benchmarks.throughput import wrk

IMAGE = Path("docs/images/peers.png")
OURS = "its defaults; no setting is changed"


@dataclass(frozen=True)
class Server:
    """One that is measured: started by us, or at an address where it runs already."""

    name: str
    form: str
    contestant: Contestant | None = None
    url: str = ""

    @contextmanager
    def at(self, folder: Path) -> Iterator[tuple[str, int | None]]:
        """Give its address, and its process where it is ours to see."""
        if self.contestant is None:
            yield self.url, None
            return
        pinned = "0" if (os.cpu_count() or 1) > 1 else None
        log = folder / "server.log"
        try:
            with running(self.contestant, folder, pinned, log) as (port, pid, _):
                yield f"http://127.0.0.1:{port}{self.contestant.paths[self.form]}", pid
        except RuntimeError as error:
            raise RuntimeError(f"{error}; its last words: {log.read_text().strip()[-200:]}") from error


@dataclass(frozen=True)
class Run:
    """What one load found: requests/s, milliseconds, processor seconds for 1,000 requests, MiB (shared pages by share).

    The last two are None where the server is not ours to see.
    """

    rate: float
    p50: float
    p99: float
    failed: int
    processor: float | None
    memory: float | None


Figures: TypeAlias = "dict[str, dict[str, list[Run]]]"


class Answers:
    """The rows that are asked, and what the model says to them."""

    def __init__(self, model: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._rows = load_breast_cancer().data[: max(rows for rows, _ in CASES)]
        self._scores = session.run(["probabilities"], {"features": self._rows.astype(np.float32)})[0]

    def body(self, form: str, rows: int) -> str:
        """Write a request."""
        return json.dumps(FORMS[form].request(self._rows[:rows].tolist()), separators=(",", ":"))

    def check(self, url: str, form: str) -> None:
        """Wait until a server answers, and raise RuntimeError unless each size of request is answered rightly."""
        until = time.monotonic() + 60
        for rows in sorted({rows for rows, _ in CASES}):
            headers = {"content-type": "application/json"}
            while True:
                try:
                    answer = httpx.post(url, content=self.body(form, rows), headers=headers, timeout=30)
                except httpx.TransportError as error:
                    answer, said = None, str(error)
                else:
                    said = f"{answer.status_code}: {answer.text[:200]}"
                if answer is not None and answer.status_code == 200:
                    break
                if time.monotonic() > until:
                    raise RuntimeError(f"it does not answer: {said}")
                time.sleep(0.2)
            wanted = self._scores[:rows].ravel()
            try:
                found = np.ravel(FORMS[form].scores(answer.json()))
            except (LookupError, TypeError, ValueError, StopIteration) as error:
                raise RuntimeError(f"its answer is of another form: {said}") from error
            if found.shape != wanted.shape or not np.allclose(found, wanted, atol=1e-5):
                raise RuntimeError(f"its answer to {rows} rows is wrong: {said}")


def measure(  # noqa: PLR0917  one session is all of these
    chosen: list[Server], answers: Answers, rounds: int, seconds: int, folder: Path, console: Console
) -> tuple[Figures, dict[str, str]]:
    """Let the servers take turns, each alive only while it is measured; and say what is wrong with one that can't."""
    core = "1" if (os.cpu_count() or 1) > 1 else None
    figures: Figures = {case_name(*case): defaultdict(list) for case in CASES}
    missing: dict[str, str] = {}
    for number in range(rounds):
        for server in chosen:
            if server.name in missing:
                continue
            try:
                with server.at(folder) as (url, pid):
                    answers.check(url, server.form)
                    wrk(url, answers.body(server.form, 1), 8, 1, core, folder)
                    for rows, connections in CASES:
                        before = processor_s(pid) if pid else 0
                        load = wrk(url, answers.body(server.form, rows), connections, seconds, core, folder)
                        cost = memory = None
                        if pid:
                            cost = 1000 * (processor_s(pid) - before) / max(load.rate * seconds, 1)
                            memory = sum(map(proportional, resident_mib(pid))) / 2**20
                        run = Run(load.rate, load.p50, load.p99, load.failed, cost, memory)
                        figures[case_name(rows, connections)][server.name].append(run)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                missing[server.name] = str(error)
                for by_name in figures.values():
                    by_name.pop(server.name, None)
            console.print(f"round {number + 1} of {rounds}: {server.name} {missing.get(server.name, '')}")
    return figures, missing


def median(runs: list[Run]) -> Run:
    """Take the median of each figure over the rounds; failures add up."""

    def middle(name: str) -> Any:
        values = [getattr(run, name) for run in runs]
        return None if None in values else statistics.median(values)

    return Run(**{f.name: middle(f.name) for f in fields(Run)} | {"failed": sum(run.failed for run in runs)})


def at_address(given: str) -> Server:
    """Read NAME=[FORM:]URL."""
    name, _, address = given.partition("=")
    form, colon, url = address.partition(":")
    return Server(name, form, url=url) if form in FORMS and colon else Server(name, "v2", url=address)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write JSON and draw; non-zero if a request failed or a peer is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--only", default=".", metavar="NAME", help="regular expression of servers")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=[FORM:]URL")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "serving-peers")
    parser.add_argument("--keep", action="store_true", help="leave the results that are committed as they are")
    given = parser.parse_args(arguments)
    console = Console(width=160, highlight=False)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        models = folder / "models"
        subprocess.run([sys.executable, "-W", "ignore", "-m", "training", "forest", "--to", str(models)], check=True)
        model = models / "forest" / "1" / "model.onnx"
        ours = Server("serving", "v2", contestants(models, folder)["serving"])
        chosen = [ours] if re.search(given.only, ours.name) else []
        about: dict[str, Any] = {
            "serving": {"versions": {n: version(n) for n in ("serving", "onnxruntime")}, "setting": OURS, "page": ""}
        }
        missing: dict[str, str] = {}
        for peer in peers(folder, model):
            about[peer.name] = {"versions": {}, "setting": peer.setting, "page": peer.page}
            if re.search(given.only, peer.name):
                try:
                    programs = environment(peer, given.environments)
                    about[peer.name]["versions"] = versions(peer, programs)
                    chosen.append(Server(peer.name, peer.form, peer.contestant(programs, model)))
                except NotInstalled as error:
                    missing[peer.name] = str(error)
        chosen += map(at_address, given.url)
        figures, failed = measure(chosen, Answers(model), given.rounds, given.seconds, folder, console)
    middle = {case: {name: median(runs) for name, runs in by_name.items()} for case, by_name in figures.items()}
    facts = {
        "command": " ".join(["python -m benchmarks.peers", *(arguments or sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load": round(load, 1),
        "python": platform.python_version(),
        "about": about,
        "missing": missing | failed,
        "figures": {case: {n: asdict(run) for n, run in by_name.items()} for case, by_name in middle.items()},
    }
    head, rows = comparison(facts)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if not given.keep:
        (RESULTS / "peers.json").write_text(json.dumps(facts, indent=1) + "\n")
        draw(middle, IMAGE, facts["machine"], [(case_name(1, 32), "one row"), (case_name(32, 32), "32 rows")])
    lost = any(run.failed for by_name in middle.values() for run in by_name.values())
    return 1 if lost or facts["missing"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
