"""Twice the capacity in open loop: what is taken is answered in time, the rest is told no at once, and it passes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import MODELS, Server, running
from tests.drills.drill import Report, drill
from tests.drills.open_loop import Load, Sample

PLOT = Path(__file__).parents[2] / "benchmarks" / "results" / "overload.png"
DEADLINE_S = 1.0
WIDTH, LAYERS = 512, 240
CONNECTIONS = 256
"""While capacity is measured: enough for batches as large as those under overload."""


def post(model: str, body: bytes) -> bytes:
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def infer(name: str, columns: int) -> bytes:
    tensor = {"name": name, "datatype": "FP32", "shape": [1, columns], "data": [0.5] * columns}
    return json.dumps({"inputs": [tensor]}).encode()


SLOW = post("slow", infer("x", 4))
OTHER = post("iris", infer("features", 4))


def make_slow_model(folder: Path) -> None:
    """Write a model that takes some milliseconds of a core for each row."""
    random = np.random.default_rng(0)
    weights = {
        "first": random.normal(size=(4, WIDTH)),
        "each": random.normal(size=(WIDTH, WIDTH)) / math.sqrt(WIDTH),
        "last": random.normal(size=(WIDTH, 1)),
    }
    nodes = [helper.make_node("MatMul", ["x", "first"], ["h0"])]
    for layer in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [f"h{layer}", "each"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("MatMul", [f"h{LAYERS}", "last"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "slow" / "1").mkdir(parents=True)
    onnx.save(model, folder / "slow" / "1" / "model.onnx")


@dataclass(slots=True)
class Course:
    """What came of one run: requests before, during and after the overload, those of another model, health's times."""

    capacity: float
    before: list[Sample]
    during: list[Sample]
    after: list[Sample]
    other: list[Sample]
    health: list[float]
    began: float
    ended: float
    rows_run: float


@drill("overload", "at twice the capacity what is taken is answered in time, the rest is refused at once")
def run(report: Report, *, seconds: float = 60.0, timed: bool = True) -> None:
    """`seconds`: of overload. `timed`: judge by the clock too, which a busy machine can't keep.

    Nor can it tell what it will have capacity for in the next second: without the clock, five times are offered.
    """
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        make_slow_model(models)
        shutil.copytree(MODELS / "iris", models / "iris")
        with apart("--deadline-s", str(DEADLINE_S), "--log-level", "error", models=models) as server:
            course = asyncio.run(_course(server, seconds, 2 if timed else 5))
        if timed:
            with apart("--deadline-s", "600", "--log-level", "error", models=models) as server:
                fixed = asyncio.run(_course(server, min(seconds, 4.0), 2))
    good = [s for s in course.during if s.status == 200]
    refused = [s for s in course.during if s.status == 429]
    everything = [*course.before, *course.during, *course.after]
    answered = sum(s.status == 200 for s in everything)
    report.exactly("rows run for requests that were not answered 200", course.rows_run - answered, 0)
    others = {200, 429, 504}
    report.exactly(
        "requests without an answer, or with another than these", sum(s.status not in others for s in everything), 0
    )
    report.at_least("refusals", len(refused), 1)
    report.at_least("least Retry-After", min((s.retry_after for s in refused), default=0), 1, "s")
    report.at_least("answers of another model, of all asked", _share(course.other), 0.99 if timed else 0.9)
    if timed:
        report.at_least(
            f"goodput, of the capacity ({course.capacity:.0f}/s)", len(good) / seconds / course.capacity, 0.9
        )
        report.at_most("p99 of what was taken", percentile([s.took for s in good], 99), DEADLINE_S, "s")
        report.at_most("p99 of refusals", percentile([s.took for s in refused], 99), 0.05, "s")
        report.at_most("p99 of another model", percentile([s.took for s in course.other], 99), 0.25, "s")
        report.at_most("p99 of health and metrics", percentile(course.health, 99), 0.25, "s")
        report.at_most("normal again after", _normal_after(course), 2.0, "s")
        _draw(course)
        late = percentile([s.took for s in fixed.during if s.status == 200], 99)
        report.control(f"a fixed limit of 4096 rows answers at p99 after {late:.1f} s", late > DEADLINE_S)


