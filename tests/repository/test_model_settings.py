"""A model's own settings: model.toml, and Triton's config.pbtxt where that lies beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.commands.status import state
from serving.deploy.plan import Plan
from serving.engine import providers
from serving.engine.batching import Independence
from serving.engine.limits import CacheSize, Limits
from serving.engine.providers import Provider
from serving.errors import InvalidRequest
from serving.gate.report import Report
from serving.gate.settings_check import with_settings
from serving.http_api.app import create_app
from serving.repository.model_settings import ModelSettings, SettingsFiles, read
from serving.repository.servers import ServerMonitor
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


def own(**given: Any) -> ModelSettings:
    return ModelSettings(own=Limits(**given))


WHOLE = """
[batching]
max_batch_rows = 32
max_delay_ms = 2.5

[limits]
max_queued_rows = 100
deadline_s = 2
memory_bytes = 268435456

[execution]
instances = 2
threads = 3
warm_rows = 16

[[execution.providers]]
name = "CPUExecutionProvider"
options = { arena = 1, "exact" = true }

[cache]
entries = 1000

[access]
predict = ["ci", "jwt:alice"]
"""
ALL_OF_IT = own(
    max_batch_rows=32,
    max_delay=0.0025,
    max_queued_rows=100,
    deadline_s=2.0,
    memory_bytes=268435456,
    instances=2,
    threads=3,
    warm_rows=16,
    providers=(Provider(name="CPUExecutionProvider", options={"arena": 1, "exact": True}),),
    cache=CacheSize(entries=1000),
    callers=frozenset({"ci", "jwt:alice"}),
)
QUEUED = """
max_batch_size: 8
dynamic_batching { default_queue_policy { max_queue_size: 10 default_timeout_microseconds: 1500000 } }
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
parameters [ { key: "other" value: { string_value: "x" } } ]
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
        (None, TRITON + "max_batch_size: 8", own(max_batch_rows=8)),
        (
            None,
            "max_batch_size: 8 dynamic_batching { preferred_batch_size: [4, 8] max_queue_delay_microseconds: 500 }",
            own(max_batch_rows=8, max_delay=0.0005),
        ),
        (None, "instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_CPU } ]", own(instances=3)),
        (WHOLE, None, ALL_OF_IT),
        (WHOLE, QUEUED + "instance_group { count: 9 }", ALL_OF_IT),
        (None, QUEUED, own(max_batch_rows=8, max_delay=0.0, max_queued_rows=80, deadline_s=1.5, threads=2)),
        (
            None,
            "dynamic_batching { default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 } }",
            own(max_delay=0.0),
        ),
        ("[batching]\nmax_batch_rows = 4", "max_batch_size: 0", own(max_batch_rows=4)),
        ("[cache]\nbytes = 1000000", None, own(cache=CacheSize(bytes=1000000))),
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
        ("[limits]\ndeadline_s = 0", None, "model.toml: limits.deadline_s: should be greater than 0"),
        ("[limits]\ndeadline_s = '2'", None, "model.toml: limits.deadline_s: should be a valid number"),
        ("[execution]\nthreads = 1.5", None, "model.toml: execution.threads"),
        ("[execution]\ninstances = 65", None, "model.toml: execution.instances: should be less than or equal to 64"),
        ("[cache]", None, "model.toml: cache: exactly one of entries and bytes"),
        ("[cache]\nentries = 1\nbytes = 100000", None, "model.toml: cache: exactly one of entries and bytes"),
        ("[access]\npredict = []", None, "model.toml: access.predict"),
        ("keep = 2", None, "model.toml: keep: there is no such setting"),
        ("[[execution.providers]]\nname = 1", None, "model.toml: execution.providers.0.name"),
        (None, 'parameters { key: "intra_op_thread_count" value: { string_value: "all" } }', "intra_op_thread_count"),
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


CUDA = '[[execution.providers]]\nname = "CUDAExecutionProvider"\n'


