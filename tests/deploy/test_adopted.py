"""Folders that hold a model itself are told from a models folder, and become one beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.deploy.adopted import adopted, bare, take, taken_from
from serving.engine.session import OnnxSession
from serving.errors import InvalidRequest, ModelInvalid
from serving.repository import manifest
from tests.conftest import MODELS
from tests.http_api.test_platforms import columns, logged


def names(model: Path) -> list[str]:
    return [feature.name for feature in OnnxSession(model).signature.features]


def test_a_models_folder_stays_what_it_is(tmp_path: Path) -> None:
    """Only what is one model, or holds such and nothing else, is adopted: else deployments would not be seen."""
    assert bare(MODELS) == {}
    logged(tmp_path / "a", columns("width", "height"))
    assert bare(tmp_path) == {"a": tmp_path / "a"}
    assert bare(tmp_path / "a") == {"model": tmp_path / "a"}
    logged(tmp_path / "b" / "1", columns("width", "height"))
    assert bare(tmp_path) == {}
    with adopted(tmp_path, by_request=False) as folder:
        assert folder is None


def test_what_mlflow_says_of_inputs_is_taken_where_it_fits(tmp_path: Path) -> None:
    """Its names are the features; where they are not the graph's in number, or of a type that nobody can send, the
    graph's own are."""
    logged(tmp_path / "fits", columns("width", "height"))
    logged(tmp_path / "other", columns("width"))
    logged(tmp_path / "dated", [*columns("width"), {"type": "datetime", "name": "at"}])
    (logged(tmp_path / "broken", []) / "MLmodel").write_text("signature: [")
    (logged(tmp_path / "deep", []) / "MLmodel").write_text("signature: " + 10_000 * "[")
    with adopted(tmp_path, by_request=False) as folder:
        assert folder is not None
        found = {name: names(folder / name / "1" / "model.onnx") for name in bare(tmp_path)}
        for name in found:
            manifest.check(folder / name / "1", manifest.read(folder / name / "1"), manifest.Hashes())  # type: ignore[arg-type]
    assert found.pop("fits") == ["width", "height"]
    assert len({*map(tuple, found.values())}) == 1
    assert not {"width", "height", "at"} & {*found["other"]}
    assert not folder.exists()


def test_models_are_taken_from_below_one_folder(tmp_path: Path) -> None:
    """An archive's model is found at any depth; links that lead out of the folder are refused."""
    logged(tmp_path / "root" / "a" / "deep" / "1", [])
    secret = logged(tmp_path / "secret", [])
    (tmp_path / "root" / "b").mkdir()
    (tmp_path / "root" / "b" / "model.onnx").symlink_to(secret / "model.onnx")
    with adopted(tmp_path / "root", by_request=True) as folder:
        assert folder is not None
        take(folder, "x", str(tmp_path / "root" / "a"))
        assert taken_from(folder, "x") == str(tmp_path / "root" / "a")
        with pytest.raises(InvalidRequest, match="outside"):
            take(folder, "y", str(tmp_path / "root" / "b"))
        with pytest.raises(InvalidRequest, match="outside"):
            take(folder, "y", str(tmp_path / "root" / ".." / "secret"))
        with pytest.raises(ModelInvalid, match="0 files"):
            take(folder, "y", str(tmp_path / "root" / "nothing"))
        assert not (folder / "y").exists()
