"""A model's own settings: model.toml, and Triton's config.pbtxt where that lies beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.commands.status import state
from serving.engine.batching import Independence
from serving.errors import InvalidRequest
from serving.http_api.app import create_app
from serving.repository.model_settings import ModelSettings, read
from serving.repository.servers import Observer
from serving.repository.traffic import Latest, Traffic
from serving.settings import Settings
from tests.conftest import MODELS
from tests.drills.mixing_graphs import mixing

Wait = Callable[[Callable[[], bool]], None]

TRITON = """
name: "m"                    # what the file says itself is passed over
backend: "onnxruntime"
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
optimization { execution_accelerators { gpu_execution_accelerator : [ { name : "tensorrt" } ] } }
"""


@pytest.mark.parametrize(
    ("toml", "pbtxt", "due"),
    [
        (None, None, ModelSettings()),
        ("", TRITON, ModelSettings()),
        ("[batching]\nenabled = false", None, ModelSettings(off="switched off in model.toml")),
        ("[batching]\nallow_dynamic_quantization = true", None, ModelSettings(allow_dynamic_quantization=True)),
        (None, TRITON + "max_batch_size: 0", ModelSettings(off="max_batch_size is 0 in config.pbtxt")),
        ("[batching]\nenabled = true", "max_batch_size: 0", ModelSettings()),
        (None, TRITON + "max_batch_size: 8", ModelSettings(max_rows=8)),
        (
            None,
            "max_batch_size: 8 dynamic_batching { preferred_batch_size: [4, 8] max_queue_delay_microseconds: 500 }",
            ModelSettings(max_rows=8, max_delay_s=0.0005),
        ),
        (None, "instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_CPU } ]", ModelSettings(instances=3)),
        (None, "version_policy: { all {} }", ModelSettings(keep="all")),
        (None, "version_policy: { latest { num_versions: 3 } }", ModelSettings(keep=Latest(latest=3))),
        (None, "version_policy: { specific { versions: [1, 3] } }", ModelSettings(keep=("1", "3"))),
    ],
)
def test_what_the_files_say(tmp_path: Path, toml: str | None, pbtxt: str | None, due: ModelSettings) -> None:
    """Each file is read for what counts here; where both speak of batching, model.toml has the word."""
    write(tmp_path, toml, pbtxt)
    assert read(tmp_path) == due


def write(folder: Path, toml: str | None = None, pbtxt: str | None = None) -> None:
    for name, text in (("model.toml", toml), ("config.pbtxt", pbtxt)):
        if text is not None:
            (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("toml", "pbtxt", "said"),
    [
        ("[batching", None, "model.toml: is not TOML"),
        ("[batching]\nenable = true", None, "model.toml: batching.enable: there is no such setting"),
        ("[batching]\nenabled = 1", None, "model.toml: batching.enabled: should be a valid boolean"),
        (None, "max_batch_size: many", "config.pbtxt: 1:17"),
        (None, "max_batch_size: -1", "config.pbtxt: max_batch_size: should be 0 or more"),
        (None, "dynamic_batching { max_queue_delay_microseconds: 9000000 }", "max_queue_delay_microseconds"),
        (None, "instance_group [ { count: 1000 } ]", "instance_group"),
        (None, "version_policy { specific { versions: [0] } }", "version_policy.specific.versions"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, toml: str | None, pbtxt: str | None, said: str) -> None:
    """A file that can't be read is refused in words that name it and the field."""
    write(tmp_path, toml, pbtxt)
    with pytest.raises(InvalidRequest, match=said.replace(".", r"\.")):
        read(tmp_path)


def test_only_a_shared_scale_may_be_allowed() -> None:
    """An owner may allow dynamic quantisation, nothing else that mixes rows; off is off."""
    allowing = ModelSettings(allow_dynamic_quantization=True)
    scale = Independence(proved=False, quantised=True, reason="a scale")
    mixes = Independence(proved=False, reason="Softmax mixes")
    assert allowing.decide(scale).together
    assert not ModelSettings().decide(scale).together
    assert not allowing.decide(mixes).together
    off = ModelSettings(off="switched off").decide(Independence(proved=True))
    assert (off.together, off.reason) == (False, "switched off")