@pytest.mark.parametrize(
    ("toml", "there", "said"),
    [
        (CUDA, ["CPUExecutionProvider"], "CUDAExecutionProvider is not installed: it comes with onnxruntime-gpu"),
        (CUDA.replace("CUDA", "OpenVINO"), [], "OpenVINO.* it comes with onnxruntime-openvino"),
        (CUDA.replace("CUDA", "Cuda"), ["CPUExecutionProvider"], "Cuda.* installed has CPUExecutionProvider, and not"),
        (CUDA + "options = { trt_extra_plugin_lib_paths = 'x.so' }", ["CUDAExecutionProvider"], "trt_extra_plugin_lib"),
        (CUDA + "options = { gpu_external_alloc = 1 }", ["CUDAExecutionProvider"], "gpu_external_alloc"),
        (CUDA + "options = { user_compute_stream = 1 }", ["CUDAExecutionProvider"], "user_compute_stream"),
        (CUDA + "options = { backend_Path = 'x.so' }", ["CUDAExecutionProvider"], "backend_Path"),
        (CUDA + "options = { device_id = 0, trt_profile_min_shapes = '' }", ["CUDAExecutionProvider"], None),
    ],
)
def test_a_provider_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toml: str, there: list[str], said: str | None
) -> None:
    """One that is not installed is refused with the package that brings it; so is an option that would load a file."""
    monkeypatch.setattr(providers, "installed", lambda: frozenset(there))
    write(tmp_path, toml)
    if said is None:
        (found,) = read(tmp_path).own.providers or ()
        assert found == Provider(name="CUDAExecutionProvider", options={"device_id": 0, "trt_profile_min_shapes": ""})
    else:
        with pytest.raises(InvalidRequest, match="execution.providers: .*" + said):
            read(tmp_path)


def test_workers_are_told_all_of_it() -> None:
    """What was set reaches the workers as it was set."""
    batching = ALL_OF_IT.decide(Independence(proved=True))
    plan = Plan("m", 1, Traffic(), (), (), {"1": batching})
    assert Plan.read(json.loads(json.dumps(plan.dump()))) == plan
    assert Limits().of(batching.own).callers == {"ci", "jwt:alice"}


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("[batching]\nenable = 1", None),
        ("[batching", None),
        ("[batching]\nenable = 1\n[access]\npredict = ['ci']", {"ci"}),
        ("[access]\npredict = ['ci'", set()),
        ("[access]\nkeys = ['ci']", set()),
    ],
)
def test_who_may_predict_is_not_lost_with_the_rest(tmp_path: Path, text: str, due: set[str] | None) -> None:
    """Where a server starts with a file that can't be read, it opens no model that the file may close."""
    (tmp_path / "m").mkdir()
    write(tmp_path / "m", text)
    found, problems = SettingsFiles(tmp_path).look(["m"])
    assert found["m"].own.callers == due
    assert problems


def test_settings_are_shown_with_a_version(tmp_path: Path) -> None:
    """The gate's report says what a model's settings are, or what is wrong with them, and refuses nothing for it."""
    report = Report(ok=True, content="", runtime="", time=0.0)
    write(tmp_path, WHOLE)
    (check,) = with_settings(report, tmp_path).checks
    assert check.outcome == "passed"
    for said in ("max_batch_rows 32", "deadline_s 2", "predict ci and jwt:alice", "cache 1000 entries", "threads 3"):
        assert said in check.detail
    write(tmp_path, "[batch]")
    found = with_settings(report, tmp_path)
    assert (found.ok, found.checks[0].outcome) == (True, "warned")
    assert "model.toml: batch: there is no such setting" in found.checks[0].detail


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
    shown = state(folder, state_dir, "iris", ServerMonitor(folder, state_dir).servers())["settings"]
    assert shown == {"max_batch_rows": 16, "instances": 2}
    replace(folder / "iris", "model.toml", "[batching]\nenabled = false")
    eventually(lambda: config(client, "iris")["max_batch_size"] == 0)
    eventually(
        lambda: (
            "model.toml" in str(state(folder, state_dir, "iris", ServerMonitor(folder, state_dir).servers())["alone"])
        )
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


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDA")
def test_a_provider_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Wait) -> None:
    """One that has no driver is named, and changes nothing that serves; where nothing does, the processor serves."""
    monkeypatch.setattr(providers, "installed", lambda: frozenset({"CUDAExecutionProvider"}))
    models = tmp_path / "models"
    shutil.copytree(MODELS / "iris" / "1", models / "iris" / "1")
    write(models / "iris", CUDA)
    row = {"instances": [[5.1, 3.5, 1.4, 0.2]]}

    def said() -> str:
        return str(client.get("/v1/models").json()["problems"])

    with TestClient(create_app(Settings(models=models, state_dir=tmp_path / "state"))) as client:
        eventually(lambda: client.post("/v1/models/iris:predict", json=row).status_code == 200)
        assert "CUDAExecutionProvider does not start on this machine" in said()
        replace(models / "iris", "model.toml", "[execution]\nthreads = 3")
        eventually(lambda: said() == "[]")
        eventually(lambda: config(client, "iris")["parameters"]["intra_op_thread_count"]["string_value"] == "3")
        replace(models / "iris", "model.toml", CUDA)
        eventually(lambda: "CUDAExecutionProvider does not start on this machine" in said())
        assert client.post("/v1/models/iris:predict", json=row).status_code == 200
        assert config(client, "iris")["parameters"]["intra_op_thread_count"]["string_value"] == "3"
