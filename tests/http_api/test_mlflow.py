"""MLflow's dialect: each form of rows gets V1's answer, and errors have MLflow's shape."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from fastapi.testclient import TestClient

from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conftest import MODELS

FLOWER = {"sepal_length": 5.9, "sepal_width": 3.0, "petal_length": 5.1, "petal_width": 1.8}
OTHER = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
FRAME = pd.DataFrame([FLOWER, OTHER])


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    models = tmp_path_factory.mktemp("models")
    for name in ("iris", "penguins"):
        (models / name).symlink_to(MODELS / name)
    settings = Settings(models=models, platform="mlflow", platform_model="iris")
    with TestClient(create_app(settings)) as made:
        yield made


def parquet() -> bytes:
    buffer = io.BytesIO()
    FRAME.to_parquet(buffer)
    return buffer.getvalue()


def split(frame: pd.DataFrame) -> dict[str, Any]:
    return {"dataframe_split": frame.to_dict(orient="split")}


BODIES: dict[str, tuple[str, Any]] = {
    "split": ("json", split(FRAME)),
    "columns in another order, and one that is not the model's": (
        "json",
        split(FRAME[FRAME.columns[::-1]].assign(note="x")),
    ),
    "columns without names": ("json", split(FRAME.set_axis(range(4), axis="columns"))),
    "records": ("json", {"dataframe_records": FRAME.to_dict(orient="records"), "params": {"seed": 1}}),
    "instances": ("json", {"instances": FRAME.to_numpy().tolist(), "parameters": {}}),
    "named instances": ("json", {"instances": [FLOWER, OTHER], "client_request_id": "7"}),
    "inputs": ("json", {"inputs": FRAME.to_dict(orient="list")}),
    "inputs as one tensor": ("json", {"inputs": {"features": FRAME.to_numpy().tolist()}}),
    "csv": ("text/csv; charset=utf-8", FRAME.to_csv().encode("utf-8-sig")),
    "csv without a header": ("text/csv; header=absent", FRAME.to_csv(index=False, header=False).encode()),
    "parquet": ("application/vnd.apache.parquet", parquet()),
}


def post(client: TestClient, kind: str, body: Any, path: str = "/invocations") -> Any:
    if kind == "json":
        return client.post(path, json=body)
    return client.post(path, content=body, headers={"content-type": kind})


@pytest.mark.parametrize("form", BODIES)
def test_every_form_of_rows_gets_the_same_answer(client: TestClient, form: str) -> None:
    """However two rows are written, the answer is what V1 says of them, under `predictions` alone."""
    wanted = client.post("/v1/models/iris:predict", json={"instances": [FLOWER, OTHER]}).json()["predictions"]
    got = post(client, *BODIES[form])
    assert (got.status_code, got.json()) == (200, {"predictions": wanted})


@pytest.mark.parametrize("form", ["split", "records", "instances", "inputs", "csv", "parquet"])
def test_each_form_takes_other_columns_and_may_leave_out_what_may_be_missing(client: TestClient, form: str) -> None:
    """A column that the model does not have changes nothing; one that is left out, and NaN, are missing values."""
    rows = {
        "island": ["Dream"] * 2,
        "bill_length_mm": [43.2, None],
        "bill_depth_mm": [16.6, 17.0],
        "body_mass_g": [2900] * 2,
    }
    frame = pd.DataFrame(rows | {"note": "x"})  # without sex and flipper_length_mm; the missing bill is NaN
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    written: dict[str, tuple[str, Any]] = {
        "split": ("application/json", json.dumps(split(frame))),
        "records": ("application/json", json.dumps({"dataframe_records": frame.to_dict(orient="records")})),
        "instances": ("application/json", json.dumps({"instances": frame.to_dict(orient="records")})),
        "inputs": ("application/json", json.dumps({"inputs": frame.to_dict(orient="list")})),
        "csv": ("text/csv", frame.to_csv()),
        "parquet": ("application/x-parquet", buffer.getvalue()),
    }
    whole = [{"sex": None, "flipper_length_mm": None, **{name: rows[name][i] for name in rows}} for i in range(2)]
    wanted = client.post("/v1/models/penguins:predict", json={"instances": whole}).json()["predictions"]
    got = post(client, *written[form], "/serving-endpoints/penguins/invocations")
    assert (got.status_code, got.json()) == (200, {"predictions": wanted})


def test_long_bodies_keep_their_type(client: TestClient) -> None:
    """CSV that is read in the codec process is read as CSV."""
    rows = 4000
    got = post(client, "text/csv", (pd.DataFrame([FLOWER] * rows) + 1 / 3).to_csv(index=False).encode())
    assert (got.status_code, len(got.json()["predictions"])) == (200, rows)


@pytest.mark.parametrize(
    ("kind", "body", "status", "code", "says"),
    [
        ("json", {"dataframe_records": [{**FLOWER, "petal_width": "x"}]}, 400, "BAD_REQUEST", "records/0/petal_width"),
        ("json", split(FRAME.drop(columns="petal_width")), 400, "BAD_REQUEST", "split/data/0/petal_width: is missing"),
        ("json", {"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}, 400, "BAD_REQUEST", "split/data/0: should"),
        ("json", {"dataframe_split": [[1]]}, 400, "BAD_REQUEST", '{"columns"'),
        ("json", {"dataframe_split": {"columns": ["a", "a"], "data": [[1, 2]]}}, 400, "BAD_REQUEST", "of its own"),
        ("json", {"instances": [FLOWER], "inputs": []}, 400, "BAD_REQUEST", "at once"),
        ("json", {"instances": [FLOWER], "params": 3}, 400, "BAD_REQUEST", "/params"),
        ("json", [FLOWER], 400, "BAD_REQUEST", "an array"),
        ("text/csv", b"", 400, "BAD_REQUEST", "no header"),
        ("text/csv", b"sepal_length\n", 400, "BAD_REQUEST", "the CSV has no rows"),
        ("text/csv", FRAME.to_csv().encode() + b"1,2\n", 400, "BAD_REQUEST", "/2: should be a row of 5"),
        ("application/vnd.apache.parquet", b"PAR1", 400, "BAD_REQUEST", "can't be read"),
        ("application/x-npy", b"", 415, "BAD_REQUEST", "Content-Type"),
    ],
)
def test_errors_are_as_mlflow_writes_them(  # noqa: PLR0917  a case and its answer
    client: TestClient, kind: str, body: Any, status: int, code: str, says: str
) -> None:
    """What is wrong is named in `message`, where MLflow's clients look, beside `error_code`."""
    got = post(client, kind, body)
    assert (got.status_code, got.json()["error_code"]) == (status, code)
    assert says in got.json()["message"]


def test_parquet_that_is_many_rows_in_few_bytes_is_refused(client: TestClient) -> None:
    """A column of one value takes no bytes: rows are counted."""
    buffer = io.BytesIO()
    pd.DataFrame({name: [1.0] * 300_000 for name in FLOWER}).to_parquet(buffer)
    got = post(client, "application/x-parquet", buffer.getvalue())
    assert (got.status_code, got.json()["error_code"]) == (413, "BAD_REQUEST")


def test_a_model_is_asked_by_its_name_too(client: TestClient) -> None:
    """The path that Databricks has; an unknown name is told from the others, in the same shape."""
    got = post(client, "json", {"dataframe_records": [FLOWER]}, "/serving-endpoints/iris/invocations")
    assert got.json()["predictions"][0]["label"] == "virginica"
    unknown = post(client, "json", {}, "/serving-endpoints/nope/invocations")
    assert (unknown.status_code, unknown.json()["error_code"]) == (404, "RESOURCE_DOES_NOT_EXIST")
