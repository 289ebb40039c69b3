"""Times the stations of a prediction one by one, in one process: for profiling, and to see a regression.

.venv/bin/python -m benchmarks.micro
"""

from __future__ import annotations

import asyncio
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.decoding import loaded
from serving.deploy.fleet import Fleet
from serving.engine.request import HIGH, Outcome, Request
from serving.http_api.openapi.prediction_schemas import example_row
from serving.protocols import open_inference, predict_v1, strict_json

MODELS = Path(__file__).parent.parent / "models"
SECONDS = 0.2


class _Asked(Request):
    """A request that tells when it is answered."""

    def __init__(self, inputs: Any, rows: int, answered: asyncio.Event) -> None:
        self.inputs, self.rows, self.done, self.priority = inputs, rows, False, HIGH
        self.deadline = time.monotonic() + 60
        self.answered = answered

    def reply(self, outcome: Outcome) -> None:
        self.answered.set()


def _micros(call: Callable[[], Any]) -> float:
    number = max(1, int(SECONDS / 5 / max(1e-7, timeit.timeit(call, number=3) / 3)))
    return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6


async def _round_trip(model: Any, inputs: Any, rows: int) -> float:
    """Return the microseconds from submit to reply, one request at a time: two hops between threads included."""
    times = []
    for _ in range(2000):
        answered = asyncio.Event()
        began = timeit.default_timer()
        model.submit(_Asked(inputs, rows, answered))
        await answered.wait()
        times.append(timeit.default_timer() - began)
    return sorted(times)[len(times) // 2] * 1e6


async def main() -> None:
    """Print microseconds for each model, dialect and size."""
    async with loaded(MODELS) as fleet:
        await measure(fleet)


async def measure(fleet: Fleet) -> None:
    """Print the table of one fleet."""
    table = Table("model", "dialect", "rows", "decode", "run", "encode", "submit to reply", title="microseconds")
    for name in ("iris", "breast_cancer", "penguins", "docs_topic", "digits"):
        model = fleet.models[name].default
        for rows in (1, 32):
            samples = model.session.sample(rows)
            tensors = [
                {"name": s.name, "datatype": s.datatype, "shape": list(a.shape), "data": a.ravel().tolist()}
                for s, a in zip(model.signature.inputs, samples, strict=True)
            ]
            bodies: dict[Any, Any] = {
                predict_v1.Codec(model.described): {"instances": [example_row(model)] * rows},
                open_inference.Codec(model.described): {"inputs": tensors},
            }
            for codec, document in bodies.items():
                body = strict_json.dumps(document)
                inputs, count, context, *_ = codec.decode([], body)
                outputs = model.session.run(inputs)
                figures = (
                    _micros(lambda c=codec, b=body: c.decode([], b)),
                    _micros(lambda m=model, i=inputs: m.session.run(i)),
                    _micros(lambda c=codec, o=outputs, x=context: c.encode(o, x)),
                    await _round_trip(model, inputs, count),
                )
                table.add_row(name, codec.protocol, str(rows), *(f"{f:.1f}" for f in figures))
    Console().print(table)


if __name__ == "__main__":
    uvloop.run(main())