@contextmanager
def apart(*flags: str, models: Path) -> Iterator[Server]:
    """Run the real command on all cores but the last, and this process there: neither takes from the other."""
    cores = os.sched_getaffinity(0)
    last = {max(cores)}
    os.sched_setaffinity(0, cores - last or cores)
    try:
        with running(*flags, models=models) as server:
            os.sched_setaffinity(0, last)
            yield server
    finally:
        os.sched_setaffinity(0, cores)


async def _course(server: Server, seconds: float, times: float) -> Course:
    """Offer so many times the capacity."""
    load, other = Load(server.port, SLOW), Load(server.port, OTHER)
    loop = asyncio.get_running_loop()
    await load.closed(CONNECTIONS, seconds / 10)
    capacity = statistics.median([await load.closed(CONNECTIONS, seconds / 10) for _ in range(3)])
    warm, load.samples = load.samples, []
    await load.offer(capacity / 2, seconds / 10)
    before, load.samples = load.samples, []
    health: list[float] = []
    beside = [asyncio.ensure_future(_health(server, health)), asyncio.ensure_future(other.offer(20, seconds))]
    began = loop.time()
    await load.offer(times * max(200.0, capacity), seconds)  # a machine that is starved shows none
    ended = loop.time()
    await load.offer(capacity / 2, max(1.0, seconds / 6))
    beside[0].cancel()
    await beside[1]
    await load.finish(10)
    await other.finish(1)
    late = [s for s in load.samples if s.due >= ended]
    return Course(
        capacity,
        [*warm, *before],
        [s for s in load.samples if s.due < ended],
        late,
        other.samples,
        health,
        began,
        ended,
        await _rows_run(server),
    )


async def _health(server: Server, times: list[float]) -> None:
    loop = asyncio.get_running_loop()
    paths = ("/v2/health/live", "/v2/health/ready", "/metrics")
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        for index in range(10**9):
            began = loop.time()
            answer = await client.get(paths[index % len(paths)])
            assert answer.status_code == 200
            times.append(loop.time() - began)
            await asyncio.sleep(0.1)


async def _rows_run(server: Server) -> float:
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        text = (await client.get("/metrics")).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "serving_batch_rows_sum" and sample.labels["model"] == "slow"
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile; infinity of nothing."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))] if values else math.inf


def _share(samples: list[Sample]) -> float:
    return sum(s.status == 200 for s in samples) / max(1, len(samples))


def _normal_after(course: Course) -> float:
    """Return seconds from the end of the overload to the last request that was refused, or slow, because of it."""
    slow = max(0.1, 3 * percentile([s.took for s in course.before], 99))
    return max((s.due - course.ended for s in course.after if s.status != 200 or s.took > slow), default=0.0)


def _draw(course: Course) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    samples = [*course.before, *course.during, *course.after]
    start = course.began - 6
    places = range(int(max(s.due for s in samples) - start) + 1)
    bins: dict[int, list[Sample]] = {place: [] for place in places}
    for sample in samples:
        if sample.due >= start:
            bins[int(sample.due - start)].append(sample)
    good = [[s.took for s in bins[p] if s.status == 200] for p in places]
    seconds = [p - 6 for p in places]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, constrained_layout=True)
    top.plot(seconds, [len(bins[p]) for p in places], color="#888888", label="offered")
    top.plot(seconds, [len(g) for g in good], color="#0072b2", label="answered in time")
    top.plot(seconds, [sum(s.status == 429 for s in bins[p]) for p in places], color="#d55e00", label="refused (429)")
    top.axhline(course.capacity, color="black", linewidth=0.8, linestyle=":", label="capacity")
    top.set_ylabel("requests a second")
    top.legend(loc="upper right", fontsize=8)
    bottom.plot(seconds, [percentile(g, 99) if g else None for g in good], color="#0072b2", label="answered, p99")
    refused = [[s.took for s in bins[p] if s.status == 429] for p in places]
    bottom.plot(seconds, [percentile(r, 99) if r else None for r in refused], color="#d55e00", label="refused, p99")
    bottom.axhline(DEADLINE_S, color="black", linewidth=0.8, linestyle=":", label="deadline")
    bottom.set_yscale("log")
    bottom.set_ylabel("seconds to the answer")
    bottom.set_xlabel("seconds since the load doubled past capacity")
    bottom.legend(loc="upper right", fontsize=8)
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)
