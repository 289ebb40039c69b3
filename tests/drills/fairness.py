"""Five models at twice their capacity on one core: is a sixth with little load answered within a turn of each?"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import MODELS, Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.open_loop import Load, Sample
from tests.drills.overload import OTHER, make_slow_model, percentile, post
from tests.drills.workers import workers

BUSY = 5
ROWS = 16
LIGHT_RATE = 25.0
TENSOR = {"name": "x", "datatype": "FP32", "shape": [ROWS, 4], "data": [0.5] * (4 * ROWS)}
BODY = json.dumps({"inputs": [TENSOR]}).encode()


@dataclass(slots=True)
class Course:
    """The light model's requests alone and beside the others, those of the others, and their capacity a second."""

    alone: list[Sample]
    beside: list[Sample]
    busy: list[Sample]
    capacity: float


@drill("fairness", "one model's overload does not starve another")
def run(report: Report, *, seconds: float = 15.0, timed: bool = True) -> None:
    """`seconds`: of overload. `timed`: judge by the clock too, which a busy machine can't keep, and run the control."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        make_slow_model(models)
        for index in range(1, BUSY):
            shutil.copytree(models / "slow", models / f"slow{index}")
        shutil.copytree(MODELS / "iris", models / "iris")
        course = _measure(models, seconds, {})
        queued = _measure(models, seconds, {"off": ["fair"]}) if timed else None
    report.at_least("refusals of the busy models", sum(s.status == 429 for s in course.busy), 1)
    good = sum(s.status == 200 for s in course.beside)
    report.at_least("answers of the light model, of all asked", good / len(course.beside), 0.99 if timed else 0.9)
    if queued is None:
        return
    alone, beside, fifo = (
        percentile([s.took for s in samples], 99) for samples in (course.alone, course.beside, queued.beside)
    )
    report.at_most("p99 of the light model alone", alone, 0.05, "s")
    # A turn of each busy model, were the kernel to give each a whole request of 16 rows before the light one's.
    turns = 1 / course.capacity
    report.at_most(
        f"its p99 beside {BUSY} busy models ({turns:.3f} s: a request of each)", beside, max(turns, 0.05), "s"
    )
    report.control(f"one queue for all models answers it at p99 after {fifo:.3f} s", fifo > max(turns, 0.05))


def _measure(models: Path, seconds: float, faults: dict[str, object]) -> Course:
    flags = ("--workers", "1", "--deadline-s", "1", "--log-level", "error")
    with faulty(faults, *flags, models=models) as server:
        _pin(server)
        return asyncio.run(_course(server, seconds))


def _pin(server: Server) -> None:
    """Keep the server on one core, so that its models compete."""
    core = min(os.sched_getaffinity(0))
    for process in {server.process.pid, *workers(server)}:
        for task in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})


async def _course(server: Server, seconds: float) -> Course:
    names = ["slow", *(f"slow{index}" for index in range(1, BUSY))]
    loads = [Load(server.port, post(name, BODY)) for name in names]
    light = Load(server.port, OTHER)
    await light.offer(LIGHT_RATE, seconds / 3)
    await asyncio.sleep(0.2)
    alone, light.samples = light.samples, []
    capacity = sum(await asyncio.gather(*(load.closed(8, seconds / 3) for load in loads))) / BUSY
    for load in loads:
        load.samples = []
    rate = max(1.0, 2 * capacity)
    await asyncio.gather(light.offer(LIGHT_RATE, seconds), *(load.offer(rate, seconds) for load in loads))
    await asyncio.gather(*(load.finish(5) for load in [light, *loads]))
    return Course(alone, light.samples, [s for load in loads for s in load.samples], max(capacity, 0.1))
