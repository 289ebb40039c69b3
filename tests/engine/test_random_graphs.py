"""Whatever graph chance makes: callers who ask at the same time get what each would get alone."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from serving.engine.batch_independence import prove
from serving.engine.batcher import Unobserved
from serving.engine.limits import Limits
from serving.engine.model import Model
from serving.engine.request import NORMAL, Outcome, Request
from serving.engine.session import OnnxSession
from serving.errors import ServingError
from serving.repository.model_settings import ModelSettings
from tests.drills.drill import Report
from tests.drills.random_graphs import plain, random_graph, random_graphs, rows_of


def test_what_is_proved_is_true() -> None:
    """No graph of many is proved to keep rows apart where plain onnxruntime's answers say otherwise."""
    report = Report()
    random_graphs(report, number=40)
    assert report.kept, report.broken()


class Asked(Request):
    """A request whose answer can be awaited."""

    def __init__(self, rows: np.ndarray) -> None:
        self.inputs = (rows,)
        self.rows = len(rows)
        self.deadline = time.monotonic() + 60
        self.done = False
        self.priority = NORMAL
        self.answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def reply(self, outcome: Outcome) -> None:
        self.answer.set_result(outcome)


@contextmanager
def written(model: onnx.ModelProto) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        yield path


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_callers_get_their_own_answers(seed: int, sizes: list[int]) -> None:
    """Requests that wait for the same model, of one row or several, are answered as by plain onnxruntime, alone."""
    model = random_graph(seed)
    assume(model is not None)
    assert model is not None
    with written(model) as path:
        independence = prove(OnnxSession(path, warm_rows=2), path)
        session = OnnxSession(path, warm_rows=2)
        alone = plain(model)

        async def ask() -> list[tuple[Asked, Outcome]]:
            made = Model(
                "m",
                "1",
                session,
                sha256="",
                limits=Limits(),
                batching=ModelSettings().decide(independence),
                loop=asyncio.get_running_loop(),
                observer=Unobserved(),
            )
            asked = [Asked(rows_of(model, rows, seed + at)) for at, rows in enumerate(sizes)]
            for request in asked:  # the first one runs, and the others wait for each other's company
                made.submit(request)
            outcomes = [await request.answer for request in asked]
            await made.batcher.close()
            return list(zip(asked, outcomes, strict=True))

        for request, outcome in asyncio.run(ask()):
            if isinstance(outcome, ServingError):
                continue  # a value that the graph refuses
            due = alone.run(None, {"x": request.inputs[0]})[0]
            assert outcome[0].shape == due.shape
            size = 1e-5 * float(np.abs(due, where=np.isfinite(due), out=np.zeros_like(due)).max(initial=0))
            assert np.allclose(outcome[0], due, rtol=1e-3, atol=size, equal_nan=True)
