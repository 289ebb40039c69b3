"""A version is published whole or not at all, under a number of its own, with what its publisher said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.deploy.publish import publish
from serving.errors import Conflict, InvalidRequest, NotReady
from serving.gate import gate
from serving.gate.gate import Gate
from serving.gate.report import GateRefused
from serving.gate.report import Report as Verdict
from serving.repository import manifest, state_directory
from serving.repository.repository import Contents, Repository
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS
from tests.drills.drill import Report
from tests.drills.publishing import publishing

IRIS_1, IRIS_2 = MODELS / "iris" / "1" / "model.onnx", MODELS / "iris" / "2" / "model.onnx"


def scan(root: Path) -> Contents:
    return Repository(root, TrafficStore(root).read).scan()


def with_external_data(folder: Path, location: str = "weights/w.bin", rows: int = 4) -> Path:
    """Write a linear model whose weights lie in a file beside it."""
    weights = np.ones((rows, 2), dtype=np.float32)
    tensor = numpy_helper.from_array(weights, "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(weights.nbytes))):
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "linear.onnx"
    path.write_bytes(model.SerializeToString())
    if not location.startswith(("/", "..")):
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        (folder / location).write_bytes(weights.tobytes())
    return path


def test_publish_makes_a_version_that_the_scan_finds(tmp_path: Path, examiner: Gate) -> None:
    """The first version is 1, the next 2; both are whole, say who and why, and carry the gate's report."""
    first = publish(tmp_path, "iris", IRIS_1, note="first", who="ana", examiner=examiner)
    second = publish(tmp_path, "iris", IRIS_2, examiner=examiner)
    assert (first.version, second.version) == ("1", "2")
    assert [(f.name, f.version) for f in scan(tmp_path).found] == [("iris", "1"), ("iris", "2")]
    assert scan(tmp_path).problems == ()
    declared = manifest.read(tmp_path / "iris" / "1")
    assert declared is not None
    assert (declared.note, declared.who) == ("first", "ana")
    assert json.loads((tmp_path / "iris" / "2" / "gate.json").read_text())["ok"] is True
    assert second.report.beside is not None, "it is measured beside the version that served before"
    place = state_directory.state_folder(tmp_path)
    assert gate.verdict(place, declared.content) == first.report
    assert list((place / "staging").iterdir()) == []


def test_the_same_bytes_are_not_published_twice(tmp_path: Path, examiner: Gate) -> None:
    """Whoever repeats a publication, not knowing whether it succeeded, gets the version that is there."""
    assert publish(tmp_path, "iris", IRIS_1, examiner=examiner).new
    again = publish(tmp_path, "iris", IRIS_1, examiner=examiner)
    assert (again.version, again.new) == ("1", False)
    assert publish(tmp_path, "iris", IRIS_1, version="1", examiner=examiner).new is False
    with pytest.raises(Conflict, match="never changes"):
        publish(tmp_path, "iris", IRIS_2, version="1", examiner=examiner)
    assert publish(tmp_path, "iris", IRIS_2, version="7", examiner=examiner).version == "7"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a\0b", "x" * 129, "é", "-x"])
def test_a_name_that_is_none_touches_no_path(tmp_path: Path, examiner: Gate, name: str) -> None:
    """Names are looked at before the disk is."""
    with pytest.raises(InvalidRequest, match="no model name"):
        publish(tmp_path / "models", name, IRIS_1, examiner=examiner)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["0", "01", "-1", "1/../2", "latest", "9" * 19])
def test_a_version_that_is_none_is_refused(tmp_path: Path, examiner: Gate, version: str) -> None:
    """A version is a whole number from 1."""
    with pytest.raises(InvalidRequest, match="no version"):
        publish(tmp_path, "iris", IRIS_1, version=version, examiner=examiner)


def test_external_data_travels(tmp_path: Path, examiner: Gate) -> None:
    """Files that the graph names come along, by their own paths, and are in the manifest; others do not."""
    source = with_external_data(tmp_path / "made")
    (tmp_path / "made" / "secret.txt").write_text("not part of the model")
    publish(tmp_path / "models", "linear", source, examiner=examiner)
    folder = tmp_path / "models" / "linear" / "1"
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == ["gate.json", "manifest.json", "model.onnx", "weights/w.bin"]
    assert [f.name for f in scan(tmp_path / "models").found] == ["linear"]
    (folder / "weights" / "w.bin").write_bytes(b"\0" * 32)
    (problem,) = scan(tmp_path / "models").problems
    assert "SHA-256" in problem.reason


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.bin", "a/../../w.bin", "./w.bin"])
def test_external_data_stays_in_its_folder(tmp_path: Path, examiner: Gate, location: str) -> None:
    """A graph that names a file elsewhere is refused before that file is opened."""
    source = with_external_data(tmp_path / "made" / "deep", location)
    (tmp_path / "made" / "w.bin").write_bytes(b"\0" * 32)
    with pytest.raises(GateRefused, match="inside the model's own folder"):
        publish(tmp_path / "models", "linear", source, examiner=examiner)
    assert scan(tmp_path / "models").found == ()


def test_external_data_is_no_link(tmp_path: Path, examiner: Gate) -> None:
    """A link in place of a weights file would publish whatever it points to."""
    source = with_external_data(tmp_path / "made")
    weights = tmp_path / "made" / "weights" / "w.bin"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GateRefused, match="link"):
        publish(tmp_path / "models", "linear", source, examiner=examiner)


