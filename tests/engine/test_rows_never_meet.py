"""Callers who ask at the same time get what each would get alone, whatever the graph does with its first dimension."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient

from serving.http_api.app import create_app
from serving.settings import Settings
from tests.drills.mixing_graphs import FLOAT, graph, mixing, node
from tests.drills.ordinary_graphs import ordinary

NAMES = ("softmax_documents", "attention_of_tokens", "quantised_as_it_runs", "hidden_by_relu", "wave")


def put(folder: Path, name: str, model: onnx.ModelProto) -> None:
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "1" / "model.onnx").write_bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        put(folder, name, mixing()[name])
    put(folder, "perceptron", ordinary()["perceptron"])
    # As long as its input at one length, and of a fixed length: made-up rows must not decide whether it serves.
    three = graph([node("Identity", "three", "y")], [("x", FLOAT, ["n", 2])], [("y", FLOAT, [3])],
                  three=np.ones(3, np.float32))  # fmt: skip
    put(folder, "three", three)
    put(folder, "towers", graph([node("MatMul", "a b", "y")], [("a", FLOAT, ["n", "k"]), ("b", FLOAT, ["k", "m"])],
                                [("y", FLOAT, ["n", "m"])]))  # fmt: skip
    # A short delay, so that what may run together does.
    with TestClient(create_app(Settings(models=folder, max_delay_ms=5))) as client:
        yield client, folder


@pytest.mark.parametrize("name", [*NAMES, "perceptron"])
def test_callers_get_their_own_answers(served: tuple[TestClient, Path], name: str) -> None:
    """Six callers at once, requests of one to five rows: each answer is that of plain onnxruntime to it alone."""
    client, folder = served
    alone = ort.InferenceSession(str(folder / name / "1" / "model.onnx"))
    trailing = [int(dim) for dim in alone.get_inputs()[0].shape[1:]]
    start = threading.Barrier(6)

    def ask(seed: int) -> int:
        chance, wrong = np.random.default_rng(seed), 0
        start.wait()
        for _ in range(8):
            rows = chance.normal(size=(int(chance.integers(1, 6)), *trailing)).astype(np.float32)
            given = {"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
            answer = client.post(f"/v2/models/{name}/infer", json={"inputs": [given]})
            assert answer.status_code == 200, answer.text
            due = alone.run(["y"], {"x": rows})[0]
            got = np.array(answer.json()["outputs"][0]["data"], np.float32).reshape(due.shape)
            wrong += not np.allclose(due, got, rtol=1e-4, atol=1e-5)
        return wrong

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(ask, range(6))) == 0


def test_the_configuration_says_who_runs_alone_and_why(served: tuple[TestClient, Path]) -> None:
    """`max_batch_size` is 0 where requests run alone, with the reason; else it is what runs together."""
    client, _ = served
    assert client.get("/v2/models/perceptron/config").json()["max_batch_size"] == 512
    alone = client.get("/v2/models/softmax_documents/config").json()
    assert alone["max_batch_size"] == 0
    assert alone["input"][0]["dims"] == [-1, 1]
    assert "Softmax" in alone["parameters"]["batching"]["string_value"]


def test_made_up_rows_never_refuse_a_model(served: tuple[TestClient, Path]) -> None:
    """An output of as many elements as a trial had rows, and inputs without common rows, are answered as they are."""
    client, _ = served
    assert not client.get("/v1/models").json()["problems"]

    def ask(name: str, **arrays: np.ndarray) -> list[float]:
        inputs = [
            {"name": n, "datatype": "FP32", "shape": list(a.shape), "data": a.ravel().tolist()}
            for n, a in arrays.items()
        ]
        answer = client.post(f"/v2/models/{name}/infer", json={"inputs": inputs})
        assert answer.status_code == 200, answer.text
        return answer.json()["outputs"][0]["data"]

    assert ask("three", x=np.zeros((5, 2))) == [1, 1, 1]
    assert ask("towers", a=np.ones((2, 3)), b=np.ones((3, 4))) == [3.0] * 8


def test_a_wave_is_one_request(served: tuple[TestClient, Path]) -> None:
    """A sequence of 5,000 elements counts as one in the queue, not as 5,000 rows."""
    client, _ = served
    given = {"name": "x", "datatype": "FP32", "shape": [5000], "data": [1.0] * 5000}
    answer = client.post("/v2/models/wave/infer", json={"inputs": [given]})
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"][-1] == 5000.0
