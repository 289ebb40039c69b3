"""Feedback: predictions are joined with what turned out to be true, whoever made and whoever hears of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from sklearn.datasets import load_diabetes, load_iris
from sklearn.metrics import brier_score_loss, roc_auc_score

from serving.access.key_store import KeyStore
from serving.http_api.app import create_app
from serving.monitoring import quality
from serving.monitoring.feedback_store import FeedbackStore, Kept
from serving.settings import Settings
from tests.conftest import MODELS, running
from tests.metrics.test_metrics import of, parsed

Wait = Callable[..., None]


@pytest.mark.parametrize("classes", [2, 3])
def test_quality_is_what_scikit_learn_makes_of_it(classes: int) -> None:
    """AUC, with ties, and Brier score are those of scikit-learn."""
    random = np.random.default_rng(classes)
    scores = np.round(random.dirichlet(np.ones(classes), 200), 1)
    scores /= scores.sum(axis=1, keepdims=True)
    outcomes = random.integers(0, classes, 200)
    if classes == 2:
        assert quality.auc(outcomes, scores) == pytest.approx(roc_auc_score(outcomes, scores[:, 1]))
        assert quality.brier(outcomes, scores) == pytest.approx(brier_score_loss(outcomes, scores[:, 1]))
    else:
        assert quality.auc(outcomes, scores) == pytest.approx(roc_auc_score(outcomes, scores, multi_class="ovr"))
        squares = ((scores - np.eye(classes)[outcomes]) ** 2).sum(axis=1)
        assert quality.brier(outcomes, scores) == pytest.approx(squares.mean())
    assert quality.auc(np.zeros(9, int), scores[:9]) is None


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """Of predictions, outcomes and joined rows the oldest go; the same id again replaces what was there."""
    store = FeedbackStore(tmp_path / "f.sqlite")
    for i in range(30):
        store.keep([Kept("m", f"k{i % 25}", 0, "1", "c", str(i), None, None)], {"m": 10})
    assert store.waiting("m") == (10, 0)
    assert store.take("m", [(f"k{i}", 0, str(i)) for i in range(25)], 20) == 5
    assert store.take("m", [("k5", 0, "x")], 20) == 0
    # k20 to k24 are of the first round, k0 to k4 of the second, and the outcomes of the latter have gone.
    assert store.join({"m": 3}) == [("m", "1", 5, 5)]
    assert store.waiting("m") == (5, 15)
    assert [row[0] for row in store.judged("m", "1", "c")] == ["22", "23", "24"]
    store.close()


def test_outcomes_meet_their_predictions_over_workers_and_restarts(tmp_path: Path, eventually: Wait) -> None:
    """Any worker takes outcomes of any other's predictions, after a restart too; API and metrics have the figures."""
    models = tmp_path / "models"
    shutil.copytree(MODELS / "iris", models / "iris")
    (models / "iris" / "model.toml").write_text("[feedback]\nkeep = 1000\nwindow = 100")
    data = load_iris()
    names = [str(name) for name in data.target_names]
    truths = [names[k] for k in data.target]
    said: list[Any] = []
    flags = ("--workers", "2", "--state-dir", str(tmp_path / "state"))
    with running(*flags, models=models) as server:
        for start in range(0, 150, 10):
            with httpx.Client(base_url=server.url) as http:  # each connection has its worker
                body = {"instances": data.data[start : start + 10].tolist()}
                answer = http.post("/v1/models/iris:predict", json=body, headers={"x-request-id": f"order-{start}"})
                said += [one["label"] for one in answer.json()["predictions"]]
                again = http.post("/v1/models/iris:predict", json={"instances": data.data[:1].tolist()})
                told = {"feedback": [{"id": again.headers["x-request-id"], "outcomes": ["virginica"]}]}
                assert http.post("/v1/models/iris:feedback", json=told).json() == {"accepted": 1}
        eventually(lambda: httpx.get(f"{server.url}/v1/models/iris/feedback").json()["versions"][-1]["outcomes"] == 15)
        eventually(lambda: httpx.get(f"{server.url}/v1/models/iris/feedback").json()["kept"] == 150)
    with running(*flags, models=models) as server, httpx.Client(base_url=server.url) as http:
        told = {
            "feedback": [
                {"id": f"order-{start}", "outcomes": truths[start : start + 10]} for start in range(0, 150, 10)
            ]
        }
        assert http.post("/v1/models/iris:feedback", json=told).json() == {"accepted": 150}

        def figures() -> Any:
            return next(v for v in http.get("/v1/models/iris/feedback").json()["versions"] if v["version"] == "2")

        eventually(lambda: http.get("/v1/models/iris/feedback").json()["kept"] == 0)
        last = [a == b for a, b in zip(said, truths, strict=True)][-100:]
        assert figures()["outcomes"] == 100
        assert figures()["accuracy"] == pytest.approx(sum(last) / 100)
        assert figures()["auc"] > 0.9
        assert figures()["brier"] < 0.2

        def counted() -> bool:
            samples = parsed(http.get("/metrics").text)
            right = of(samples, "serving_feedback_right_total", model="iris", version="2")
            return (
                of(samples, "serving_feedback_outcomes_total", model="iris", version="2") == 150
                and right == sum(a == b for a, b in zip(said, truths, strict=True))
                and of(samples, "serving_feedback_accuracy_ratio", version="2") == pytest.approx(sum(last) / 100)
            )

        eventually(counted)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    models = tmp_path_factory.mktemp("models")
    for name in ("iris", "diabetes"):
        shutil.copytree(MODELS / name, models / name)
        (models / name / "model.toml").write_text("[feedback]")
    shutil.copytree(MODELS / "iris" / "1", models / "silent" / "1")
    shutil.copytree(MODELS / "iris" / "1", models / "closed" / "1")
    (models / "closed" / "model.toml").write_text('[feedback]\n[access]\npredict = ["web"]')
    keys = models.parent / "keys"
    key = KeyStore(keys).create("ann", frozenset({"deploy"}))
    with TestClient(create_app(Settings(models=models, keys=str(keys)))) as made:
        made.headers["authorization"] = f"Bearer {key}"
        yield made


