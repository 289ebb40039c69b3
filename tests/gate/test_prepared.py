"""Large models leave a prepared form behind that workers map; it is used only where it is exactly what was written."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.engine.batching import RULES, Independence
from serving.engine.session import OnnxSession
from serving.gate import client, gate, prepared
from serving.gate.gate import Gate
from serving.gate.report import PREPARED, Check, Report
from serving.repository import manifest
from serving.repository.manifest import Hashes, Manifest
from serving.repository.repository import ModelVersion, Repository
from serving.repository.traffic import Traffic
from tests.conftest import MODELS

WIDTH = 1100


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, examiner: Gate) -> tuple[Path, Path, Manifest]:
    """A model of 5 MB in a folder, and the state with its prepared form."""
    folder = tmp_path_factory.mktemp("dense")
    weights = numpy_helper.from_array(np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", WIDTH])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"made": "here"})
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    state = tmp_path_factory.mktemp("state")
    declared = manifest.of(folder, Hashes())
    with prepared.written(state, declared) as into:
        report = examiner.examine(folder, prepare_in=into)
    assert report.ok, report.reasons
    return folder, state, declared


@pytest.fixture
def copied(made: tuple[Path, Path, Manifest], tmp_path: Path) -> tuple[Path, Path, Manifest]:
    """The same, to be spoilt."""
    folder, state, declared = made
    fresh = tmp_path / "state"
    fresh.mkdir()
    with prepared.written(fresh, declared) as into:
        assert into is not None
        source = prepared.locate(state, declared.content)
        assert source is not None
        for path in source.parent.iterdir():
            if path.name != "manifest.json":
                shutil.copy(path, into)
    return folder, fresh, declared


def test_it_answers_as_the_model_does(made: tuple[Path, Path, Manifest]) -> None:
    """Same signature, same answers; its weights lie in a file of their own, to be mapped."""
    folder, state, declared = made
    path = prepared.locate(state, declared.content)
    assert path is not None
    assert path.stat().st_size < 10_000
    plain, form = OnnxSession(folder / "model.onnx"), OnnxSession(path, prepared=True)
    rows = (np.random.default_rng(1).standard_normal((7, WIDTH), np.float32),)
    assert form.signature == plain.signature
    assert np.allclose(form.run(rows)[0], plain.run(rows)[0], 1e-5, 1e-5)


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: spoil(folder / "weights.bin"),
        lambda folder: (folder / "weights.bin").unlink(),
        lambda folder: os.truncate(folder / "weights.bin", 1000),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "model.onnx").rename(folder / "other"),
        lambda folder: (
            (folder / "weights.bin").rename(folder / "w"),
            (folder / "weights.bin").symlink_to(folder / "w"),
        ),
    ],
    ids=["changed", "gone", "short", "index", "renamed", "link"],
)
def test_one_that_was_touched_is_not_used(copied: tuple[Path, Path, Manifest], harm: Callable[[Path], object]) -> None:
    """Any change to its files since they were hashed makes it none, and removes it."""
    _, state, declared = copied
    path = prepared.locate(state, declared.content)
    assert path is not None
    harm(path.parent)
    assert prepared.locate(state, declared.content) is None
    assert not path.parent.exists()


def test_one_that_is_lost_is_written_anew(copied: tuple[Path, Path, Manifest]) -> None:
    """A server that finds the verdict on a version, and not the prepared form that it tells of, examines it again."""
    folder, state, declared = copied
    report = Report(
        ok=True,
        content=declared.content,
        runtime=gate.runtime(),
        time=0.0,
        checks=(Check(name=PREPARED, outcome="passed"),),
        independence=Independence(proved=True, rules=RULES),
    )
    gate.keep(state, report)
    asked = client.GateClient(Repository(folder, lambda name: Traffic()), state_dir=state)
    version = ModelVersion("dense", "1", folder / "model.onnx", declared.content)
    assert asked.known(version) == report
    (place,) = (state / "cache").iterdir()
    shutil.rmtree(place)
    assert asked.known(version) is None


def test_it_belongs_to_this_processor_and_runtime(
    made: tuple[Path, Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another onnxruntime or another processor has another key."""
    _, state, declared = made
    assert prepared.locate(state, declared.content) is not None
    monkeypatch.setattr(prepared, "runtime", lambda: "0.0")
    assert prepared.locate(state, declared.content) is None
    monkeypatch.undo()
    monkeypatch.setattr(prepared, "processor", lambda: "other")
    assert prepared.locate(state, declared.content) is None


