"""Feedback: predictions are joined with what turned out to be true, whoever made and whoever hears of them."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from sklearn.datasets import load_diabetes, load_iris
from sklearn.metrics import brier_score_loss, roc_auc_score

import serving
from serving.access.key_store import KeyStore
from serving.engine.limits import Feedback
from serving.engine.signature import Feature, Signature, TensorSpec
from serving.http_api.app import create_app
from serving.monitoring import quality
from serving.monitoring.feedback import FeedbackMonitor
from serving.monitoring.feedback_store import FeedbackStore, Kept
from serving.monitoring.monitoring import Monitoring
from serving.monitoring.shared import SharedDocuments
from serving.settings import Settings
from tests.conformance.own import grpc_address
from tests.conftest import MODELS, Server, running
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


def test_versions_may_have_other_classes(tmp_path: Path) -> None:
    """An outcome is one of any version's classes; a version that does not have it was wrong, and is judged on.

    Where the file can't be read that is said, and is no fault of ours.
    """
    monitor = FeedbackMonitor(lambda: tmp_path)
    outputs = (
        TensorSpec(name="probabilities", datatype="FP32", shape=(-1, 3)),
        TensorSpec(name="label", datatype="INT64", shape=(-1,)),
    )
    made = [
        Signature(
            inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 1)),),
            features=(Feature(name="x", datatype="FP32"),),
            layout="matrix",
            outputs=outputs,
            label="label",
            scores="probabilities",
            classes=classes,
        )
        for classes in (("a", "b", "c"), ("a", "b", "new"))
    ]
    kept = [monitor.follow("m", str(i), "ab", one, Feedback()) for i, one in enumerate(made, 1)]
    for i, one in enumerate(kept, 1):
        assert one is not None
        one.keep(f"k{i}", (np.eye(3, dtype=np.float32), np.arange(3)), 3)
    told = [("k1", ["a", "b", "new"], "/0"), ("k2", ["a", "b", "c"], "/1")]
    assert monitor.take("m", told) == 6
    with pytest.raises(serving.SignatureMismatch, match="classes"):
        monitor.take("m", [("k1", ["none"], "/0")])
    monitor.tick(leads=True)
    for version in monitor.report("m").versions:
        assert (version.outcomes, version.accuracy, version.auc) == (3, pytest.approx(2 / 3), pytest.approx(1))
        assert version.brier == pytest.approx(1 / 3)
    monitor.close()
    (tmp_path / "feedback.sqlite").write_bytes(b"no database" * 1000)
    for ask in (lambda: monitor.take("m", told), lambda: monitor.report("m")):
        with pytest.raises(serving.NotReady):
            ask()


def test_versions_come_while_others_are_asked_for(tmp_path: Path) -> None:
    """A version that is loaded just now disturbs nobody who asks how others do."""
    monitor, stop = FeedbackMonitor(lambda: tmp_path), threading.Event()
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 1))
    features = (Feature(name="x", datatype="FP32"),)
    signature = Signature(inputs=(spec,), features=features, outputs=(spec,), layout="matrix")

    def load() -> None:
        for number in itertools.count():
            kept.append(monitor.follow("m", str(number), "ab", signature, Feedback()))
            if stop.is_set():
                return

    kept: deque[Any] = deque(maxlen=100)
    loading = threading.Thread(target=load)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        loading.start()
        for _ in range(2000):
            with pytest.raises(serving.InvalidRequest, match="keeps no predictions"):
                monitor.report("other")
        assert loading.is_alive()
    finally:
        stop.set()
        sys.setswitchinterval(before)
        loading.join()


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """Of predictions, outcomes and joined rows the oldest go; the same id again replaces what was there."""
    store = FeedbackStore(tmp_path / "f.sqlite")
    for i in range(30):
        store.keep([Kept("m", f"k{i % 25}", 0, "1", "c", str(i), None, None)], {"m": 10})
    assert store.waiting("m") == (10, 0)
    assert store.take("m", [(f"k{i}", 0, str(i)) for i in range(25)], 20) == 5
    assert store.take("m", [("k5", 0, "x")], 20) == 0
    # k20 to k24 are of the first round, k0 to k4 of the second, and the outcomes of the latter have gone.
    assert store.join({"m": Feedback.model_construct(window=3)}) == [("m", "1", 5, 5)]
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
    with running(*flags, "--grpc-port", "0", models=models) as server, httpx.Client(base_url=server.url) as http:
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
        more = told_by_clients(server, data.data[:60], truths[:60])

        def joined() -> float:
            return of(parsed(http.get("/metrics").text), "serving_feedback_outcomes_total", model="iris", version="2")

        eventually(lambda: joined() == 150 + more)


def told_by_clients(server: Server, rows: Any, truths: list[str]) -> int:
    """Predict and tell by both clients, over HTTP and gRPC, under the clients' names and one of one's own."""
    with serving.Client(server.url, grpc=grpc_address(server)) as client:
        many, one = client.answer("iris", rows), client.answer("iris", rows[:1].tolist(), request_id="mine")
        assert one.request_id == "mine"
        assert client.feedback("iris", {many.request_id: truths, "mine": "setosa"}) == len(truths) + 1
        with pytest.raises(serving.InvalidRequest, match="request_id"):
            client.answer("iris", rows[:1].tolist(), request_id="has spaces")
        with pytest.raises(serving.SignatureMismatch, match="classes"):
            client.feedback("iris", {"mine": "rose"})

    async def asked() -> int:
        async with serving.AsyncClient(server.url) as client:
            answer = await client.answer("iris", rows)
            return await client.feedback("iris", {answer.request_id: np.array(truths)})

    return len(truths) + 1 + asyncio.run(asked())


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris", models / "iris")
    for version in ("1", "2"):
        shutil.copytree(MODELS / "diabetes" / "1", models / "diabetes" / version)
    (models / "iris" / "model.toml").write_text("[feedback]")
    (models / "diabetes" / "model.toml").write_text("[feedback]\nlargest_error = 400.0")
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
    answer = client.post("/v2/models/diabetes/versions/1/infer", json={"id": "mine", "inputs": [tensor]}).json()
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
        ("diabetes", '{"feedback": [%s]}' % ("{}," * 400_000), 413, "1048576"),
        ("diabetes", '{"feedback": [{"id": "a", "outcomes": [1%s]}]}' % ("0" * 400), 422, "/feedback/0/outcomes/0"),
        ("diabetes", '{"feedback": [{"id": "a", "outcomes": [1.7e308]}]}', 422, "/feedback/0/outcomes/0"),
        ("diabetes", '{"feedback": [{"id": "a", "outcomes": ["%s"]}]}' % ("x" * 2000), 422, "/feedback/0/outcomes/0"),
    ],
)
def test_bad_feedback_is_refused_by_its_place(client: TestClient, name: str, body: str, status: int, text: str) -> None:
    """What can't be an outcome, or is for a model that keeps nothing or is closed, is refused in words."""
    answer = client.post(f"/v1/models/{name}:feedback", content=body)
    assert (answer.status_code, text in answer.text) == (status, True), answer.text


