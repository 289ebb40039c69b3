"""What is kept of requests and answers, and what is not."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tritonclient.grpc as triton_grpc
from fastapi.testclient import TestClient
from pyarrow import parquet

from serving.capture.capture import column
from tests.conftest import MODELS, with_grpc

ROW = {"sepal_length": 5.125, "sepal_width": 3.5, "petal_length": 1.5, "petal_width": 0.25}
ROWS = [ROW, ROW | {"petal_length": 5.5, "petal_width": 2.25}]


SETTINGS = '[capture]\nshare = 1\n[privacy]\nsensitive = ["sepal_width"]\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests, so that the gate looks at it once."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris/2", folder / "iris/2")
    (folder / "iris/model.toml").write_text(SETTINGS)
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*/*") if path.is_file())


def kept(folder: Path, model: str) -> Any:
    return pa.concat_tables([parquet.read_table(file) for file in files(folder) if file.parent.parent.name == model])


def test_requests_and_answers_are_kept_but_for_what_is_sensitive(models: Path, tmp_path: Path) -> None:
    """Over HTTP and gRPC: a row for each that was sent, with what was answered; never a feature that is marked."""
    folder = tmp_path / "captured"
    app = with_grpc(models, capture_dir=folder, capture_share=0)
    with TestClient(app) as client:
        url = "/v1/models/iris:predict"
        answer = client.post(url, json={"instances": ROWS}, headers={"x-request-id": "two"}).json()
        client.post(url, json={"instances": [ROW]})
        client.post(url, json={"instances": [{}]})
        tensor = triton_grpc.InferInput("features", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.array([list(ROW.values())], np.float32))
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{app.state.serving.companion.port}") as asked:
            asked.infer("iris", [tensor], headers={"x-request-id": "grpc"})
    table = kept(folder, "iris")
    assert table.num_rows == 4
    assert {file.stat().st_mode & 0o777 for file in files(folder)} == {0o600}
    assert {file.parent.relative_to(folder).as_posix() for file in files(folder)} == {"iris/2"}
    assert [name for name in table.column_names if name.startswith("features.")] == [
        f"features.{name}" for name in ROW if name != "sepal_width"
    ]
    two = table.filter(pa.compute.equal(table["request_id"], "two")).to_pydict()
    assert two["row"] == [0, 1]
    assert two["features.petal_length"] == [1.5, 5.5]
    scores = [list(each["probabilities"].values()) for each in answer["predictions"]]
    assert np.allclose(two["outputs.probabilities"], scores, atol=1e-6)
    assert "grpc" in table["request_id"].to_pylist()
    facts = json.loads(table.schema.metadata[b"serving"])
    assert (facts["model"], facts["version"], facts["redacted"]) == ("iris", "2", ["sepal_width"])


def test_a_misspelt_sensitive_feature_keeps_nothing(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A name that no feature has would give away what it is to protect: nothing is kept, and the log says why."""
    (models / "iris/model.toml").write_text(SETTINGS.replace("width", "widht"))
    with TestClient(with_grpc(models, capture_dir=tmp_path / "captured")) as client:
        assert client.post("/v1/models/iris:predict", json={"instances": ROWS}).status_code == 200
    (models / "iris/model.toml").write_text(SETTINGS)
    assert not (tmp_path / "captured").exists()
    assert "sepal_widht" in caplog.text


def test_the_oldest_files_go_first_and_a_full_disk_is_a_warning(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All files together keep the bound; where none can be written, requests are answered and the log says so."""
    folder = tmp_path / "captured/iris/2"
    folder.mkdir(parents=True)
    for day in (1, 2, 3, 4):
        (folder / f"2020010{day}T000000.000000Z-old-1.parquet").write_bytes(bytes(500_000))
    ask = {"instances": ROWS}
    with TestClient(with_grpc(models, capture_dir=tmp_path / "captured", capture_max_bytes=1024 * 1024)) as client:
        client.post("/v1/models/iris:predict", json=ask)
    left = [file.name for file in files(tmp_path / "captured")]
    assert [name[:8] for name in left[:2]] == ["20200103", "20200104"]
    assert len(left) == 3
    (tmp_path / "full").write_text("no folder")  # nothing can be written below it
    app = with_grpc(models, capture_dir=tmp_path / "full")
    with TestClient(app) as client, caplog.at_level(logging.WARNING):
        assert client.post("/v1/models/iris:predict", json=ask).status_code == 200
    assert "1 requests were not captured: Not a directory" in caplog.text
    dropped = dict(
        re.findall(
            r'serving_capture_dropped_total{reason="(\w+)"} (\S+)', app.state.serving.metrics.render()[0].decode()
        )
    )
    assert dropped == {"behind": "0.0", "unwritable": "1.0"}


def test_columns_of_any_shape_are_what_was_sent() -> None:
    """Scalars, images, rows of differing lengths, texts: what is read back equals what was put in."""
    ragged = [np.arange(6).reshape(2, 3), np.arange(4).reshape(1, 4)]
    assert column(ragged, "INT64").to_pylist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2, 3]]
    deep = [np.arange(8, dtype=np.float32).reshape(2, 2, 2), np.zeros((1, 2, 2), np.float32)]
    assert column(deep, "FP32").to_pylist() == [*deep[0].tolist(), *deep[1].tolist()]
    assert column([np.array(["a", "ü"], object), np.array([""], object)], "BYTES").to_pylist() == ["a", "ü", ""]
    assert column([np.array([1.5], np.float16)], "FP16").to_pylist() == [1.5]
    assert column([np.zeros((0, 2))], "FP64").to_pylist() == []
