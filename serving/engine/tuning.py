"""How fast one version is with given threads, instances and batch: callers that always have one request waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import uvloop

from serving.engine.batcher import Unobserved
from serving.engine.batching import Batching
from serving.engine.limits import Limits
from serving.engine.model import Model, load
from serving.engine.request import NORMAL, Outcome, Request
from serving.engine.session import OnnxSession
from serving.errors import ServingError
from serving.tensors import Tensors

_WARM_SHARE = 0.2
"""Of the time of a trial, for what is not counted: its threads start, and the batcher learns how long a batch takes."""
_BATCHES = (1, 4, 16, 64, 256, 1024)
_AS_FAST = 0.97
"""Of the best throughput, from which fewer threads are worth more than the rest: another run would tell otherwise."""


@dataclass(frozen=True, slots=True)
class Load:
    """Who asks: so many callers, each with one request of so many rows at a time, for so many seconds a trial."""

    callers: int
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured with one setting; seconds from a request to its answer."""

    threads: int
    instances: int
    max_batch_rows: int
    rows_per_s: float
    p50_s: float
    p99_s: float


def settings(cores: int, load: Load, *, together: bool) -> Iterator[tuple[int, int, int]]:
    """Yield threads, instances and rows of a batch that are worth a trial; by threads, so that each loads once.

    together: whether requests share batches; else one runs at a time, and there is one size.

    >>> list(settings(2, Load(callers=8, rows=1, seconds=1), together=True))[:4]
    [(1, 1, 1), (1, 1, 4), (1, 1, 16), (1, 2, 1)]
    """
    waiting = load.callers * load.rows
    some = [size for size in _BATCHES if size < 4 * waiting] if together else [1]
    for threads in _steps(cores):
        for instances in _steps(cores // threads):
            for batch in some:
                yield threads, instances, batch


def _steps(most: int) -> list[int]:
    return sorted({most, *(2**power for power in range(most.bit_length()) if 2**power <= most)})


def trials(path: Path, batching: Batching, of: Load, cores: int) -> Iterator[Trial]:
    """Measure one setting after the other; all else is as the model's own settings say, but nothing comes from a cache.

    Raises ModelInvalid, InvalidRequest or InferenceFailed.
    """
    limits = (
        Limits()
        .of(batching.own)
        .model_copy(update={"cache": None, "max_queued_rows": 2 * of.callers * of.rows, "exact_threads": True})
    )
    session, there = None, 0
    for threads, instances, batch in settings(cores, of, together=batching.together):
        given = limits.model_copy(update={"threads": threads, "instances": instances, "max_batch_rows": batch})
        if session is None or threads != there:
            largest = given.model_copy(update={"max_batch_rows": of.callers * of.rows})
            session, there = load(path, limits=largest), threads
        seconds, took = uvloop.run(_measured(session, given, Batching(batching.together, batching.reason), of))
        p50, p99 = np.percentile(seconds, (50, 99))
        rows_per_s = len(seconds) * of.rows / took
        yield Trial(threads, instances, batch, rows_per_s, float(p50), float(p99))


async def _measured(session: OnnxSession, limits: Limits, batching: Batching, of: Load) -> tuple[list[float], float]:
    """Return the seconds of each request that counts, and how long it took to answer them all."""
    loop = asyncio.get_running_loop()
    model = Model("tuned", "0", session, sha256="", limits=limits, batching=batching, loop=loop, observer=Unobserved())
    sample = session.sample(of.rows)
    begins = time.monotonic() + _WARM_SHARE * of.seconds
    ends = begins + of.seconds
    each = await asyncio.gather(*(_caller(model, sample, of.rows, begins, ends) for _ in range(of.callers)))
    took = time.monotonic() - begins
    await model.batcher.close()
    return [seconds for found in each for seconds in found], took


async def _caller(model: Model, inputs: Tensors, rows: int, begins: float, ends: float) -> list[float]:
    """Ask again as soon as it is answered, until its time is over; return the seconds of each request that counts.

    What it asked from `begins` on counts, once at least, and however late it is answered: the slowest are of the p99.
    Raises what it is answered.
    """
    found: list[float] = []
    now = 0.0
    while now < ends or not found:
        asked = time.monotonic()
        request = _Asked(inputs, rows, deadline=asked + 60.0)
        model.submit(request)
        outcome = await request.answer
        now = time.monotonic()
        if isinstance(outcome, ServingError):
            raise outcome
        if asked >= begins:
            found.append(now - asked)
    return found


class _Asked(Request):
    """A request whose answer is awaited."""

    def __init__(self, inputs: Tensors, rows: int, deadline: float) -> None:
        self.inputs, self.rows, self.deadline = inputs, rows, deadline
        self.priority, self.done = NORMAL, False
        self.answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def reply(self, outcome: Outcome) -> None:
        self.answer.set_result(outcome)


def best(found: Iterable[Trial], most_p99_s: float) -> Trial | None:
    """Return the fastest that keeps a bound; of those that are as good as it, the one with the fewest threads.

    None: none keeps it.
    """
    keeping = [trial for trial in found if trial.p99_s <= most_p99_s]
    fastest = max((trial.rows_per_s for trial in keeping), default=0.0)
    good = [trial for trial in keeping if trial.rows_per_s >= _AS_FAST * fastest]
    return min(good, key=lambda trial: (trial.threads * trial.instances, -trial.rows_per_s), default=None)
