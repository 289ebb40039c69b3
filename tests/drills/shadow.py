"""Shadows: live answers are as fast with one as without, and whatever becomes of it, none of them fails."""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from prometheus_client.parser import text_string_to_metric_families

from serving.deploy.publish import publish
from serving.gate.gate import Gate
from tests.conftest import Server, faulty, running
from tests.drills.drill import Report, drill
from tests.drills.open_loop import Load, Sample
from tests.drills.overload import infer, percentile, post
from tests.drills.swaps import dense

BODY = infer("x", 32)
KINDS = ("plain", "light", "heavy")
"""Models that answer with the same small graph: without a shadow, with a small one, and with a large one."""
CLIENTS = 16
CALM = 8
"""The share of the capacity that is asked for where p99 is judged: one in so many."""
UNSEEN = {"shadow": 2.0}


@contextmanager
def served(mebibytes: int, faults: dict[str, Any] | None = None) -> Iterator[Server]:
    """Serve the models of KINDS from one worker; the large shadow has weights of `mebibytes`."""
    with tempfile.TemporaryDirectory() as folder, Gate() as gate:
        models, file = Path(folder) / "models", Path(folder) / "dense.onnx"
        models.mkdir()
        for kind, shadow in zip(KINDS, (None, 0, mebibytes), strict=True):
            for seed, size in enumerate((0, shadow)):
                if size is not None:
                    file.write_bytes(dense(size, seed).SerializeToString())
                    publish(models, kind, file, who="drill", examiner=gate)
            traffic = {"generation": 1, "stable": "1"} | ({} if shadow is None else {"shadow": {"version": "2"}})
            (models / kind / "traffic.json").write_text(json.dumps(traffic))
        flags = ("--log-level", "error")
        with running(*flags, models=models) if faults is None else faulty(faults, *flags, models=models) as server:
            yield server


@dataclass(slots=True)
class Course:
    """By kind of model: samples with capacity to spare, by span; answers a second at full load; all samples there were.

    What is late for many is late for the machine's reasons where it has no capacity to spare: clients and servers take
    each other's cores. So little is asked for where p99 is judged, and each span has one of its own.
    """

    calm: dict[str, list[list[Sample]]]
    full: dict[str, float]
    every: list[Sample]

    def late(self, kind: str) -> float:
        """Return the median of what the spans had as 99th percentile of latency, in seconds."""
        return statistics.median(percentile([sample.took for sample in span], 99) for span in self.calm[kind])


async def _course(server: Server, spans: int, seconds: float) -> Course:
    """Ask the models in turn, in a different order each time: with capacity to spare, then with all there is."""
    loads = {kind: Load(server.port, post(kind, BODY)) for kind in KINDS}
    await loads["plain"].closed(CLIENTS, 1)
    capacity = await loads["plain"].closed(CLIENTS, 1)
    calm: dict[str, list[list[Sample]]] = {kind: [] for kind in KINDS}
    full: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for span in range(spans):
        for turn in range(len(KINDS)):
            kind = KINDS[(turn + span) % len(KINDS)]
            load = loads[kind]
            before = len(load.samples)
            await load.offer(capacity / CALM, seconds)
            await asyncio.sleep(0.2)
            calm[kind].append(load.samples[before:])
            full[kind].append(await load.closed(CLIENTS, seconds / 2))
            await asyncio.sleep(0.5)  # what waits for the shadow is compared meanwhile
    for load in loads.values():
        await load.finish(10)
    every = [sample for load in loads.values() for sample in load.samples]
    return Course(calm, {kind: statistics.median(found) for kind, found in full.items()}, every)


def _copies(server: Server) -> dict[tuple[str, str], float]:
    """Return how many copies there were, by model and by what became of them."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {
        (sample.labels["model"], sample.labels["outcome"]): sample.value
        for family in families
        if family.name == "serving_shadow_requests"
        for sample in family.samples
        if sample.name == "serving_shadow_requests_total"
    }


@drill("shadow", "a shadow sees copies on spare capacity alone: live answers are as fast and as right as without one")
def run(report: Report, *, spans: int = 7, seconds: float = 2.0, mebibytes: int = 64, timed: bool = True) -> None:
    """Compare models with and without shadows in one run, then with shadows that fail after two seconds each.

    timed: judge by the clock too, which a busy machine can't keep.
    """
    with served(mebibytes) as server:
        course = asyncio.run(_course(server, spans, seconds))
        copies = _copies(server)
    report.exactly("live requests that failed", sum(s.status != 200 for s in course.every), 0)
    for kind in KINDS[1:]:
        report.at_least(f"{kind} shadow: copies compared", copies.get((kind, "compared"), 0), 1)
        report.at_least(f"{kind} shadow: copies skipped, for want of spare capacity", copies.get((kind, "busy"), 0), 1)
        if timed:
            report.at_most(f"{kind} shadow: p99 with capacity to spare, times that without", _slower(course, kind), 1.2)
            report.at_least(f"{kind} shadow: answers at full load, times those without", _share(course, kind), 0.9)
    with served(0, UNSEEN) as server:
        broken = asyncio.run(_course(server, 1, seconds))
        copies = _copies(server)
    report.exactly("live requests that failed beside shadows that fail", sum(s.status != 200 for s in broken.every), 0)
    report.at_least("copies that failed", copies.get(("light", "failed"), 0), 1)
    if timed:
        report.at_least("p99 with capacity to spare, without a shadow", course.late("plain") * 1000, 0, "ms")
        worst = max(s.took for s in broken.every)
        report.at_most("slowest live answer beside shadows that take two seconds", worst, UNSEEN["shadow"] / 2, "s")
        with served(mebibytes, {"off": ["spare"]}) as server:
            greedy = asyncio.run(_course(server, max(1, spans // 2), seconds))
        report.at_least("control: its p99 with capacity to spare, times that without", _slower(greedy, "heavy"), 0)
        slows = _slower(greedy, "heavy") > 1.2 or _share(greedy, "heavy") < 0.9
        report.control("a shadow that takes what it likes slows live answers", slows)


def _slower(course: Course, kind: str) -> float:
    return course.late(kind) / course.late("plain")


def _share(course: Course, kind: str) -> float:
    return course.full[kind] / course.full["plain"]