@pytest.mark.parametrize("operator", ["Neg", "Log"])
def test_answers_that_are_no_numbers_prove_nothing(operator: str, tmp_path: Path, examiner: Gate) -> None:
    """A form is used where some answers were numbers and the same: of a model that only gives NaN there is none."""
    folder, into = tmp_path / "model", tmp_path / "form"
    folder.mkdir()
    into.mkdir()
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["n"]),
        helper.make_node(operator, ["n"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ports[:1], ports[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    report = examiner.examine(folder, prepare_in=into)
    assert report.ok, report.reasons
    assert (operator == "Neg") == any("answers are the model's" in check.detail for check in report.checks)


def test_small_models_skip_it(tmp_path: Path) -> None:
    """A model that loads in milliseconds gets no prepared form."""
    with prepared.written(tmp_path, manifest.of(MODELS / "iris" / "2", Hashes())) as into:
        assert into is None
    assert list(tmp_path.iterdir()) == []


def test_forms_of_what_is_gone_are_swept(copied: tuple[Path, Path, Manifest]) -> None:
    """The cache holds the forms of what is on disk; a young one stays, for its version may be on the way."""
    _, state, declared = copied
    path = prepared.locate(state, declared.content)
    assert path is not None
    client.sweep(state / "cache", [])
    assert path.exists()
    old = time.time() - 7200
    os.utime(path.parent, (old, old))
    client.sweep(state / "cache", [path.parent.name])
    assert path.exists()
    client.sweep(state / "cache", [])
    assert not path.exists()


def test_a_server_sweeps_when_its_gate_has_nothing_to_do(
    tmp_path: Path,
) -> None:
    """Once the gate's process rests, what is kept of versions that are not on disk any more goes, and nothing else."""
    shutil.copytree(MODELS / "iris" / "2", tmp_path / "models" / "iris" / "2")
    left = tmp_path / "state" / "cache" / "of-a-version-that-went"
    verdict = tmp_path / "state" / "reports" / "of-a-version-that-went.json"
    left.mkdir(parents=True)
    verdict.parent.mkdir()
    verdict.touch()
    os.utime(left, (1, 1))
    os.utime(verdict, (1, 1))
    repository = Repository(tmp_path / "models", lambda name: Traffic())
    (found,) = repository.scan().found
    asked = client.GateClient(repository, state_dir=tmp_path / "state")
    report = asked.examine(found, None)
    assert report.ok
    kept = verdict.with_name(f"{report.content}.json")
    os.utime(kept, (1, 1))
    asked.rest()
    assert not left.exists()
    assert not verdict.exists()
    assert kept.exists()


def mappings(file: Path) -> int:
    """Count how often this process maps a file."""
    return Path("/proc/self/maps").read_text().count(str(file))


def test_its_pages_go_with_its_last_user(made: tuple[Path, Path, Manifest]) -> None:
    """Where two sessions map it, the end of one takes nothing from the other; with both gone the file is unmapped."""
    _, state, declared = made
    path = prepared.locate(state, declared.content)
    assert path is not None
    weights = path.with_name("weights.bin")
    one, other = OnnxSession(path, prepared=True), OnnxSession(path, prepared=True)
    rows = (np.random.default_rng(2).standard_normal((3, WIDTH), np.float32),)
    expected = other.run(rows)[0]
    both = mappings(weights)
    del one
    assert 0 < mappings(weights) < both
    assert np.array_equal(other.run(rows)[0], expected)
    del other
    assert mappings(weights) == 0