def test_versions_that_triton_would_load() -> None:
    """config.pbtxt's versions are kept, the highest of a list answers, and traffic.json has the last word."""
    listed = ModelSettings(keep=("1", "3"))
    assert listed.traffic(Traffic(), ["1", "3", "5"]).stable == "3"
    assert listed.traffic(Traffic(stable="1"), ["1", "3", "5"]).stable == "1"
    asked = Traffic(keep="all")
    assert listed.traffic(asked, ["1", "3", "5"]) == asked


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path, Path]]:
    folder, state_dir = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("state")
    shutil.copytree(MODELS / "iris", folder / "iris", ignore=shutil.ignore_patterns("*.json*"))
    (folder / "int8" / "1").mkdir(parents=True)
    (folder / "int8" / "1" / "model.onnx").write_bytes(mixing()["quantised_as_it_runs"].SerializeToString())
    (folder / "iris" / "model.toml").write_text("[batching]\nenabled = ")
    with TestClient(create_app(Settings(models=folder, state_dir=state_dir))) as client:
        yield client, folder, state_dir


def config(client: TestClient, name: str) -> Any:
    return client.get(f"/v2/models/{name}/config").json()


def replace(folder: Path, name: str, text: str) -> None:
    (folder / ".new").write_text(text)
    os.replace(folder / ".new", folder / name)


def test_settings_change_while_the_model_serves(
    served: tuple[TestClient, Path, Path], eventually: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    """A change is taken without a restart; a file that can't be read is a problem, and changes nothing that serves.

    A server that starts with such a file runs that model's requests alone.
    """
    client, folder, state_dir = served
    row = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
    assert config(client, "iris")["max_batch_size"] == 0
    assert "model.toml" in client.get("/v1/models").text
    replace(folder / "iris", "model.toml", "")
    eventually(lambda: config(client, "iris")["max_batch_size"] == 512)
    # What a worker serves and what it was told is wrong come as two messages.
    eventually(lambda: "model.toml" not in client.get("/v1/models").text)
    replace(folder / "iris", "config.pbtxt", "max_batch_size: 16 instance_group { count: 2 }")
    eventually(lambda: config(client, "iris")["max_batch_size"] == 16)
    assert config(client, "iris")["instance_group"][0]["count"] == 2
    replace(folder / "iris", "model.toml", "[batching]\nenabled = false")
    eventually(lambda: config(client, "iris")["max_batch_size"] == 0)
    eventually(
        lambda: "model.toml" in str(state(folder, state_dir, "iris", Observer(folder, state_dir).servers())["alone"])
    )
    assert client.post("/v1/models/iris:predict", json=row).status_code == 200
    replace(folder / "iris", "model.toml", "enabled")
    eventually(lambda: "is not TOML" in client.get("/v1/models").text)
    assert config(client, "iris")["max_batch_size"] == 0
    assert any("model.toml" in record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    (folder / "iris" / "model.toml").unlink()
    eventually(lambda: config(client, "iris")["max_batch_size"] == 16)
    assert client.post("/v1/models/iris:predict", json=row).status_code == 200


def test_an_owner_allows_a_shared_scale(served: tuple[TestClient, Path, Path], eventually: Wait) -> None:
    """A model that takes its scale over the batch runs together once its owner has said that it may."""
    client, folder, _ = served
    alone = config(client, "int8")
    assert alone["max_batch_size"] == 0
    assert "DynamicQuantizeLinear" in alone["parameters"]["batching"]["string_value"]
    replace(folder / "int8", "model.toml", "[batching]\nallow_dynamic_quantization = true")
    eventually(lambda: config(client, "int8")["max_batch_size"] == 512)
