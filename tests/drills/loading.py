"""Loading: live traffic does not notice that a large version is loaded beside it, and another let go."""

from __future__ import annotations

import mmap
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from serving.engine.runtime import write_prepared
from serving.engine.session import OnnxSession
from serving.linux.thread_scheduling import lowest_priority
from tests.commands.test_command import children
from tests.conftest import Server
from tests.drills.drill import Report, drill
from tests.drills.load import Answer, load
from tests.drills.overload import percentile
from tests.drills.swaps import MIB, dense, promote, served

PROMISED = 1.5
"""Times its p99 in quiet spans that live traffic may take while something is loaded."""

Span: TypeAlias = tuple[float, float]
"""When it began and ended, in monotonic seconds."""

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


@dataclass(frozen=True, slots=True)
class Course:
    """What came of one run: p99 and p50 in seconds by kind of span, each the median over spans."""

    late: dict[str, float]
    middle: dict[str, float]
    failed: int
    took: list[float]
    """Seconds of each change."""

    def slower(self, kind: str) -> float:
        """Return the p99 of a kind of span, times that of quiet ones."""
        return self.late[kind] / self.late["quiet"]

    @property
    def bound(self) -> float:
        """Times that of quiet spans that a p99 may be: what was promised, from where this machine can keep it."""
        return max(PROMISED, PROMISED * self.slower("elsewhere"))


@drill("loading", "live traffic does not notice that large versions are loaded and let go beside it")
def loading(report: Report, *, spans: int = 6, seconds: float = 2.5, mebibytes: int = 200) -> None:
    """Compare the latency of iris while versions of a large model change with that of quiet times.

    The window of a load is all of it: from the order to promote until the version serves in every worker and the one
    before has gone, and a window follows the other without a pause. Each change loads one anew, and every request that
    touches a window counts. In every other round a new file is published too, and the window is that of the command:
    it is copied, examined and written down. Beside it the machine's floor: the same with loads, one after the other, in
    an unrelated process of the lowest priority. What that costs, the machine costs: where Linux has chosen a thread it
    leaves it the core for a tick, however low its priority, unless one that sleeps wakes there. So that is what a p99
    is judged by, where it alone is more than quiet.
    """
    for workers in (1, 2):
        course = measured(workers, spans=spans, seconds=seconds, mebibytes=mebibytes)
        of = f"{workers} worker{'s' * (workers > 1)}"
        report.exactly(f"{of}: failed", course.failed, 0)
        report.at_least(f"{of}: changes, each of which loads {mebibytes} MiB", len(course.took), spans)
        report.at_least(f"{of}: seconds of a change, median", statistics.median(course.took), 0, "s")
        report.at_least(f"{of}: p99 in quiet spans", course.late["quiet"] * 1000, 0, "ms")
        middle = course.middle["changes"] / course.middle["quiet"]
        report.at_most(f"{of}: p50 during changes, times that without", middle, 1.5)
        floor = course.slower("elsewhere")
        report.at_least(f"{of}: the floor: p99 while an unrelated process loads, times that without", floor, 0)
        for kind, when in (("changes", "during changes"), ("publishing", "while a version is published")):
            what = f"{of}: p99 {when}, times that without (bound: {PROMISED:g}, or {PROMISED:g} times the floor)"
            report.at_most(what, course.slower(kind), course.bound)
    course = measured(2, spans=max(2, spans // 4), seconds=seconds, mebibytes=mebibytes, faults={"off": ["aside"]})
    report.at_least("control: p99 during changes, times that without", course.slower("changes"), 0)
    report.control(
        f"loads on the event loop miss the same bound, {course.bound:.3g}", course.slower("changes") > course.bound
    )


def measured(
    workers: int, *, spans: int, seconds: float, mebibytes: int, faults: dict[str, Any] | None = None
) -> Course:
    """Have spans of each kind in turn beside steady requests, and see how long these took."""
    found: dict[str, list[Span]] = {"quiet": [], "changes": [], "elsewhere": [], "publishing": []}
    took: list[float] = []
    with (
        served(mebibytes, "--workers", str(workers), faults=faults, alone=True) as (server, key),
        elsewhere(mebibytes) as load_elsewhere,
        fresh_versions(server, mebibytes) as publish_one,
        load() as askers,
    ):
        change = _changes(server, key, took, mebibytes)
        change()
        change()
        took.clear()
        askers.http(server.port, "/v1/models/iris:predict", [5.1, 3.5, 1.4, 0.2], askers=2, pause=0.002)
        time.sleep(3)
        kinds = {"quiet": lambda: time.sleep(0.1), "changes": change, "elsewhere": load_elsewhere}
        for number in range(spans):
            for kind, what in kinds.items():
                found[kind].append(_span(what, seconds))
                time.sleep(PAUSE_S)
            if number % 2:
                found["publishing"].append(_span(publish_one, 0))
                time.sleep(PAUSE_S)
        answers = askers.stop()
    times = {kind: [_latencies(answers, *span) for span in within] for kind, within in found.items()}
    late = {kind: statistics.median(percentile(each, 99) for each in parts) for kind, parts in times.items()}
    middle = {kind: statistics.median(percentile(each, 50) for each in parts) for kind, parts in times.items()}
    return Course(late, middle, sum(not answer.version for answer in answers), took)


def _span(what: Callable[[], None], seconds: float) -> Span:
    """Do something again and again for so long, and once at least; return when."""
    began = time.monotonic()
    what()
    while time.monotonic() < began + seconds:
        what()
    return began, time.monotonic()


@contextmanager
def fresh_versions(server: Server, mebibytes: int) -> Iterator[Callable[[], None]]:
    """Give what publishes one more version of the large model with the real command; it gets no traffic."""
    models = server.models
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dense.onnx"
        file.write_bytes(dense(mebibytes, 4).SerializeToString())
        size, count = file.stat().st_size, 0

        def publish_one() -> None:
            nonlocal count
            count += 1
            with file.open("r+b") as weights:
                weights.seek(size // 2)
                weights.write(bytes([count]))  # in the lowest bits of some weight: another file, and as good
            command = [sys.executable, "-m", "serving.cli", "publish", str(file), "--name", "dense"]
            subprocess.run([*command, "--models", str(models)], check=True, capture_output=True)

        yield publish_one


def _changes(server: Server, key: str, took: list[float], mebibytes: int) -> Callable[[], None]:
    """Return what promotes the other version and waits until the one before has gone from all workers."""
    version = "2"
    alone = {pid: _mapped(pid) for pid in children(server.process.pid)}

    def change() -> None:
        nonlocal version
        version = "1" if version == "2" else "2"
        began = time.monotonic()
        promote(server, key, version)
        took.append(time.monotonic() - began)
        while any(_mapped(pid) > least + mebibytes / 2 for pid, least in alone.items()):
            time.sleep(0.01)

    return change


def _mapped(pid: int) -> float:
    """Return how many MiB of files a process maps; to ask for that disturbs it little."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[2]) * mmap.PAGESIZE / MIB


def _latencies(answers: list[Answer], began: float, ended: float) -> list[float]:
    return [a.came - a.asked for a in answers if a.came >= began and a.asked <= ended]
