"""Explanations: what each feature contributes, over every protocol, and what that costs at most."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tritonclient.grpc as triton
from fastapi.testclient import TestClient
from scipy.stats import spearmanr
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import LinearRegression

from serving.engine.signature import Feature, Signature, TensorSpec
from serving.errors import InvalidRequest
from serving.export import export, publish
from serving.prediction.explanation import Explainer
from tests.conftest import MODELS, with_grpc
from tests.metrics.test_metrics import of, parsed

WIDTH = 6


def _trees() -> tuple[Any, pd.DataFrame]:
    random = np.random.default_rng(0)
    rows = pd.DataFrame(random.normal(size=(400, WIDTH)).astype("float32"), columns=[f"x{i}" for i in range(WIDTH)])
    truth = rows.x0 * rows.x1 + np.where(rows.x2 > 0, rows.x3, -1) + 2 * rows.x4
    return GradientBoostingRegressor(n_estimators=40, max_depth=4, random_state=0).fit(rows, truth), rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear model and one of trees, whose features act together, beside those that ship."""
    root: Path = tmp_path_factory.mktemp("models")
    trees, rows = _trees()
    linear = LinearRegression().fit(rows, rows.x0 - 3 * rows.x1 + 0.5 * rows.x5)
    for name, model in (("trees", trees), ("linear", linear), ("counted", linear)):
        publish(export(model, train=rows[:300], held_out=rows[300:]), name=name, root=root)
    for name in ("iris", "digits"):
        (root / name).symlink_to(MODELS / name)
    return root


@pytest.fixture(scope="module")
def client(models: Path) -> Iterator[TestClient]:
    with TestClient(with_grpc(models)) as made:
        yield made


def background(client: TestClient, name: str) -> Any:
    app: Any = client.app
    model = app.state.serving.fleet.models[name].default
    return np.array([list(row.values()) for row in model.signature.background], np.float32)


def shapley(answer: Any, row: Any, others: Any) -> Any:
    """Compute Shapley values as they are defined: by every set of features, against every background row."""
    values = {}
    for size in range(WIDTH + 1):
        for chosen in itertools.combinations(range(WIDTH), size):
            mixed = others.copy()
            mixed[:, chosen] = row[list(chosen)]
            values[frozenset(chosen)] = answer(mixed).mean()
    found = np.zeros(WIDTH)
    for i, (chosen, value) in itertools.product(range(WIDTH), values.items()):
        if i not in chosen:
            weight = math.factorial(len(chosen)) * math.factorial(WIDTH - len(chosen) - 1) / math.factorial(WIDTH)
            found[i] += weight * (values[chosen | {i}] - value)
    return found


def explained(client: TestClient, name: str, rows: Any) -> Any:
    answer = client.post(f"/v1/models/{name}:predict", json={"instances": rows.tolist(), "explain": True})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_linear_model_is_explained_exactly(client: TestClient) -> None:
    """A feature's contribution is its weight times its distance from the background's mean."""
    rows = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)
    others = background(client, "linear").astype(float)
    found = explained(client, "linear", rows)
    for row, told in zip(rows, found["explanations"], strict=True):
        due = np.array([1, -3, 0, 0, 0, 0.5]) * (row - others.mean(axis=0))
        assert list(told["contributions"].values()) == pytest.approx(due, abs=1e-4)
    sums = [sum(told["contributions"].values()) + told["base"] for told in found["explanations"]]
    assert sums == pytest.approx(found["predictions"], abs=1e-4)


def test_trees_are_explained_as_shapley_values_have_it(client: TestClient) -> None:
    """Features that act together are ranked as by their exact Shapley values, and add up to the answer."""
    trees, rows = _trees()
    chosen = rows.to_numpy()[300:310]
    others = background(client, "trees")
    found = explained(client, "trees", chosen)
    ranks = []
    for row, told, answer in zip(chosen, found["explanations"], found["predictions"], strict=True):
        made = np.array(list(told["contributions"].values()))
        due = shapley(lambda mixed: trees.predict(pd.DataFrame(mixed, columns=rows.columns)), row, others)
        assert made.sum() + told["base"] == pytest.approx(answer, abs=1e-4)
        ranks.append(spearmanr(made, due).statistic)
    assert np.mean(ranks) > 0.9