def test_numbers_are_judged_by_their_errors(client: TestClient, eventually: Wait) -> None:
    """A regressor has a mean absolute error; over Open Inference the request's own id names it."""
    rows, truths = load_diabetes(return_X_y=True, scaled=False)
    names = [f["name"] for f in client.get("/v1/models/diabetes").json()["features"]]
    tensor = {"name": "features", "shape": [20, len(names)], "datatype": "FP32", "data": rows[:20].ravel().tolist()}
    tensor["name"] = client.get("/v2/models/diabetes").json()["inputs"][0]["name"]
    answer = client.post("/v2/models/diabetes/infer", json={"id": "mine", "inputs": [tensor]}).json()
    told = {"feedback": [{"id": "mine", "outcomes": truths[:20].tolist()}]}
    assert client.post("/v1/models/diabetes:feedback", json=told).status_code == 200
    eventually(lambda: client.get("/v1/models/diabetes/feedback").json()["versions"][0]["outcomes"] == 20)
    mae = client.get("/v1/models/diabetes/feedback").json()["versions"][0]["mae"]
    assert mae == pytest.approx(np.abs(np.array(answer["outputs"][0]["data"]) - truths[:20]).mean())


@pytest.mark.parametrize(
    ("name", "body", "status", "text"),
    [
        ("silent", '{"feedback": [{"id": "a", "outcomes": ["setosa"]}]}', 400, "[feedback]"),
        ("closed", '{"feedback": [{"id": "a", "outcomes": ["setosa"]}]}', 403, "settings name others"),
        ("rose", '{"feedback": [{"id": "a", "outcomes": ["setosa"]}]}', 404, "rose"),
        ("diabetes", "{", 400, "JSON"),
        ("diabetes", "{}", 422, "/feedback"),
        ("diabetes", '{"feedback": [{"id": "a", "outcomes": [1, "x"]}]}', 422, "/feedback/0/outcomes/1"),
        ("diabetes", '{"feedback": [{"id": "", "outcomes": [1]}]}', 422, "/feedback/0/id"),
        ("diabetes", '{"feedback": [{"id": "a", "outcomes": [1%s]}]}' % ("0" * 400), 422, "/feedback/0/outcomes/0"),
        ("diabetes", '{"feedback": [{"id": "a", "outcomes": [1.7e308]}]}', 422, "/feedback/0/outcomes/0"),
        ("diabetes", '{"feedback": [{"id": "a", "outcomes": ["%s"]}]}' % ("x" * 2000), 422, "/feedback/0/outcomes/0"),
    ],
)
def test_bad_feedback_is_refused_by_its_place(client: TestClient, name: str, body: str, status: int, text: str) -> None:
    """What can't be an outcome, or is for a model that keeps nothing or is closed, is refused in words."""
    answer = client.post(f"/v1/models/{name}:feedback", content=body)
    assert (answer.status_code, text in answer.text) == (status, True), answer.text


def test_a_canary_that_is_wrong_more_often_is_taken_back(client: TestClient, eventually: Wait) -> None:
    """What turns out to be true decides on a canary, and its history says so."""
    at = "/v1/repository/models"
    order: dict[str, Any] = {"version": "1", "percent": 50, "judge": {"rows": 10, "accuracy_loss": 0.1}}
    refused = client.post(f"{at}/silent/promote", json={"version": "1", "judge": order["judge"]})
    assert (refused.status_code, "accuracy_loss" in refused.text) == (400, True)
    assert client.post(f"{at}/iris/canary", json=order).status_code == 200

    def state() -> Any:
        told = []
        for _ in range(30):
            answer = client.post("/v1/models/iris:predict", json={"instances": [[5.1, 3.5, 1.4, 0.2]]})
            truth = "setosa" if answer.json()["model_version"] == "2" else "virginica"
            told.append({"id": answer.headers["x-request-id"], "outcomes": [truth]})
        assert client.post("/v1/models/iris:feedback", json={"feedback": told}).json() == {"accepted": 30}
        return client.get(f"{at}/iris").json()["traffic"]

    eventually(lambda: "canary" not in state())
    last = client.get(f"{at}/iris/history").json()["history"][-1]
    assert "labels were wrong" in last["why"]
    assert client.get(f"{at}/iris").json()["serving"]["stable"] == "2"
