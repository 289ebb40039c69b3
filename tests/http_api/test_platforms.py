"""Each platform's documented contract, played against the real command in the environment that the platform makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.http_api.app import create_app
from serving.platforms import platform
from serving.settings import Settings
from tests.conftest import MODELS, Server
from tests.http_api.test_mlflow import FLOWER, OTHER

IRIS = MODELS / "iris" / "2" / "model.onnx"


@contextmanager
def contained(environment: dict[str, str], *command: str) -> Iterator[httpx.Client]:
    """Start a container's command where a platform has set these variables."""
    server = Server(command=command or ("run",), environment=environment)
    try:
        with httpx.Client(base_url=server.wait().url, timeout=30) as client:
            yield client
    finally:
        server.stop()


def logged(at: Path, inputs: list[dict[str, Any]]) -> Path:
    """Write what mlflow.onnx.log_model does, as far as it says something of the model: y = x0 + 10 x1."""
    at.mkdir(parents=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(np.array([[1], [10]], np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), at / "model.onnx")
    (at / "MLmodel").write_text(
        "flavors:\n  onnx:\n    data: model.onnx\n    onnx_version: 1.23.2\nmlflow_version: 3.17.2\n"
        f"signature:\n  inputs: '{json.dumps(inputs)}'\n  outputs: null\n"
    )
    return at


def columns(*names: str) -> list[dict[str, Any]]:
    return [{"type": "double", "name": name, "required": True} for name in names]


def test_sagemaker(tmp_path: Path) -> None:
    """The container is run with `serve`: it answers /ping and /invocations on the port told, of an unpacked archive."""
    shutil.copy(IRIS, tmp_path / "model.onnx")
    environment = {"SAGEMAKER_BIND_TO_PORT": "0", "SERVING_MODELS": str(tmp_path)}
    with contained(environment, "serve") as client:
        assert client.get("/ping").status_code == 200
        row = ",".join(map(str, FLOWER.values()))
        got = client.post("/invocations", content=row, headers={"content-type": "text/csv; header=absent"})
        assert got.json()["predictions"][0]["label"] == "virginica"
        assert client.post("/invocations", json={"instances": [OTHER]}).json()["predictions"][0]["label"] == "setosa"
        for path in ("/models", "/health", "/score"):
            assert client.get(path).status_code == 404, "another platform's path is answered"


def test_sagemaker_with_many_models(tmp_path: Path) -> None:
    """Models are loaded, listed, asked and unloaded by request, from below the one folder and nowhere else."""
    root, outside = tmp_path / "models", tmp_path / "outside"
    (root / "a1" / "model").mkdir(parents=True)
    shutil.copy(IRIS, root / "a1" / "model" / "model.onnx")
    logged(root / "b2" / "model", columns("width", "height"))
    (root / "broken").mkdir()
    (root / "broken" / "model.onnx").write_bytes(b"no model")
    logged(outside, columns("width", "height"))
    (root / "link").symlink_to(outside)
    environment = {"SAGEMAKER_BIND_TO_PORT": "0", "SAGEMAKER_MULTI_MODEL": "true", "SERVING_MODELS": str(root)}
    with contained(environment | {"SERVING_WORKERS": "2"}, "serve") as client:

        def load(name: str, url: Path | str) -> httpx.Response:
            return client.post("/models", json={"model_name": name, "url": str(url)})

        assert client.get("/ping").status_code == 200
        assert client.get("/models").json() == {"models": []}
        huge = client.post("/models", content=b'{"model_name": "' + b"x" * 70_000)
        assert (huge.status_code, client.post("/models", json={"model_name": ".."}).status_code) == (413, 400)
        loaded = load("a1", root / "a1" / "model")
        assert loaded.status_code == 200, loaded.text
        assert (loaded := load("b2", root / "b2" / "model")).status_code == 200, loaded.text
        assert load("a1", root / "a1" / "model").status_code == 409
        with ThreadPoolExecutor(6) as pool:  # at whichever worker
            url = f"{client.base_url}/models"
            asked = {"model_name": "once", "url": str(root / "b2")}
            statuses = [each.status_code for each in pool.map(lambda _: httpx.post(url, json=asked), range(6))]
        assert sorted(statuses) == [200, *[409] * 5]
        assert client.delete("/models/once").status_code == 200
        told = {"modelName": "a1", "modelUrl": str(root / "a1" / "model")}
        assert client.get("/models/a1").json() == told
        assert [each["modelName"] for each in client.get("/models").json()["models"]] == ["a1", "b2"]
        header = {"X-Amzn-SageMaker-Target-Model": "a.tar.gz"}
        got = client.post("/models/a1/invoke", json={"instances": [FLOWER]}, headers=header)
        assert got.json()["predictions"][0]["label"] == "virginica"
        got = client.post("/models/b2/invoke", json={"dataframe_records": [{"height": 2, "width": 1}]})
        assert got.json() == {"predictions": [21.0]}
        for url in (outside, root / "link", root / ".." / "outside", "/etc", "relative", "/a\0b"):
            assert load("c3", url).status_code == 400, url
        assert load("../c3", root / "a1").status_code == 400
        broken = load("c3", root / "broken")
        assert broken.status_code == 400
        assert "ONNX" in broken.text
        assert client.get("/models/c3").status_code == 404
        for name in ("a1", "b2"):  # also the last one
            assert client.delete(f"/models/{name}").status_code == 200
            assert client.delete(f"/models/{name}").status_code == 404
            assert client.post(f"/models/{name}/invoke", json={"instances": [[1, 2]]}).status_code == 404
        assert client.get("/models").json() == {"models": []}
        again = load("a1", root / "b2" / "model")  # another one under a name that was used
        assert again.status_code == 200, again.text
        assert client.post("/models/a1/invoke", json={"instances": [[1, 2]]}).json() == {"predictions": [21.0]}


def test_vertex(tmp_path: Path) -> None:
    """Port, paths and a local folder are what AIP_* says; a request has `instances`, and `parameters` if it likes."""
    logged(tmp_path / "model", columns("width", "height"))
    environment = {
        "AIP_HTTP_PORT": "0",
        "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
        "AIP_STORAGE_URI": str(tmp_path / "model"),
    }
    with contained(environment) as client:
        assert client.get(environment["AIP_HEALTH_ROUTE"]).status_code == 200
        body = {"instances": [{"width": 1, "height": 2}, {"width": 3, "height": 4}], "parameters": {"confidence": 0.5}}
        assert client.post(environment["AIP_PREDICT_ROUTE"], json=body).json() == {"predictions": [21.0, 43.0]}


def test_azure_ml(tmp_path: Path) -> None:
    """Its model folder holds the registered one; / tells liveness and readiness, /score answers, keys are asked for."""
    logged(tmp_path / "registered", columns("width", "height"))
    with contained({"AZUREML_MODEL_DIR": str(tmp_path), "SERVING_PORT": "0"}) as client:
        assert client.get("/").status_code == 200
        got = client.post("/score", json={"dataframe_split": {"columns": ["width", "height"], "data": [[1, 2]]}})
        assert got.json() == {"predictions": [21.0]}
        assert client.get("/invocations").status_code == 404


def test_nothing_is_on_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a platform its paths are not there, and what is set by hand wins over what the environment means."""
    paths = [getattr(route, "path", "") for route in create_app(Settings(models=MODELS)).routes]
    assert not {"/invocations", "/ping", "/score", "/models"} & {*paths}
    monkeypatch.setenv("AIP_HTTP_PORT", "7080")
    assert (Settings().platform, Settings().port, Settings().host) == ("vertex", 7080, "0.0.0.0")
    assert (Settings(port=9000, platform="azureml").port, Settings(models=MODELS).models) == (9000, MODELS)


@pytest.mark.parametrize(("said", "path"), [("", "/predict"), ("score", "/score"), ("/", "/"), ("/v1/a:b", "/v1/a:b")])
def test_routes_of_vertex_are_paths_however_they_are_written(said: str, path: str) -> None:
    """One that is empty means the default, and one without its slash is read with it: no worker dies of either."""
    asked = platform("vertex", {"AIP_PREDICT_ROUTE": said, "AIP_HEALTH_ROUTE": said})
    assert asked is not None
    assert (asked.predict, asked.healthy) == (path, (path.replace("predict", "health"),))
