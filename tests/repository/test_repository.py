"""What is in the models folder and can't be served is said, by name, and the rest serves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from serving.errors import ModelInvalid
from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conftest import MODELS

ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good model, to be spoilt."""
    shutil.copytree(MODELS / "iris", tmp_path / "iris")
    return tmp_path


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_what_is_bad_is_named_and_the_rest_serves(folder: Path) -> None:
    """No ONNX, a truncated file, an absurd name, a half-copied version: each has its reason, and iris answers."""
    good = (MODELS / "diabetes" / "1" / "model.onnx").read_bytes()
    write(folder / "text" / "1" / "model.onnx", b"this is no model")
    write(folder / "cut" / "1" / "model.onnx", good[: len(good) // 2])
    write(folder / "sp ace\n" / "1" / "model.onnx", good)
    write(folder / "empty" / "readme.txt", b"")
    write(folder / "half" / "1" / "model.onnx", good)
    manifest = {"files": {"model.onnx": {"sha256": "0" * 64, "size": len(good)}}}
    write(folder / "half" / "1" / "manifest.json", json.dumps(manifest).encode())
    write(folder / "loose.onnx", good)
    with TestClient(create_app(Settings(models=folder))) as client:
        problems = {p["name"]: p["reason"] for p in client.get("/v1/models").json()["problems"]}
        assert set(problems) == {"text", "cut", "sp ace\\n", "empty", "half", "loose.onnx"}
        assert "SHA-256" in problems["half"]
        assert "loose/1/model.onnx" in problems["loose.onnx"]
        assert str(folder) not in json.dumps(problems)
        ready = client.get("/v2/health/ready")
        assert ready.status_code == 200
        assert "text 1" in ready.json()["not_served"]
        assert client.post("/v1/models/iris:predict", json=ROW).status_code == 200
        for name in ("text", "cut", "half"):
            answer = client.post(f"/v1/models/{name}:predict", json=ROW)
            assert answer.status_code == 503, answer.text
            assert problems[name] in answer.json()["error"]


def test_versions_named_by_the_time_serve_and_misnamed_ones_are_told(tmp_path: Path) -> None:
    """The time as a version serves, as with TF Serving; v3 and 0002 say how to be named; others are left alone."""
    iris = tmp_path / "iris"
    for version in ("1", "1709123456", "0002", "v3", "4.tmp"):
        shutil.copytree(MODELS / "iris" / "1", iris / version)
    write(iris / "assets" / "labels.txt", b"")
    (tmp_path / "lost+found").mkdir()
    with TestClient(create_app(Settings(models=tmp_path))) as client:
        assert client.post("/v1/models/iris:predict", json=ROW).json()["model_version"] == "1709123456"
        problems = {p["version"]: p["reason"] for p in client.get("/v1/models").json()["problems"]}
        assert set(problems) == {"0002", "v3"}
        assert "whole number" in problems["v3"]
        answer = client.post("/v1/models/iris/versions/v3:predict", json=ROW)
        assert (answer.status_code, "whole number" in answer.json()["error"]) == (503, True)
        made = client.get("/v1/repository/models/iris").json()
        assert made["versions"] == ["1", "1709123456"]


def test_strict_refuses(folder: Path) -> None:
    """Told to be strict, the application does not start, and says which model it is."""
    write(folder / "text" / "1" / "model.onnx", b"this is no model")
    app = create_app(Settings(models=folder, strict=True))
    with pytest.raises(ModelInvalid, match="text 1"), TestClient(app):
        pass


def test_roles_come_from_traffic_json(folder: Path) -> None:
    """`stable` decides who answers without a version; a file that can't be read is a problem, by its field."""
    write(folder / "iris" / "traffic.json", b'{"stable": "1", "labels": {"next": "2"}}')
    with TestClient(create_app(Settings(models=folder))) as client:
        assert client.post("/v1/models/iris:predict", json=ROW).json()["model_version"] == "1"
        assert client.post("/v1/models/iris/labels/next:predict", json=ROW).json()["model_version"] == "2"
    write(folder / "iris" / "traffic.json", b'{"stable": 1}')
    with TestClient(create_app(Settings(models=folder))) as client:
        (problem,) = client.get("/v1/models").json()["problems"]
        assert (problem["name"], "stable: should be" in problem["reason"]) == ("iris", True)


def test_a_signature_that_lies_is_refused(tmp_path: Path) -> None:
    """A file whose declared inputs are not those of its graph does not serve."""
    import onnx

    proto = onnx.load(str(MODELS / "iris" / "1" / "model.onnx"))
    for entry in proto.metadata_props:
        entry.value = entry.value.replace('"FP32"', '"FP64"')
    write(tmp_path / "liar" / "1" / "model.onnx", proto.SerializeToString())
    with TestClient(create_app(Settings(models=tmp_path))) as client:
        (problem,) = client.get("/v1/models").json()["problems"]
        assert "declares inputs" in problem["reason"]
