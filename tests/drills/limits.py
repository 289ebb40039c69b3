"""An adaptive limit beside fixed ones: a number of rows that is right for a fast model is wrong once it is slow."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.open_loop import Load
from tests.drills.overload import CONNECTIONS, DEADLINE_S, SLOW, make_slow_model, percentile

FIXED = (16, 256, 4096)
"""Rows."""
SLOWER_S = 0.2
"""What each batch takes longer once the model is slow."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers within the deadline a second, and the 99th percentile of what was answered, in seconds."""

    goodput: float
    p99: float


@drill(
    "limits", "the adaptive limit does well where each fixed one fails: with a model that is fast, and one that is slow"
)
def run(report: Report, *, seconds: float = 5.0, fixed: tuple[int, ...] = FIXED, timed: bool = True) -> None:
    """Offer twice the capacity to each limit in turn; `timed`: judge by the clock too, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        make_slow_model(models)
        faults: list[dict[str, Any]] = [{}, {"slow": SLOWER_S}]
        found = [_with(models, fault, None, lambda server: _adaptive(server, seconds)) for fault in faults]
        capacity = [most for most, _ in found]
        course: dict[int | None, list[Outcome]] = {None: [outcome for _, outcome in found]}
        for limit in fixed:
            course[limit] = [
                _with(models, fault, limit, lambda server, most=most: _offered(server, 2 * most, seconds))
                for fault, most in zip(faults, capacity, strict=True)
            ]
    report.at_least("answers a second by the adaptive limit, both times", min(o.goodput for o in course[None]), 1)
    if not timed:
        return
    for phase, most, outcome in zip(("fast", "slow"), capacity, course[None], strict=True):
        report.at_least(f"adaptive, {phase}: goodput, of the capacity ({most:.0f}/s)", outcome.goodput / most, 0.85)
        report.at_most(f"adaptive, {phase}: p99 of what was taken", outcome.p99, DEADLINE_S, "s")
    for limit in fixed:
        outcomes = course[limit]
        said = ", ".join(f"{o.goodput / most:.2f} at {o.p99:.2f} s" for o, most in zip(outcomes, capacity, strict=True))
        fails = any(
            mine.goodput < 0.9 * best.goodput or mine.p99 > DEADLINE_S
            for mine, best in zip(outcomes, course[None], strict=True)
        )
        report.control(f"fixed at {limit} rows, fast and slow: {said}", fails)


def _with(models: Path, fault: dict[str, Any], limit: int | None, course: Any) -> Any:
    off: dict[str, Any] = {} if limit is None else {"off": ["estimate"]}
    flags = ("--deadline-s", str(DEADLINE_S), "--max-queued-rows", str(limit or 4096), "--log-level", "error")
    with faulty({**fault, **off}, *flags, models=models) as server:
        return asyncio.run(course(server))


async def _adaptive(server: Server, seconds: float) -> tuple[float, Outcome]:
    """Return the capacity, and what comes of twice as much."""
    load = Load(server.port, SLOW)
    await load.closed(CONNECTIONS, seconds / 2)
    capacity = max(1.0, await load.closed(CONNECTIONS, seconds))
    await load.finish(5)
    return capacity, await _offered(server, 2 * capacity, seconds)


async def _offered(server: Server, rate: float, seconds: float) -> Outcome:
    load = Load(server.port, SLOW)
    await load.closed(CONNECTIONS, seconds / 2)
    load.samples = []
    await load.offer(rate, seconds)
    await load.finish(5)
    good = [s.took for s in load.samples if s.status == 200]
    return Outcome(sum(took <= DEADLINE_S for took in good) / seconds, percentile(good, 99))
