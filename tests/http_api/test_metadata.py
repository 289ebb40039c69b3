"""What can be asked about the server and its models, as KServe, TF Serving and OIP clients ask it."""

from __future__ import annotations

import httpx2 as httpx
import pytest

from tests.conftest import Server
from tests.http_api.test_fast_path import connected


def test_models_are_listed_and_described(client: httpx.Client) -> None:
    """/v1/models lists every name; a model answers ready (KServe), its version states (TF Serving) and features."""
    assert client.get("/v1/models").json()["models"] == [
        "breast_cancer",
        "diabetes",
        "digits",
        "docs_topic",
        "iris",
        "penguins",
    ]
    iris = client.get("/v1/models/iris").json()
    assert (iris["name"], iris["ready"]) == ("iris", True)
    assert [(s["version"], s["state"]) for s in iris["model_version_status"]] == [
        ("1", "AVAILABLE"),
        ("2", "AVAILABLE"),
    ]
    assert iris["features"][0]["name"] == "sepal_length"
    assert client.get("/v1/models/iris/versions/1").json()["version"] == "1"


def test_the_open_inference_protocol_describes_itself(client: httpx.Client) -> None:
    """Server, health, model metadata and readiness are as the protocol has them; versions are strings."""
    assert set(client.get("/v2").json()) == {"name", "version", "extensions"}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").status_code == 200
    assert client.head("/v2/health/ready").status_code == client.head("/v2/health/live").status_code == 200
    for path, versions in (("/v2/models/iris", ["1", "2"]), ("/v2/models/iris/versions/1", ["1"])):
        assert client.get(path).json() == {
            "name": "iris",
            "versions": versions,
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "features", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [
                {"name": "label", "datatype": "BYTES", "shape": [-1]},
                {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            ],
        }
        assert client.get(f"{path}/ready").status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/v2/health/ready"])
def test_a_line_end_is_part_of_a_path(client: httpx.Client, path: str) -> None:
    """What a proxy that knows exact paths lets through as another one is another one here too."""
    assert client.get(path).status_code == 200
    assert client.get(f"{path}%0a").status_code == 404


def test_what_is_not_there_is_a_404_that_says_what_is(client: httpx.Client) -> None:
    """Unknown models and versions are 404 wherever they are asked for, in the one form that errors have."""
    for path in ("/v1/models/no", "/v1/models/iris/versions/7", "/v2/models/no", "/v2/models/iris/versions/7/ready"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert set(answer.json()) == {"error"}
    answer = client.get("/v1/models/" + "%2e%2e%2f" * 3 + "etc")
    assert answer.status_code == 404
    assert "/etc" not in answer.text


def test_the_content_type_does_not_matter(client: httpx.Client) -> None:
    """The body is JSON whatever it is called: curl says form, and tritonclient says nothing."""
    body = b'{"instances":[[5.1,3.5,1.4,0.2]]}'
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        answer = client.post("/v1/models/iris:predict", content=body, headers={"content-type": kind})
        assert answer.status_code == 200


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(server: Server) -> None:
    """100 MB in Content-Length is a 413 at once: not a byte of it is waited for."""
    with connected(server) as connection:
        connection.send(b"POST /v1/models/iris:predict HTTP/1.1\r\nHost: t\r\nContent-Length: 100000000\r\n\r\n")
        status, _, body = connection.answer()
        assert status == 413
        assert b"100000000" in body


def test_the_signature_in_the_words_of_tensorflow_serving(client: httpx.Client) -> None:
    """GET .../metadata names what :predict takes and gives, for the model and for a version."""
    for path in ("/v1/models/iris/metadata", f"/v1/models/iris/versions/{_version(client)}/metadata"):
        answer = client.get(path)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model_spec"]["name"] == "iris"
        definition = answer.json()["metadata"]["signature_def"]["signature_def"]["serving_default"]
        width = definition["inputs"]["petal_width"]
        assert (width["dtype"], width["tensor_shape"]["dim"]) == ("DT_FLOAT", [{"size": "-1", "name": ""}])
        assert definition["method_name"] == "tensorflow/serving/predict"
    assert client.get("/v1/models/nothing/metadata").status_code == 404
    for path in ("/v1/models/iris/labels/none", "/v1/models/iris/labels/none/metadata"):
        assert "has no label 'none'" in client.get(path).text


def _version(client: httpx.Client) -> str:
    version: str = client.get("/v1/models/iris").json()["version"]
    return version
