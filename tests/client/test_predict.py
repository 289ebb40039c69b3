"""A client gives the same answers, in the kind of what it was given, whatever way they took."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pandas as pd
import polars as pl
import pytest

import serving
from serving.client.conversation import BINARY_CELLS
from tests.client.conftest import Addresses
from tests.conftest import MODELS

Ask = Callable[..., Any]
NAMES = sorted(path.name for path in MODELS.iterdir() if path.is_dir())
IRIS = ["sepal_length", "sepal_width", "petal_length", "petal_width"]
ROWS = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3], [5.9, 3.0, 4.2, 1.5]]


@pytest.fixture(scope="module", params=["http", "grpc", "asyncio", "asyncio and grpc"])
def ask(request: pytest.FixtureRequest, addresses: Addresses) -> Iterator[Ask]:
    """`Client.predict`, by HTTP and by gRPC, and `AsyncClient.predict` as a plain function."""
    grpc = addresses.grpc if "grpc" in request.param else None
    if "asyncio" not in request.param:
        with serving.Client(addresses.http, grpc=grpc) as client:
            yield client.predict
        return
    with asyncio.Runner() as runner:

        async def made() -> serving.AsyncClient:
            return serving.AsyncClient(addresses.http, grpc=grpc)

        client = runner.run(made())
        yield lambda *args, **more: runner.run(client.predict(*args, **more))
        runner.run(client.close())


@pytest.fixture(scope="module")
def plain(addresses: Addresses) -> Iterator[Ask]:
    """The answers to look for: rows as JSON, by an HTTP client that knows nothing of this one."""
    with httpx.Client(base_url=addresses.http, timeout=30) as client:

        def asked(model: str, rows: list[Any], at: str = "") -> list[Any]:
            answer = client.post(f"/v1/models/{model}{at}:predict", json={"instances": rows})
            assert answer.status_code == 200, answer.text
            predictions: list[Any] = answer.json()["predictions"]
            return predictions

        yield asked


@pytest.fixture(scope="module")
def some(addresses: Addresses) -> dict[str, list[dict[str, Any]]]:
    """Some different rows of each shipped model."""
    made = {}
    for name in NAMES:
        described = httpx.get(f"{addresses.http}/v1/models/{name}").json()
        rows = [described["example"]]
        rng = np.random.default_rng(1)
        for _ in range(4):
            row = dict(described["example"])
            for f in described["features"]:
                if f["shape"]:
                    row[f["name"]] = (np.array(row[f["name"]]) * rng.uniform(0, 1)).tolist()
                elif f["datatype"].startswith("FP") and f.get("maximum") is not None:
                    row[f["name"]] = float(rng.uniform(f["minimum"], f["maximum"]))
                elif f["nullable"]:
                    row[f["name"]] = None
            rows.append(row)
        made[name] = rows
    return made


def _columns(predictions: list[Any]) -> dict[str, Any]:
    """Turn the predictions of V1 into what a frame is to hold."""
    frame = pd.json_normalize(predictions) if isinstance(predictions[0], dict) else pd.DataFrame({"": predictions})
    return {str(name): frame[name].tolist() for name in frame.columns}


def _same(given: dict[str, Any], due: dict[str, Any]) -> None:
    if "" in due:
        given = {"": next(iter(given.values()))}
    assert list(given) == list(due)
    for name, values in due.items():
        if isinstance(values[0], float):
            assert np.array_equal(np.array(given[name], np.float32), np.array(values, np.float32)), name
        else:
            assert list(given[name]) == values


@pytest.mark.parametrize("model", NAMES)
def test_few_rows_and_many_are_answered_alike(ask: Ask, plain: Ask, some: Any, model: str) -> None:
    """Rows by name give V1's predictions, number by number, also where they are so many that they travel as tensors."""
    due = plain(model, some[model])
    assert ask(model, some[model]) == due
    times = -(-BINARY_CELLS // (len(some[model][0]) * len(due)))
    many = some[model] * times
    assert ask(model, many) == plain(model, many)
    assert ask(model, some[model][1]) == plain(model, some[model][1:2])[0]


@pytest.mark.parametrize("model", NAMES)
@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_a_frame_gives_a_frame(ask: Ask, plain: Ask, some: Any, model: str, frame: Any) -> None:
    """pandas gives pandas, polars gives polars: the label and a column for each class, or the outputs."""
    due = _columns(plain(model, some[model]))
    for more in ({}, {"label": "stable"}):  # as tensors, and as JSON
        answer = ask(model, frame(some[model]), **more)
        assert type(answer) is frame
        _same({name: answer[name].to_list() for name in answer.columns}, due)


def test_an_array_gives_arrays(ask: Ask, plain: Ask, addresses: Addresses) -> None:
    """A matrix gives the label and the scores of all classes by name, with the dtypes of the model."""
    answer = ask("iris", np.array(ROWS))
    due = plain("iris", ROWS)
    assert answer["label"].tolist() == [p["label"] for p in due]
    assert answer["probabilities"].dtype == np.float32
    expected = np.array([list(p["probabilities"].values()) for p in due], np.float32)
    assert np.array_equal(answer["probabilities"], expected)
    by_name = {name: np.array(ROWS)[:, i] for i, name in enumerate(IRIS)}
    assert np.array_equal(ask("iris", by_name)["probabilities"], expected)
    assert np.array_equal(ask("iris", {"features": np.array(ROWS, np.float32)})["probabilities"], expected)
    assert np.array_equal(ask("iris", np.array(ROWS), label="stable")["probabilities"], expected)
    answer["probabilities"][0, 0] = 2  # it is the caller's own


def test_a_frame_keeps_its_index(ask: Ask) -> None:
    """The answer to a pandas frame can be joined to it."""
    frame = pd.DataFrame(ROWS, columns=IRIS, index=["a", "b", "c"])
    assert frame.join(ask("iris", frame)).loc["b", "label"] == "virginica"


def test_versions_and_labels_answer_for_themselves(ask: Ask, plain: Ask) -> None:
    """`version=` and `label=` choose who answers; both at once make no sense."""
    frame = pd.DataFrame(ROWS, columns=IRIS)
    due = plain("iris", ROWS, "/versions/1")
    assert due != plain("iris", ROWS)
    assert ask("iris", ROWS, version="1") == due
    assert ask("iris", ROWS * 500, version="1") == plain("iris", ROWS * 500, "/versions/1")
    _same(ask("iris", frame, version="1").to_dict("list"), _columns(due))
    assert ask("iris", ROWS, label="latest") == plain("iris", ROWS)
    with pytest.raises(serving.InvalidRequest, match="not both"):
        ask("iris", ROWS, version="1", label="latest")


@pytest.mark.parametrize("wrong", [np.nan, None, "wide", np.inf])
@pytest.mark.parametrize("kind", ["rows", "many", "array", "pandas", "polars"])
def test_bad_cells_are_named(ask: Ask, kind: str, wrong: Any) -> None:
    """Whatever was given and however it travels, the error has the row and the feature of each bad cell."""
    row = 800 if kind == "many" else 1
    rows: list[list[Any]] = [list(one) for one in ROWS * (300 if kind == "many" else 1)]
    rows[row][2] = wrong
    data: Any = [dict(zip(IRIS, one, strict=True)) for one in rows]
    if kind == "array":
        data = np.array(rows, None if not isinstance(wrong, str) and wrong is not None else object)
    elif kind == "pandas":
        data = pd.DataFrame(rows, columns=IRIS)
    elif kind == "polars":
        if isinstance(wrong, str):
            pytest.skip("polars has no column of numbers and strings")
        data = pl.DataFrame(rows, schema=IRIS, orient="row")
    with pytest.raises(serving.SignatureMismatch) as caught:
        ask("iris", data)
    assert [(cell.row, cell.feature) for cell in caught.value.details] == [(row, "petal_length")]


def test_what_cannot_be_rows_is_refused_with_what_can(ask: Ask) -> None:
    """A wrong kind or shape is refused before anything is sent, and the text says what to give."""
    for data, said in (
        (5, "NumPy array"),
        ([], "no rows"),
        (np.zeros(4), "takes .-1, 4."),
        (np.zeros((2, 5)), "takes .-1, 4."),
        ([{"sepal_length": object()}], "can't be written"),
    ):
        with pytest.raises(serving.InvalidRequest, match=said):
            ask("iris", data)


def test_errors_are_types(ask: Ask) -> None:
    """An unknown model, version or label is ModelNotFound, and all errors are ServingErrors."""
    for data in (ROWS, np.array(ROWS)):
        for more in ({"version": "9"}, {"label": "nobody"}):
            with pytest.raises(serving.ModelNotFound, match="iris"):
                ask("iris", data, **more)
        with pytest.raises(serving.ServingError, match="no model is called 'rose'"):
            ask("rose", data)


def test_the_answering_version_is_told(addresses: Addresses) -> None:
    """`answer` says which version it was; `describe` says what a model takes."""
    with serving.Client(addresses.http) as client:
        for rows in (ROWS, np.array(ROWS)):
            assert client.answer("iris", rows)[1:3] == ("iris", "2")
            assert client.answer("iris", rows, version="1")[1:3] == ("iris", "1")
        described = client.describe("iris", "1")
        assert (described["version"], [f["name"] for f in described["features"]]) == ("1", IRIS)