def test_a_signature_is_embedded(tmp_path: Path, examiner: Gate) -> None:
    """`signature` gives a bare model names, or takes the place of its own; the graph stays as it is."""
    own = json.loads(onnx.load(str(IRIS_2)).metadata_props[0].value)
    own["description"] = "Which iris?"
    publish(tmp_path, "iris", IRIS_2, signature=json.dumps(own).encode(), examiner=examiner)
    written = onnx.load(str(tmp_path / "iris" / "1" / "model.onnx"))
    (entry,) = written.metadata_props
    assert json.loads(entry.value)["description"] == "Which iris?"
    assert written.graph == onnx.load(str(IRIS_2)).graph
    with pytest.raises(InvalidRequest, match="/inputs"):
        publish(tmp_path, "iris", IRIS_2, signature=b'{"layout": "round"}', examiner=examiner)


def test_breaking_changes_are_refused_unless_allowed(tmp_path: Path, examiner: Gate) -> None:
    """A version without a feature that callers send does not get in by accident, and nothing of it is left."""
    publish(tmp_path, "flower", IRIS_1, examiner=examiner)
    with pytest.raises(GateRefused, match="features are gone: sepal_length") as refused:
        publish(tmp_path, "flower", MODELS / "diabetes" / "1" / "model.onnx", examiner=examiner)
    assert refused.value.report.breaking
    assert os.listdir(tmp_path / "flower") == ["1"]
    allowed = publish(
        tmp_path, "flower", MODELS / "diabetes" / "1" / "model.onnx", allow_breaking=True, examiner=examiner
    )
    assert allowed.version == "2"
    assert allowed.report.breaking
    declared = manifest.read(tmp_path / "flower" / "2")
    assert declared is not None
    assert declared.allow_breaking, "a server elsewhere must know that it was meant so"


@pytest.mark.parametrize("other", ["iris", "diabetes"])
def test_the_first_version_of_two_publishers_decides_what_breaks(tmp_path: Path, examiner: Gate, other: str) -> None:
    """Who is overtaken while the gate examines is judged anew: against what answers by now, or is there already."""

    class Overtaken(Gate):
        def examine(self, folder: Path, **how: Any) -> Verdict:
            if not (tmp_path / "flower").exists():
                publish(tmp_path, "flower", MODELS / other / "1" / "model.onnx", examiner=examiner)
            return examiner.examine(folder, **how)

    if other == "iris":
        again = publish(tmp_path, "flower", IRIS_1, examiner=Overtaken())
        assert (again.version, again.new) == ("1", False)
    else:
        with pytest.raises(GateRefused, match="features are gone: age"):
            publish(tmp_path, "flower", IRIS_1, examiner=Overtaken())
    assert os.listdir(tmp_path / "flower") == ["1"]


def test_a_folder_is_not_published_and_its_file_is_asked_for(tmp_path: Path) -> None:
    """Who names the folder of a version hears that the file in it is wanted, not that there is none."""
    with pytest.raises(InvalidRequest, match="1 is a folder: name the ONNX file in it"):
        publish(tmp_path, "flower", IRIS_1.parent)


def test_publishers_at_once_get_different_numbers(tmp_path: Path) -> None:
    """Of several who publish the first version at the same time, each gets a number, and all are whole."""
    sources = []
    for index in range(4):
        proto = onnx.load(str(IRIS_1))
        proto.doc_string = str(index)
        sources.append(tmp_path / f"{index}.onnx")
        sources[-1].write_bytes(proto.SerializeToString())
    versions: list[str] = []
    threads = [
        threading.Thread(target=lambda s=source: versions.append(publish(tmp_path / "models", "iris", s).version))
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == ["1", "2", "3", "4"]
    assert len(scan(tmp_path / "models").found) == 4


def test_state_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies outside of the models, is the same however their path is written, and nobody else can slip theirs in."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "disk" / "models").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    place = state_directory.state_folder(tmp_path / "disk" / "models")
    assert place.parent == tmp_path
    assert place.stat().st_mode & 0o777 == 0o700
    assert state_directory.state_folder(tmp_path / "link" / "." / "models") == place
    assert state_directory.state_folders(tmp_path / "link" / "models") == [place]
    assert state_directory.state_folder(tmp_path / "disk") != place
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        state_directory.state_folder(tmp_path / "disk" / "models")
    with pytest.raises(OSError, match="lies in the models folder"):
        state_directory.state_folder(tmp_path / "disk", tmp_path / "disk" / "models" / "state")


@pytest.mark.skipif(os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev, reason="needs two file systems")
def test_a_version_is_staged_on_another_file_system(
    tmp_path: Path, examiner: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the next version come whole, with external data, and leave nothing else in the models folder."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        for rows in (4, 5):
            source = with_external_data(tmp_path / "work", rows=rows)
            publish(
                tmp_path / "models", "linear", source, examiner=examiner, state_dir=Path(other), allow_breaking=True
            )
        assert [(f.name, f.version) for f in scan(tmp_path / "models").found] == [("linear", "1"), ("linear", "2")]
        assert scan(tmp_path / "models").problems == ()
        assert sorted(os.listdir(tmp_path / "models" / "linear")) == ["1", "2", "history.jsonl", "traffic.json"]
        with pytest.raises(GateRefused):
            publish(tmp_path / "models", "new", tmp_path / "work" / "weights" / "w.bin", state_dir=Path(other))

        def full(*given: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("serving.deploy.publish.copied", full)
        with pytest.raises(NotReady, match="no space left on device"):
            publish(tmp_path / "models", "new", source, examiner=examiner, state_dir=Path(other))
        assert os.listdir(tmp_path / "models") == ["linear"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the library that strikes is compiled")
def test_a_publication_cut_off_anywhere_is_whole_or_not_there() -> None:
    """Short form of the drill: kills, full disks and failing calls at some of the steps."""
    report = Report()
    publishing(report, strikes=24)
    assert not report.broken()
