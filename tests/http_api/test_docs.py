"""The documentation of the live models: it works without internet, and its examples work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from serving.http_api.app import create_app
from serving.http_api.openapi import document as openapi
from serving.settings import Settings
from tests.conftest import MODELS


@pytest.fixture(scope="module")
def live() -> Iterator[TestClient]:
    """The application in this process, with a page of another origin allowed."""
    with TestClient(create_app(Settings(models=MODELS, cors_origins=("https://app.example",)))) as client:
        yield client


def test_every_example_is_answered(live: TestClient) -> None:
    """What the document shows as a request of a model's is answered, whichever of its operations it is sent to."""
    found = 0
    for path, methods in live.get("/openapi.json").json()["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        if "/models/" in path and "example" in content:
            answer = live.post(path.replace("{label}", "stable"), json=content["example"])
            assert answer.status_code == 200, (path, answer.text)
            found += 1
    assert found > 2 * len(list(MODELS.iterdir()))


def test_examples_have_no_digits_that_nobody_wrote(live: TestClient) -> None:
    """A 32-bit float is shown with the fewest digits that read back as it: 5.1, and not 5.099999904632568."""
    app: Any = live.app
    body = live.get("/openapi.json")
    assert not re.findall(r"\d\.\d{9,}", body.text)
    request = body.json()["paths"]["/v2/models/iris/infer"]["post"]["requestBody"]
    shown = request["content"]["application/json"]["example"]["inputs"][0]["data"]
    answered = app.state.serving.fleet.models["iris"].default.session.example[0]
    assert [np.float32(value) for value in shown] == answered.ravel().tolist()
    iris = live.get("/v1/models/iris").json()
    ranges = [feature[end] for feature in iris["features"] for end in ("minimum", "maximum")]
    assert all(len(str(value)) < 5 for value in [*iris["example"].values(), *ranges])


def test_an_odd_model_leaves_the_others_documented(live: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """A model whose operations can't be made is left out, and the log says so: the document has all others."""
    app: Any = live.app
    whole = {path for path in openapi.document(app, app.state.serving)["paths"] if "/models/" in path}
    iris = app.state.serving.fleet.models["iris"].default
    example, iris.example = iris.example, (object(),)
    try:
        found = {path for path in openapi.document(app, app.state.serving)["paths"] if "/models/" in path}
    finally:
        iris.example = example
    assert whole - found == {path for path in whole if "/iris" in path}
    assert "the documentation of model iris can't be made" in caplog.text


def test_features_are_described(live: TestClient) -> None:
    """A model's schema has its own feature names, types, ranges and categories."""

    def row(model: str) -> Any:
        document = live.get("/openapi.json").json()
        body = document["paths"][f"/v1/models/{model}:predict"]["post"]["requestBody"]
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        return document["components"]["schemas"][name]["properties"]["instances"]["items"]["anyOf"][0]

    iris = row("iris")["properties"]
    assert list(iris) == ["sepal_length", "sepal_width", "petal_length", "petal_width"]
    assert iris["petal_width"]["type"] == "number"
    assert re.search(r"training saw 0\.1 to 2\.[0-9]", iris["petal_width"]["description"])
    island = row("penguins")["properties"]["island"]
    assert "Biscoe, Dream, Torgersen" in island["description"]
    assert {"type": "null"} in row("penguins")["properties"]["sex"]["anyOf"]


def test_the_page_fetches_nothing_from_elsewhere(client: httpx.Client) -> None:
    """/docs names only assets of this server, and they are there."""
    page = client.get("/docs")
    assert page.status_code == 200
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert assets
    for asset in assets:
        assert not asset.startswith(("http", "//")), asset
        assert client.get(f"/{asset}").status_code == 200


def test_pages_of_allowed_origins_may_call(live: TestClient) -> None:
    """A browser page of an allowed origin gets its CORS headers; another gets none."""
    row = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
    allowed = live.post("/v1/models/iris:predict", json=row, headers={"origin": "https://app.example"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    other = live.post("/v1/models/iris:predict", json=row, headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert live.options("/v1/models/iris:predict", headers=asked).status_code == 200
