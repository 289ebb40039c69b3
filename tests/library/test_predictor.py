"""A Predictor answers as HTTP does: the same numbers, versions, errors and counts, in the kind of what it was given."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.from_thread
import numpy as np
import pandas as pd
import polars as pl
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

import serving
from tests.library.conftest import MATRIX, ROWS, expected

NAMES = list(ROWS[0])


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[TestClient]:
    """An application of a user's, whose only route of their own lends its Predictor out."""
    app = FastAPI(lifespan=serving.lifespan(models))
    app.include_router(serving.router)
    app.add_exception_handler(serving.ServingError, serving.error_response)

    @app.post("/own")
    async def own(
        rows: Any = None,
        iris: serving.Predictor = Depends(serving.predictor("iris")),  # noqa: B008
    ) -> None:
        app.state.iris = iris

    @app.post("/rows")
    async def some(rows: list[Any], iris: serving.Predictor = Depends(serving.predictor("iris"))) -> Any:  # noqa: B008
        return await iris.predict(rows)

    @app.post("/threads")
    def on_a_thread(rows: list[Any], iris: serving.Predictor = Depends(serving.predictor("iris"))) -> Any:  # noqa: B008
        return anyio.from_thread.run(iris.predict, rows)

    with TestClient(app) as made:
        assert made.post("/own").status_code == 200
        yield made


@pytest.fixture(scope="module")
def on_loop(client: TestClient) -> Callable[[Callable[[serving.Predictor], Awaitable[Any]]], Any]:
    """Run what is given a Predictor on the application's event loop."""
    app: Any = client.app
    return lambda ask: client.portal.call(ask, app.state.iris)  # type: ignore[union-attr]


def table(answer: Any) -> Any:
    """Return the probabilities of an answer of any kind as an array."""
    if isinstance(answer, dict) and "probabilities" in answer and isinstance(answer["probabilities"], np.ndarray):
        return answer["probabilities"]
    if isinstance(answer, list):
        return np.array([list(row["probabilities"].values()) for row in answer])
    return np.array(answer[[name for name in answer.columns if name.startswith("probabilities.")]])


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        MATRIX.tolist(),
        MATRIX,
        {name: MATRIX[:, i] for i, name in enumerate(NAMES)},
        pd.DataFrame(ROWS),
        pl.DataFrame(ROWS),
        ROWS * 1500,
    ],
    ids=["rows", "positions", "array", "arrays", "pandas", "polars", "many rows"],
)
def test_answers_are_onnxruntimes_in_kind(on_loop: Any, given: Any) -> None:
    """Whatever the rows are given as, the model's own numbers come back in the same kind, for the version asked."""
    for version in ("1", "2"):
        answer = on_loop(lambda iris, version=version: iris.predict(given, version=version))
        due = expected(version)
        np.testing.assert_allclose(table(answer)[:2], due, rtol=1e-5, atol=1e-7)
        same = dict if isinstance(given, np.ndarray) else type(given)
        assert isinstance(answer, same)
        if isinstance(given, list):
            assert len(answer) == len(given)


def test_one_row_gets_one_prediction(on_loop: Any) -> None:
    """A dict is a row, and its answer is no list."""
    assert on_loop(lambda iris: iris.predict(ROWS[0]))["label"] == "setosa"


async def test_arrays_that_come_back_are_the_callers_own(models: Path, tmp_path: Path) -> None:
    """Writing to an answer, or to what was given, changes nothing for anybody else, not even where answers are kept."""
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "models" / "iris" / "model.toml").write_text("[cache]\nentries = 8\n")
    async with alive(serving.create_app(tmp_path / "models")) as iris:
        for _ in range(3):
            given = MATRIX.copy()
            answer = await iris.predict(given, version="1")
            np.testing.assert_allclose(answer["probabilities"], expected("1"), rtol=1e-5, atol=1e-7)
            answer["probabilities"][:] = 7
            given[:] = 0


def test_a_canary_takes_whom_it_takes_over_http(client: TestClient, on_loop: Any) -> None:
    """With the headers of the request, each user gets the version that they get over HTTP; both answer some."""
    versions = set()
    for user in range(12):
        headers = {"X-User": f"user {user}"}
        over_http = client.post("/v1/models/iris:predict", json={"instances": ROWS}, headers=headers).json()
        here = on_loop(lambda iris, headers=headers: iris.answer(ROWS, headers=headers))
        assert (here.model, here.version) == ("iris", over_http["model_version"])
        versions.add(here.version)
    assert versions == {"1", "2"}


def test_a_route_on_a_thread_asks_too(client: TestClient) -> None:
    """A route that is no coroutine gets the same answer through anyio."""
    answers = [client.post(path, json=[ROWS[0]]).json() for path in ("/rows", "/threads")]
    assert [answer[0]["label"] for answer in answers] == ["setosa", "setosa"]