def test_made_up_rows_are_no_drift(client: TestClient, eventually: Callable[[Callable[[], bool]], None]) -> None:
    """What a model is asked for an explanation is not compared with its reference; what callers ask is."""
    explained(client, "counted", np.zeros((2, WIDTH)))
    for _ in range(3):
        client.post("/v1/models/counted:predict", json={"instances": [[0.0] * WIDTH]})
    explained(client, "counted", np.zeros((2, WIDTH)))

    def rows() -> float:
        return of(parsed(client.get("/metrics").text), "serving_drift_rows_total", model="counted")

    eventually(lambda: rows() >= 3)
    assert rows() == 3


def test_every_protocol_explains(client: TestClient) -> None:
    """V1 by rows and by columns, Open Inference as JSON, as raw tensors and over gRPC say the same numbers."""
    row = np.array([[5.1, 3.5, 1.4, 0.2]], np.float32)
    by_row = explained(client, "iris", row)
    due = [*by_row["explanations"][0]["contributions"].values(), by_row["explanations"][0]["base"]]
    assert sum(due) == pytest.approx(by_row["predictions"][0]["probabilities"]["setosa"], abs=1e-5)
    names = by_row["explanations"][0]["contributions"]
    columns = {"inputs": {name: [value] for name, value in zip(names, row[0].tolist(), strict=True)}, "explain": True}
    assert client.post("/v1/models/iris:predict", json=columns).json()["explanations"] == by_row["explanations"]
    tensor = {"name": "features", "shape": [1, 4], "datatype": "FP32", "data": row[0].tolist()}
    for parameters in ({"explain": True}, {"explain": True, "binary_data_output": True}):
        answer = client.post("/v2/models/iris/infer", json={"inputs": [tensor], "parameters": parameters})
        length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
        last = json.loads(answer.content[:length])["outputs"][-1]
        assert (last["name"], last["shape"], last["datatype"]) == ("contributions", [1, 5], "FP64")
        assert last["data"] == pytest.approx(due)
    app: Any = client.app
    with triton.InferenceServerClient(f"127.0.0.1:{app.state.serving.companion.port}") as grpc:
        given = triton.InferInput("features", [1, 4], "FP32")
        given.set_data_from_numpy(row)
        for _ in range(2):
            assert grpc.infer("iris", [given]).as_numpy("contributions") is None
            answer = grpc.infer("iris", [given], parameters={"explain": True})
            assert answer.as_numpy("contributions")[0].tolist() == pytest.approx(due)


@pytest.mark.parametrize(
    ("name", "rows", "explain", "said"),
    [
        ("trees", 5000, True, (413, "explained at a time")),
        ("digits", 1, True, (400, "background rows")),
        ("trees", 1, "yes", (400, "explain")),
        ("trees", 1, False, (200, "predictions")),
    ],
)
def test_what_can_not_be_explained_is_refused(
    client: TestClient, name: str, rows: int, explain: Any, said: tuple[int, str]
) -> None:
    """Too many rows, images, and what is neither true nor false are refused with what to do."""
    status, text = said
    row: Any = [[0.0] * 8] * 8 if name == "digits" else [0.0] * WIDTH
    answer = client.post(f"/v1/models/{name}:predict", json={"instances": [row] * rows, "explain": explain})
    assert (answer.status_code, text in answer.text) == (status, True), answer.text[:500]


def test_a_model_of_thousands_of_features_is_refused_before_memory_is_taken() -> None:
    """What says which features are whose grows with the square of their number."""
    features = tuple(Feature(name=f"f{number}", datatype="FP32") for number in range(3000))
    row = {feature.name: 0.0 for feature in features}
    wide = Signature(
        task="regression",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 3000)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 1)),),
        layout="matrix",
        batch="dynamic",
        features=features,
        background=(row,) * 8,
    )
    with pytest.raises(InvalidRequest, match="3000 features, which are too many"):
        Explainer(wide)
