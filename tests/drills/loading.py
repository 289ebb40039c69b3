"""Loading: live traffic does not notice that a large version is loaded beside it, and another let go."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serving.engine.priority import lowest_priority
from serving.engine.session import OnnxSession, write_prepared
from tests.conftest import Server
from tests.drills.drill import Report, drill
from tests.drills.load import Answer, load
from tests.drills.swaps import dense, promote, served
from tests.test_command import children

PAUSE_S = 1.0
"""Seconds between two spans: what was let go in one is given back to the system within half a second."""


@contextmanager
def elsewhere(mebibytes: int) -> Iterator[Callable[[], None]]:
    """Give what loads a version in a process that has nothing to do with the server, at the lowest priority."""
    with tempfile.TemporaryDirectory() as folder:
        file, prepared = Path(folder) / "dense.onnx", Path(folder) / "model.onnx"
        file.write_bytes(dense(mebibytes, 3).SerializeToString())
        write_prepared(file, prepared)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_load_often, args=(prepared, theirs), daemon=True)
        process.start()
        ours.recv()

        def once() -> None:
            ours.send("load")
            ours.recv()

        yield once
        process.kill()
        process.join()


def _load_often(path: Path, pipe: Connection) -> None:
    lowest_priority()
    pipe.send("ready")
    while pipe.recv():
        OnnxSession(path, warm_rows=512, prepared=True)
        pipe.send("done")


@drill("loading", "live traffic does not notice that large versions are loaded and let go beside it")
def loading(report: Report, *, spans: int = 8, seconds: float = 2.5, mebibytes: int = 200) -> None:
    """Compare the latency of iris while versions of a large model change with that of quiet times.

    The window of a load is all of it: from the order to promote until the version serves in every worker and the one
    before has gone, and a window follows the other without a pause. Each change loads one anew, and every request that
    touches a window counts. Beside it the machine's floor: the same with loads, one after the other, in an unrelated
    process of the lowest priority. What that costs, the machine costs: where Linux has chosen a thread it leaves it
    the core for a tick, however low its priority, unless one that sleeps wakes there.
    """
    for workers in (1, 2):
        late, middle, failed, took = measured(workers, spans=spans, seconds=seconds, mebibytes=mebibytes)
        of = f"{workers} worker{'s' * (workers > 1)}"
        report.exactly(f"{of}: failed", failed, 0)
        report.at_least(f"{of}: changes, each of which loads {mebibytes} MiB", len(took), spans)
        report.at_least(f"{of}: seconds of a change, median", statistics.median(took), 0, "s")
        report.at_least(f"{of}: p99 in quiet spans", late["quiet"] * 1000, 0, "ms")
        report.at_most(f"{of}: p50 during changes, times that without", middle["here"] / middle["quiet"], 1.5)
        report.at_least(f"{of}: p99 while another process loads, times quiet", late["elsewhere"] / late["quiet"], 0)
        report.at_least(f"{of}: p99 during changes, times that floor", late["here"] / late["elsewhere"], 0)
        report.at_most(f"{of}: p99 during changes, times that without", late["here"] / late["quiet"], 1.5)
    faults = {"off": ["aside"]}
    late, *_ = measured(2, spans=max(1, spans // 4), seconds=seconds, mebibytes=mebibytes, faults=faults)
    report.control("loads on the event loop would show", late["here"] / late["quiet"] > 1.5)


def measured(
    workers: int, *, spans: int, seconds: float, mebibytes: int, faults: dict[str, Any] | None = None
) -> tuple[dict[str, float], dict[str, float], int, list[float]]:
    """Return p99 and p50 in seconds by kind of span, how many requests failed, and how long each change took."""
    found: dict[str, list[tuple[float, float]]] = {"quiet": [], "here": [], "elsewhere": []}
    took: list[float] = []
    flags = ("--workers", str(workers))
    with (
        served(mebibytes, *flags, faults=faults, alone=True) as (server, key),
        elsewhere(mebibytes) as load_elsewhere,
        load() as askers,
    ):
        change = _changes(server, key, took)
        change()
        change()
        took.clear()
        askers.http(server.port, "/v1/models/iris:predict", [5.1, 3.5, 1.4, 0.2], askers=2, pause=0.002)
        time.sleep(3)
        for _ in range(spans):
            for kind, what in (("quiet", lambda: time.sleep(0.1)), ("here", change), ("elsewhere", load_elsewhere)):
                began = time.monotonic()
                while time.monotonic() < began + seconds:
                    what()
                found[kind].append((began, time.monotonic()))
                time.sleep(PAUSE_S)
        answers = askers.stop()
    times = {kind: _latencies(answers, within) for kind, within in found.items()}
    late = {kind: latencies[int(len(latencies) * 0.99)] for kind, latencies in times.items()}
    middle = {kind: statistics.median(latencies) for kind, latencies in times.items()}
    return late, middle, sum(not answer.version for answer in answers), took


def _changes(server: Server, key: str, took: list[float]) -> Callable[[], None]:
    """Return what promotes the other version and waits until the one before has gone from all workers."""
    version = "2"

    def change() -> None:
        nonlocal version
        version = "1" if version == "2" else "2"
        began = time.monotonic()
        promote(server, key, version)
        took.append(time.monotonic() - began)
        while any(_mapped(pid) > 1 for pid in children(server.process.pid)):
            time.sleep(0.05)  # seldom: what is looked at takes its lock, and this takes time from the two cores

    return change


def _mapped(pid: int) -> int:
    """Return how many models' weights a process maps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return 0
    return len({line.split()[4] for line in lines if line.endswith("/weights.bin")})


def _latencies(answers: list[Answer], spans: list[tuple[float, float]]) -> list[float]:
    return sorted(a.came - a.asked for a in answers if any(a.came >= b and a.asked <= e for b, e in spans))