def test_labels_name_versions(on_loop: Any) -> None:
    """`label=` asks the version that has it."""
    assert on_loop(lambda iris: iris.answer(ROWS, label="canary")).version == "2"


@pytest.mark.parametrize("many", [1, 2000])
def test_bad_cells_are_named_as_over_http(client: TestClient, on_loop: Any, many: int) -> None:
    """The error has the same text and details as the answer to the same rows over HTTP; so a route's answer has."""
    rows = [*ROWS * many, {**ROWS[0], "petal_width": "wide"}]
    over_http = client.post("/v1/models/iris:predict", json={"instances": rows})
    with pytest.raises(serving.SignatureMismatch) as caught:
        on_loop(lambda iris: iris.predict(rows))
    assert caught.value.message == over_http.json()["error"]
    assert [(d.row, d.feature) for d in caught.value.details] == [(2 * many, "petal_width")]
    own = client.post("/rows", json=rows)
    assert (own.status_code, own.json()) == (422, over_http.json())


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda iris: iris.predict(ROWS, version="9"), serving.ModelNotFound, "has no version '9'; versions: 1, 2"),
        (lambda iris: iris.predict(ROWS, label="best"), serving.ModelNotFound, "has no label 'best'"),
        (lambda iris: iris.predict(ROWS, version="1", label="best"), serving.InvalidRequest, "not both"),
        (lambda iris: iris.predict(ROWS, timeout=0), serving.InvalidRequest, "timeout: should be a number"),
        (lambda iris: iris.predict([]), serving.InvalidRequest, "there are no rows"),
        (lambda iris: iris.predict(MATRIX[:, :3]), serving.InvalidRequest, r"shape \[2, 3\].*takes \[-1, 4\]"),
        (lambda iris: iris.predict(np.array([[1, 2, 3, np.inf]])), serving.SignatureMismatch, "infinite"),
        (lambda iris: iris.predict(ROWS * 2500), serving.PayloadTooLarge, "5000 rows in one request"),
        (lambda iris: iris.predict(ROWS * 20, timeout=1e-9), serving.DeadlineExceeded, "."),
    ],
)
def test_what_is_refused_is_a_typed_error(on_loop: Any, ask: Any, error: Any, said: str) -> None:
    """Each reason has its class, and a text that names the remedy."""
    with pytest.raises(error, match=said):
        on_loop(ask)


def test_a_model_that_is_not_there_is_named(client: TestClient) -> None:
    """A Predictor of a model that nobody published says so when it is asked: models come and go."""
    app: Any = client.app
    missing = client.portal.call(serving.predictor("credit"), _Connection(app))  # type: ignore[union-attr]
    with pytest.raises(serving.ModelNotFound, match="no model is called 'credit'; models: iris"):
        client.portal.call(missing.predict, ROWS)  # type: ignore[union-attr]


class _Connection:
    """As much of a request as a dependency looks at."""

    def __init__(self, app: Any) -> None:
        self.app = app


def counted(client: TestClient, *parts: str) -> float:
    """Add up the lines of /metrics that have all these parts."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(part in line for part in parts))


def test_predictions_are_counted(client: TestClient, on_loop: Any) -> None:
    """They are in the same metrics as all others, with a protocol of their own, right, refused or left."""
    name = 'serving_predictions_total{model="iris"'

    async def leave(iris: serving.Predictor) -> None:
        asking = asyncio.ensure_future(iris.predict(ROWS, version="1"))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    before = {kind: counted(client, name, 'protocol="python"', kind) for kind in ("ok", "invalid", "gone")}
    on_loop(lambda iris: iris.predict(ROWS, version="1"))
    with pytest.raises(serving.SignatureMismatch):
        on_loop(lambda iris: iris.predict([{}], version="1"))
    on_loop(leave)
    after = {kind: counted(client, name, 'protocol="python"', kind) for kind in before}
    assert {kind: after[kind] - before[kind] for kind in before} == {"ok": 1, "invalid": 1, "gone": 1}


@asynccontextmanager
async def alive(app: FastAPI) -> AsyncIterator[serving.Predictor]:
    """Give a Predictor of an application that runs on this loop."""
    async with app.router.lifespan_context(app):
        connection: Any = _Connection(app)
        yield await serving.predictor("iris")(connection)


async def test_requests_share_batches(models: Path) -> None:
    """Predictions that are asked for at the same time run together, as requests from anywhere do."""
    app = serving.create_app(models, max_delay_ms=50)
    async with alive(app) as iris:
        answers = await asyncio.gather(*(iris.predict(MATRIX, version="1") for _ in range(8)))
        for answer in answers:
            np.testing.assert_allclose(answer["probabilities"], expected("1"), rtol=1e-5, atol=1e-7)
        assert app.state.serving.metrics.totals([("iris", "1")])["iris", "1"].ok == 8
        _, batches = app.state.serving.metrics.statistics([("iris", "1")])["iris", "1"]
    assert sum(times for times, _ in batches.values()) < 8
