"""The behaviour that applications rely on, over the fast path and over ASGI: one suite, the same answers."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx2 as httpx
import pytest

IRIS = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
PREDICT = "/v1/models/iris:predict"
INFER = "/v2/models/iris/infer"


def tensor(**changes: Any) -> dict[str, Any]:
    return {
        "name": "features",
        "datatype": "FP32",
        "shape": [1, 4],
        "data": list(IRIS.values()),
        **changes,
    }


def first(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"][0]


def test_named_positional_and_columnar_rows_agree(client: httpx.Client) -> None:
    """A row means the same by name, by position and in columns."""
    named = client.post(PREDICT, json={"instances": [IRIS]})
    positional = client.post(PREDICT, json={"instances": [list(IRIS.values())]})
    columns = client.post(PREDICT, json={"inputs": {k: [v] for k, v in IRIS.items()}})
    assert first(named)["label"] == "setosa"
    assert named.content == positional.content
    assert columns.json()["outputs"]["label"] == ["setosa"]
    probability = columns.json()["outputs"]["probabilities"]["setosa"][0]
    assert probability == first(named)["probabilities"]["setosa"]


def test_answers_come_in_row_order(client: httpx.Client) -> None:
    """Many rows in one request are answered in their order."""
    virginica = {"sepal_length": 6.7, "sepal_width": 3.0, "petal_length": 5.8, "petal_width": 2.3}
    answer = client.post(PREDICT, json={"instances": [IRIS, virginica] * 100})
    assert [p["label"] for p in answer.json()["predictions"]] == ["setosa", "virginica"] * 100


def test_a_version_can_be_asked_for(client: httpx.Client) -> None:
    """Versions and labels choose the model; without one the highest answers."""
    for path, version in (
        ("/v1/models/iris/versions/1:predict", "1"),
        ("/v1/models/iris/labels/latest:predict", "2"),
        (PREDICT, "2"),
    ):
        answer = client.post(path, json={"instances": [IRIS]})
        assert answer.json()["model_version"] == version


def test_missing_values_and_unknown_categories(client: httpx.Client) -> None:
    """null is a missing value where the signature says so, and an unseen category is taken as its policy says."""
    row = {
        "island": "Atlantis",
        "sex": None,
        "bill_length_mm": None,
        "bill_depth_mm": 18.0,
        "flipper_length_mm": 190,
        "body_mass_g": 3700,
    }
    assert first(client.post("/v1/models/penguins:predict", json={"instances": [row]}))["label"] == "Adelie"


def test_a_text_and_an_image(client: httpx.Client) -> None:
    """A model of one feature takes it bare: a string, or a tensor."""
    text = "Return the eigenvalues of the array."
    assert "label" in first(client.post("/v1/models/docs_topic:predict", json={"instances": [text]}))
    image = [[0.0] * 8] * 8
    assert "label" in first(client.post("/v1/models/digits:predict", json={"instances": [image]}))
    assert "label" in first(client.post("/v1/models/digits:predict", json={"instances": [{"image": image}]}))


def test_open_inference_is_exact(client: httpx.Client) -> None:
    """v2 answers as the protocol has it: id only if sent, outputs as asked for, flat and nested data alike."""
    answer = client.post(INFER, json={"inputs": [tensor()]})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"model_name", "model_version", "outputs"}
    assert [o["name"] for o in body["outputs"]] == ["label", "probabilities"]
    assert body["outputs"][1]["shape"] == [1, 3]
    nested = client.post(INFER, json={"inputs": [tensor(data=[list(IRIS.values())])]})
    assert nested.json() == body
    chosen = client.post(
        INFER,
        json={"id": "a1", "inputs": [tensor(parameters={"x": 1})], "outputs": [{"name": "probabilities"}]},
    )
    assert chosen.json()["id"] == "a1"
    assert [o["name"] for o in chosen.json()["outputs"]] == ["probabilities"]


def test_request_id_goes_in_and_out(client: httpx.Client) -> None:
    """A caller's X-Request-ID comes back; without one, each request gets its own."""
    given = client.post(PREDICT, json={"instances": [IRIS]}, headers={"x-request-id": "abc"})
    assert given.headers["x-request-id"] == "abc"
    ids = {client.post(PREDICT, json={"instances": [IRIS]}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_gzip_in_and_out(client: httpx.Client) -> None:
    """A gzipped body is read, and a large answer is compressed for those who accept it."""
    body = gzip.compress(json.dumps({"instances": [IRIS] * 500}).encode())
    answer = client.post(PREDICT, content=body, headers={"content-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert len(answer.json()["predictions"]) == 500
    plain = client.post(PREDICT, json={"instances": [IRIS] * 500}, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.json() == answer.json()


BAD_V1: list[tuple[str, bytes, int, str]] = [
    ("malformed", b'{"instances": [', 400, "not JSON"),
    ("empty", b"", 400, "empty"),
    ("top-level type", b"[1]", 400, "an array"),
    (
        "missing",
        b'{"instances":[{"sepal_length":1,"sepal_width":1,"petal_length":1}]}',
        422,
        "/instances/0/petal_width",
    ),
    ("extra", json.dumps({"instances": [{**IRIS, "colour": 1}]}).encode(), 422, "/instances/0/colour"),
    (
        "misspelt",
        b'{"instances":[{"sepal_length":1,"sepal_width":1,"petal_length":1,"petal_widht":1}]}',
        422,
        "did you mean 'petal_width'",
    ),
    ("wrong type", json.dumps({"instances": [{**IRIS, "petal_width": "0.2"}]}).encode(), 422, "is a string"),
    ("boolean", json.dumps({"instances": [{**IRIS, "petal_width": True}]}).encode(), 422, "is a boolean"),
    ("null", json.dumps({"instances": [{**IRIS, "petal_width": None}]}).encode(), 422, "is null"),
    ("nan", b'{"instances":[[NaN,1,1,1]]}', 400, "NaN"),
    ("infinity", b'{"instances":[[-Infinity,1,1,1]]}', 400, "-Infinity"),
    ("1e999", b'{"instances":[[1e999,1,1,1]]}', 400, "too large"),
    ("beyond float32", b'{"instances":[[1e39,1,1,1]]}', 422, "/instances/0/sepal_length"),
    ("ragged", b'{"instances":[[1,1,1,1],[1,1,1]]}', 422, "/instances/1"),
    ("width", b'{"instances":[[1,1,1,1,1]]}', 422, "has 5 values"),
    ("zero rows", b'{"instances":[]}', 400, "no rows"),
    ("deep", b"[" * 250_000, 400, "deep"),
    ("deep inside", b'{"instances":' + b"[" * 250_000, 400, "deep"),
    ("duplicate key", b'{"instances":[{"sepal_length":1,"sepal_length":2}]}', 400, "twice"),
    (
        "duplicate feature",
        b'{"instances":[{"sepal_length":1,"sepal_width":1,"petal_length":1,"petal_width":1,"petal_width":2}]}',
        400,
        "twice",
    ),
    ("utf-8", b'{"instances":["\xff\xfe"]}', 400, "UTF-8"),
    ("both", b'{"instances":[[1,1,1,1]],"inputs":{}}', 400, "either"),
    ("neither", b"{}", 400, "either"),
    (
        "columns of different lengths",
        b'{"inputs":{"sepal_length":[1],"sepal_width":[1,2],"petal_length":[1],"petal_width":[1]}}',
        422,
        "different lengths",
    ),
]


@pytest.mark.parametrize(("body", "status", "text"), [case[1:] for case in BAD_V1], ids=[c[0] for c in BAD_V1])
def test_bad_rows_are_named(client: httpx.Client, body: bytes, status: int, text: str) -> None:
    """Bad input gets a 4xx whose text names the place and the fault, and the server goes on."""
    answer = client.post(PREDICT, content=body)
    assert answer.status_code == status, answer.text
    assert text in json.dumps(answer.json()), answer.text
    assert first(client.post(PREDICT, json={"instances": [IRIS]}))["label"] == "setosa"


def test_all_bad_cells_are_counted_and_twenty_shown(client: httpx.Client) -> None:
    """Every bad cell counts; the first twenty are listed by JSON pointer."""
    rows = [{**IRIS, "petal_width": "x", "sepal_width": None} for _ in range(50)]
    answer = client.post(PREDICT, json={"instances": rows})
    assert answer.status_code == 422
    assert len(answer.json()["details"]) == 20
    assert "99 more" in answer.json()["error"]
    assert answer.json()["details"][0]["path"] == "/instances/0/sepal_width"


BAD_V2: list[tuple[str, Any, str]] = [
    ("count", tensor(data=[1, 2, 3]), "3 elements"),
    ("ragged", tensor(shape=[2, 4], data=[[1, 2, 3, 4], [1, 2, 3]]), "ragged"),
    ("rank", tensor(shape=[4]), "1 dimensions"),
    ("width", tensor(shape=[1, 5], data=[1, 2, 3, 4, 5]), "/inputs/0/shape"),
    ("negative", tensor(shape=[-1, 4]), "negative"),
    ("huge", tensor(shape=[2**62, 4]), "4 elements"),
    ("none, and too many", tensor(shape=[0, 2**62], data=[]), "/inputs/0/shape"),
    ("datatype", tensor(datatype="FP64"), "takes FP32"),
    ("no datatype", tensor(datatype="FLOAT"), "no datatype"),
    ("name", tensor(name="x"), "no input 'x'"),
    ("strings", tensor(data=["1", "2", "3", "4"]), "is a string"),
    ("booleans", tensor(data=[True, 1, 1, 1]), "is a boolean"),
    ("null", tensor(data=[None, 1, 1, 1]), "is null"),
    ("overflow", tensor(data=[1e39, 1, 1, 1]), "too large"),
    ("float dims", tensor(shape=[1.0, 4]), "whole numbers"),
    ("65 dims", tensor(shape=[1] * 65), "65 dimensions"),
]


@pytest.mark.parametrize(("bad", "text"), [case[1:] for case in BAD_V2], ids=[c[0] for c in BAD_V2])
def test_bad_tensors_are_named(client: httpx.Client, bad: Any, text: str) -> None:
    """A tensor that does not fit is a 400 that says where and why."""
    answer = client.post(INFER, json={"inputs": [bad]})
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]
    assert client.post(INFER, json={"inputs": [tensor()]}).status_code == 200


def test_no_rows_are_answered_with_none(client: httpx.Client) -> None:
    """A tensor of no rows is answered as onnxruntime answers it: with outputs of no rows."""
    answer = client.post(INFER, json={"inputs": [tensor(shape=[0, 4], data=[])]})
    assert answer.status_code == 200, answer.text
    shapes = [(output["shape"], output["data"]) for output in answer.json()["outputs"]]
    assert shapes == [([0], []), ([0, 3], [])]


def test_unknown_names_are_named(client: httpx.Client) -> None:
    """An unknown model, version, label or path is a 404 that says what there is."""
    for path, text in (
        ("/v1/models/nope:predict", "iris"),
        ("/v1/models/iris/versions/9:predict", "versions: 1, 2"),
        ("/v1/models/iris/labels/nope:predict", "labels: latest, stable"),
        ("/v2/models/nope/infer", "iris"),
        ("/v1/nothing", "/docs"),
    ):
        answer = client.post(path, json={"instances": [IRIS]})
        assert answer.status_code == 404, path
        assert text in answer.json()["error"]


def test_odd_names_are_shown_plainly(client: httpx.Client) -> None:
    """A 404 shows a name as it was sent; a character that could steer a terminal or a log is one escape."""
    sent, plain = "a%0Ab%5Cc%1B%5Bm", r"'a\nb\c\x1b[m'"
    for path in (sent, f"iris/versions/{sent}", f"iris/labels/{sent}"):
        answer = client.post(f"/v1/models/{path}:predict", json={"instances": [IRIS]})
        assert (answer.status_code, plain in answer.json()["error"]) == (404, True), answer.text
    for path in (sent, f"iris/report/{sent}"):
        answer = client.get(f"/v1/repository/models/{path}")
        assert (answer.status_code, plain in answer.json()["error"]) == (404, True), answer.text


def test_wrong_method_says_which_is_right(client: httpx.Client) -> None:
    """Another method than POST on a prediction path is a 405 with Allow."""
    answer = client.put(PREDICT, json={})
    assert answer.status_code == 405
    assert "POST" in answer.headers["allow"]


def test_bodies_over_the_limit(client: httpx.Client) -> None:
    """Too large a body is a 413, from its Content-Length, while reading, or when inflated."""
    large = b" " * (17 * 1024 * 1024)
    assert client.post(PREDICT, content=large).status_code == 413
    bomb = client.post(PREDICT, content=gzip.compress(large), headers={"content-encoding": "gzip"})
    assert bomb.status_code == 413
    chunked = client.post(PREDICT, content=(b" " * 65536 for _ in range(300)))
    assert chunked.status_code == 413


def test_unknown_encoding_is_415(client: httpx.Client) -> None:
    """A Content-Encoding that can't be read is refused as such."""
    answer = client.post(PREDICT, content=b"{}", headers={"content-encoding": "br"})
    assert answer.status_code == 415


def test_metadata_and_health(client: httpx.Client) -> None:
    """Lists, metadata and health answer for every shipped model."""
    names = client.get("/v1/models").json()["models"]
    assert names == ["breast_cancer", "diabetes", "digits", "docs_topic", "iris", "penguins"]
    assert client.get("/v2").json()["name"] == "serving"
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/health/ready").json()["ready"] is True
    for name in names:
        assert client.get(f"/v2/models/{name}/ready").status_code == 200
        assert client.get(f"/v1/models/{name}").json()["model_version_status"][0]["state"] == "AVAILABLE"
    assert client.get("/v2/models/iris").json()["versions"] == ["1", "2"]


def test_every_documented_example_works(client: httpx.Client) -> None:
    """Each operation that /openapi.json shows for a model answers 200 to its own example."""
    document = client.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method == "post" and ("predict" in path or "infer" in path):
                content = operation["requestBody"]["content"]["application/json"]
                answer = client.post(path.format(label="stable"), json=content["example"])
                assert answer.status_code == 200, (path, answer.text)
                tried += 1
    assert tried == 22


def test_docs_need_no_internet(client: httpx.Client) -> None:
    """The page's own assets come from this server."""
    page = client.get("/docs").text
    assert "https://" not in page
    assert client.get("/docs/assets/swagger-ui-bundle.js").status_code == 200
    assert client.get("/docs/assets/swagger-ui.css").status_code == 200
