"""Jobs whose workers are killed, and whose database crashes, again and again: no row twice, none missing."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np

from tests.conftest import MODELS, Server
from tests.drills.drill import Report, drill
from tests.drills.steady import until
from tests.drills.workers import workers
from tests.jobs.conftest import NAMES, expected, flowers
from tests.jobs.postgres import Postgres

SERVERS, WORKERS = 2, 2
BAD = 1000
"""Every so many rows one is bad."""


@drill("jobs", "50 workers killed and databases restarted amid a job: no row twice, none missing")
def jobs(report: Report, *, rows: int = 2_500_000, kills: int = 25, restarts: int = 5) -> None:
    """Two servers of one folder do one job, once on each kind of database, while their workers are killed.

    The control has a part removed behind the workers' back.
    """
    for kind in ("sqlite", "postgresql"):
        with contextlib.ExitStack() as ending:
            postgres = ending.enter_context(contextlib.closing(_Closing())) if kind == "postgresql" else None
            url = "sqlite" if postgres is None else postgres.cluster.database("jobs")
            servers = ending.enter_context(_servers(url))
            labels, probabilities = _ask(servers[0], rows)
            result = _under_fire(
                report, servers, kind, kills=kills, restarts=restarts, postgres=postgres.cluster if postgres else None
            )
            _compare(report, kind, result, labels, probabilities)
            if postgres is None:
                short = result.split(b"\n")
                del short[len(short) // 2]
                found = Report()
                _compare(found, kind, b"\n".join(short), labels, probabilities)
                report.control("a row that is missing is found", not found.kept)


class _Closing:
    def __init__(self) -> None:
        self.cluster = Postgres()

    def close(self) -> None:
        self.cluster.remove()


@contextmanager
def _servers(url: str) -> Iterator[list[Server]]:
    """Run servers of one models folder, with the same state."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        shutil.copytree(MODELS / "iris", root / "iris")
        flags = ("--workers", str(WORKERS), "--state-dir", f"{folder}/state", "--jobs-database-url", url)
        servers = [Server(*flags, models=root) for _ in range(SERVERS)]
        try:
            yield [server.wait() for server in servers]
        finally:
            for server in servers:
                server.stop()


def _ask(server: Server, rows: int) -> tuple[list[str], np.ndarray]:  # type: ignore[type-arg]
    """Ask for a job with rows of which each is another one; return what is right: None's label is that of a bad row."""
    given = flowers(rows)
    labels, probabilities = expected(given)
    lines = [",".join(map(str, row)) for row in given.tolist()]
    for bad in range(0, rows, BAD):
        lines[bad], labels[bad] = "x,1,1,1", ""
    asked = httpx.post(
        f"{server.url}/v1/jobs?model=iris&output=csv",
        content="\n".join([",".join(NAMES), *lines]).encode(),
        headers={"content-type": "text/csv", "idempotency-key": "drill"},
        timeout=120,
    )
    assert asked.status_code == 201, asked.text
    return labels, probabilities


def _job(servers: list[Server]) -> dict[str, object]:
    """Return the job as whichever server answers knows it; {} where none does now."""
    for server in random.sample(servers, len(servers)):
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{server.url}/v1/jobs", timeout=20)
            if answer.status_code == 200:
                found: dict[str, object] = answer.json()["jobs"][0]
                return found
    return {}


def _under_fire(
    report: Report, servers: list[Server], kind: str, *, kills: int, restarts: int, postgres: Postgres | None
) -> bytes:
    """Kill workers, and the database, until so many have died; return the result of the job that outlived them."""
    killed = 0
    crashed = 0
    began = time.monotonic()
    while _job(servers).get("state") in ("queued", "running", None):
        if killed < kills:
            server = random.choice(servers)
            alive = workers(server)
            if alive:
                os.kill(random.choice(sorted(alive)), signal.SIGKILL)
                killed += 1
            if postgres is not None and killed * restarts // kills > (killed - 1) * restarts // kills:
                postgres.stop()
                time.sleep(random.uniform(0, 1))
                postgres.start()
                crashed += 1
        time.sleep(random.uniform(0.2, 1.2))
        assert time.monotonic() - began < 1200, _job(servers)
    job = _job(servers)
    report.at_least(f"{kind}: workers killed amid the job", killed, kills)
    if postgres is not None:
        report.at_least(f"{kind}: crashes of the database", crashed, restarts)
    report.exactly(f"{kind}: succeeded", float(job["state"] == "succeeded"), 1)
    until(lambda: all(_ready(server) for server in servers), 60)
    path = f"{servers[0].url}/v1/jobs/{job['id']}"
    report.exactly(f"{kind}: bad rows named, without those expected", _named(path) - -(-int(_rows(job)) // BAD), 0)
    return httpx.get(f"{path}/result", timeout=120).content


def _rows(job: dict[str, object]) -> int:
    return int(str(job["rows_good"])) + int(str(job["rows_bad"]))


def _named(path: str) -> int:
    return httpx.get(f"{path}/errors", timeout=60).content.count(b"\n")


def _ready(server: Server) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{server.url}/v2/health/ready", timeout=20).status_code == 200
    return False


def _compare(report: Report, kind: str, result: bytes, labels: list[str], probabilities: np.ndarray) -> None:  # type: ignore[type-arg]
    """Hold each line of a result against what onnxruntime says of the row in its place."""
    lines = result.decode().splitlines()[1:]
    report.exactly(f"{kind}: rows of the result", len(lines), len(labels))
    there = zip(lines, labels, probabilities.tolist(), strict=False)
    report.exactly(f"{kind}: rows that are not in their place", sum(not _right(*each) for each in there), 0)


def _right(line: str, label: str, probabilities: list[float]) -> bool:
    """Tell whether a line of a result is that of its row: by its label, and by its probabilities."""
    said, *numbers = line.split(",")[:4]
    if said.strip('"') != label:
        return False
    return not label or max(abs(float(a) - b) for a, b in zip(numbers, probabilities, strict=True)) < 1e-5
