"""Publishing by PUT: the body is the file; what arrives is checked, examined, and whole or not there."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.access.key_store import KeyStore
from serving.http_api.app import create_app
from serving.repository.state_directory import state_folder
from serving.settings import Settings
from tests.conftest import MODELS

IRIS_1, IRIS_2 = MODELS / "iris" / "1" / "model.onnx", MODELS / "iris" / "2" / "model.onnx"
LIMIT = 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    """An application over an empty folder; Ana may deploy."""
    keys = folder.parent / "keys"
    key = KeyStore(keys).create("ana", frozenset({"deploy"}))
    app = create_app(Settings(models=folder, keys=str(keys), max_model_bytes=LIMIT))
    with TestClient(app, headers={"authorization": f"Bearer {key}"}) as made:
        yield made


def put(client: TestClient, path: str, body: Any, **headers: str) -> Any:
    return client.put(
        f"/v1/repository/models/{path}", content=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


def test_a_body_becomes_a_version(client: TestClient, folder: Path) -> None:
    """201 with the report and the place; the same again is 200; other bytes under that number are 409."""
    body = IRIS_1.read_bytes()
    made = put(client, "iris/versions/next?note=first", body, x_checksum_sha256=hashlib.sha256(body).hexdigest())
    assert made.status_code == 201, made.text
    assert made.url.join(made.headers["location"]).path == "/v1/models/iris/versions/1"
    assert made.json()["version"] == "1"
    assert made.json()["report"]["ok"] is True
    assert (folder / "iris" / "1" / "model.onnx").read_bytes() == body
    assert '"who": "ana"' in (folder / "iris" / "1" / "manifest.json").read_text()
    again = put(client, "iris/versions/1", body)
    assert (again.status_code, again.json()["new"]) == (200, False)
    other = put(client, "iris/versions/1", IRIS_2.read_bytes())
    assert other.status_code == 409
    assert "never changes" in other.json()["error"]
    assert client.get("/v1/repository/models/iris/report/1").json() == made.json()["report"]


def test_only_who_may_deploy_publishes(client: TestClient, folder: Path) -> None:
    """Without a key, nothing of the body is read."""
    path = "/v1/repository/models/iris/versions/next"
    answer = client.put(path, content=IRIS_1.read_bytes(), headers={"authorization": ""})
    assert answer.status_code == 401
    assert os.listdir(folder) == []
    assert not (state_folder(folder) / "staging").exists()


def test_what_the_gate_refuses_is_422_with_its_report(client: TestClient, folder: Path) -> None:
    """A body that is no model leaves nothing behind, not even the model's folder."""
    answer = put(client, "iris/versions/next", b"\x80\x04 not a model")
    assert answer.status_code == 422
    assert "Python pickle" in answer.json()["error"]
    assert answer.json()["report"]["checks"][0]["outcome"] == "refused"
    assert not (folder / "iris").exists()
    assert os.listdir(state_folder(folder) / "staging") == []


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "says"),
    [
        ("iris/versions/next", b"x" * (LIMIT + 1), {}, 413, "which is the limit: see --max-model-bytes"),
        ("iris/versions/next", iter([b"x" * LIMIT, b"x"]), {}, 413, "which is the limit"),
        ("iris/versions/next", b"x", {"x_checksum_sha256": "0" * 64}, 400, "has SHA-256"),
        ("iris/versions/next", b"x", {"x_checksum_sha256": "abc"}, 400, "64 hexadecimal"),
        ("iris/versions/next", b"x", {"content_encoding": "gzip"}, 415, "as it is"),
        ("iris/versions/next", b"x", {"content_type": "multipart/form-data; boundary=x"}, 415, "not a form"),
        ("iris/versions/next", b"", {}, 400, "empty"),
        ("iris/versions/0", b"x", {}, 400, "whole number"),
        ("iris/versions/latest", b"x", {}, 400, "whole number"),
        (".serving/versions/1", b"x", {}, 400, "no model name"),
        ("..%2F..%2Fetc/versions/1", b"x", {}, 404, "nothing at this path"),
    ],
)
def test_bad_requests_change_nothing(  # noqa: PLR0917
    client: TestClient, folder: Path, path: str, body: Any, headers: dict[str, str], status: int, says: str
) -> None:
    """Each is answered with what to do, and the folder is as before."""
    answer = put(client, path, body, **headers)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]
    assert os.listdir(folder) == []
    staging = state_folder(folder) / "staging"
    assert not staging.exists() or os.listdir(staging) == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/repository/models/iris/versions/next"),
        ("POST", "/v1/repository/models/iris/promote"),
        ("POST", "/v2/repository/models/iris/load"),
    ],
)
def test_a_client_that_leaves_leaves_nothing(client: TestClient, folder: Path, method: str, path: str) -> None:
    """A connection that ends in the middle of a body is no fault of the server's, and half an upload is removed."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": IRIS_1.read_bytes()[:1000], "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    headers = [(b"authorization", client.headers["authorization"].encode())]
    asyncio.run(client.app(scope | {"headers": headers}, receive, send))  # type: ignore[arg-type,func-returns-value]
    assert sent[0]["status"] == 499
    assert not [*state_folder(folder).glob("staging/*")]