@pytest.mark.parametrize("name", ["iris", "diabetes"])
def test_a_canary_that_is_wrong_more_often_is_taken_back(client: TestClient, eventually: Wait, name: str) -> None:
    """What turns out to be true decides on a canary, and its history says so: by wrong labels, or by errors."""
    at = "/v1/repository/models"
    order: dict[str, Any] = {"version": "1", "percent": 50, "judge": {"rows": 10, "accuracy_loss": 0.1}}
    refused = client.post(f"{at}/silent/promote", json={"version": "1", "judge": order["judge"]})
    assert (refused.status_code, "accuracy_loss" in refused.text) == (400, True)
    assert client.post(f"{at}/{name}/canary", json=order).status_code == 200
    row = client.get(f"/v1/models/{name}").json()["example"]

    def truth(answer: Any) -> Any:
        said, is_stable = answer["predictions"][0], answer["model_version"] == "2"
        return said + (20 if is_stable else 200) if name == "diabetes" else "setosa" if is_stable else "virginica"

    def state() -> Any:
        told = []
        for _ in range(30):
            answer = client.post(f"/v1/models/{name}:predict", json={"instances": [row]})
            told.append({"id": answer.headers["x-request-id"], "outcomes": [truth(answer.json())]})
        assert client.post(f"/v1/models/{name}:feedback", json={"feedback": told}).json() == {"accepted": 30}
        return client.get(f"{at}/{name}").json()["traffic"]

    eventually(lambda: "canary" not in state())
    last = client.get(f"{at}/{name}/history").json()["history"][-1]
    assert "it missed" in last["why"]
    assert client.get(f"{at}/{name}").json()["serving"]["stable"] == "2"


def test_how_right_a_number_was(tmp_path: Path) -> None:
    """An error counts by its share of the largest one; what is no number is wholly wrong."""
    store = FeedbackStore(tmp_path / "f.sqlite")
    values = [1.0, 3.0, 6.0, 99.0, None, 1.0]
    store.keep([Kept("m", f"k{i}", 0, "1", "c", None, None, value) for i, value in enumerate(values)], {})
    store.take("m", [(f"k{i}", 0, "1.0" if i < 5 else "rose") for i in range(len(values))], 100)
    assert store.join({"m": Feedback(largest_error=10.0)}) == [("m", "1", 6, pytest.approx(1 + 0.8 + 0.5))]
    store.close()


def test_what_is_kept_of_versions_that_have_gone_goes_too(tmp_path: Path) -> None:
    """References that were learned, outcomes and predictions: removed where the folder is gone at two looks running."""
    models, state = tmp_path / "models", tmp_path / "state"
    for version in ("m/1", "m/2", "away/1"):
        (models / version).mkdir(parents=True)
    (state / "drift").mkdir(parents=True)
    for name in ("m@1@ab-100", "m@2@cd-100", "away@1@ef-100"):
        (state / "drift" / f"{name}.json").write_text("[]")
    store = FeedbackStore(state / "feedback.sqlite")
    of = [("m", "1"), ("m", "2"), ("away", "1")]
    store.keep(
        [Kept(name, key, 0, version, "c", "a", None, None) for name, version in of for key in (version, "w")], {}
    )
    for name, version in of:
        store.take(name, [(version, 0, "a")], 100)
    store.join({})
    monitoring = Monitoring(SharedDocuments(None, 0), lambda: state, models)

    def left() -> tuple[set[str], set[tuple[str, str]]]:
        return {path.name.rpartition("@")[0] for path in (state / "drift").iterdir()}, store.kept()

    whole = {"m@1", "m@2", "away@1"}, {*of, ("m", ""), ("away", "")}
    models.rename(tmp_path / "unmounted")
    models.mkdir()
    monitoring.sweep()
    monitoring.sweep()
    assert left() == whole
    models.rmdir()
    (tmp_path / "unmounted").rename(models)
    (models / "m/1").rmdir()
    (models / "away").rename(tmp_path / "away")
    monitoring.sweep()
    (tmp_path / "away").rename(models / "away")
    assert left() == whole
    monitoring.sweep()
    assert left() == ({"m@2", "away@1"}, {("m", "2"), ("away", "1"), ("m", ""), ("away", "")})
    shutil.rmtree(models / "away")
    monitoring.sweep()
    monitoring.sweep()
    assert left() == ({"m@2"}, {("m", "2"), ("m", "")})
    monitoring.close()
    store.close()
