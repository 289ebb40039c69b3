"""A folder without a manifest is served once, and only when it is whole."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import onnx
import pytest

from serving.repository import copy_stability, manifest, onnx_file
from serving.repository.copy_stability import CopyStability, Files
from serving.repository.repository import Contents, Repository
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS
from tests.deploy.test_publish import with_external_data
from tests.drills.drill import Report
from tests.drills.slow_copies import slow_copies

IRIS = MODELS / "iris" / "1" / "model.onnx"
FILE = ("model.onnx", 10, 1, 1, 1)


@pytest.mark.parametrize(
    ("first", "now", "so"),
    [
        ((0.0, (FILE,)), (1.0, (FILE,)), True),
        ((0.0, (FILE,)), (0.9, (FILE,)), False),
        ((0.0, (FILE,)), (9.0, (("model.onnx", 11, 1, 1, 1),)), False),
        ((0.0, (FILE,)), (9.0, (("model.onnx", 10, 2, 1, 1),)), False),
        ((0.0, (FILE,)), (9.0, (("model.onnx", 10, 1, 1, 2),)), False),
        ((0.0, ()), (9.0, (FILE,)), False),
        ((0.0, (FILE,)), (9.0, (FILE, ("w.bin", 1, 1, 1, 3))), False),
    ],
)
def test_settled_is_unchanged_for_long_enough(first: tuple[float, Files], now: tuple[float, Files], so: bool) -> None:
    """Size, time, inode and the set of files must be the same over the settling time."""
    stability = CopyStability(1.0)
    assert [stability.settled(IRIS, files, at) for at, files in (first, now)] == [False, so]


def test_temporary_names_are_not_looked_at(tmp_path: Path) -> None:
    """rsync's, browsers' and editors' names for unfinished files do not count."""
    for name in (".model.onnx.aB3xYz", "model.onnx.part", "model.onnx~", "model.onnx.tmp", ".~tmp~/model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert copy_stability.snapshot(tmp_path) == ()


def test_no_prefix_of_a_file_is_whole(tmp_path: Path) -> None:
    """However far a copy has come, it is not taken for the model: bar a cut right after a last optional entry."""
    content = IRIS.read_bytes()
    path = tmp_path / "model.onnx"
    passed = 0
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        try:
            onnx_file.inspect(path)
            passed += 1
        except onnx_file.NotWhole:
            pass
    assert passed <= 1
    path.write_bytes(content)
    assert onnx_file.inspect(path).externals == []


def test_the_walk_finds_external_data_wherever_it_is(tmp_path: Path) -> None:
    """In initializers, constants, and graphs inside of nodes: each named file, with the size that it needs."""
    from onnx import TensorProto, helper

    def outside(name: str, offset: int) -> onnx.TensorProto:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", f"{name}.bin"), ("offset", str(offset)), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        return tensor

    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=outside("inner", 8))], "inner", [], [])
    graph = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)],
        "outer",
        [],
        [],
        [outside("outer", 0)],
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    found = {(external.location, external.end) for external in onnx_file.inspect(path).externals}
    assert found == {("inner.bin", 24), ("outer.bin", 16)}


def test_a_slow_copy_is_found_once_when_whole(tmp_path: Path) -> None:
    """Looks during a slow copy, external data last, find nothing; those after it find one and the same version."""
    source = with_external_data(tmp_path / "made", "w.bin", rows=4096)
    target = tmp_path / "models" / "linear" / "1"
    target.mkdir(parents=True)
    repository = Repository(tmp_path / "models", TrafficStore(tmp_path / "models").read, settle_s=0.2)
    repository.scan()
    done = threading.Event()

    def copy() -> None:
        for name, to in (("linear.onnx", "model.onnx"), ("w.bin", "w.bin")):
            with (source.parent / name).open("rb") as read, (target / to).open("wb") as write:
                while part := read.read(2048):
                    write.write(part)
                    write.flush()
                    done.wait(0.02)
        done.set()

    copying = threading.Thread(target=copy)
    copying.start()
    early = 0
    while not done.is_set():
        early += len(repository.scan().found) if not done.is_set() else 0
        done.wait(0.01)
    copying.join()
    assert early == 0
    while not (found := repository.scan().found):
        done.clear()
        done.wait(0.05)
    assert [item.content for item in found] == [manifest.of(target, manifest.Hashes()).content]
    assert repository.scan().found == found


def test_replacing_a_plain_file_keeps_the_old_until_the_new_is_whole(tmp_path: Path) -> None:
    """While a served file is overwritten, the look says what it said before; then the new content."""
    target = tmp_path / "iris" / "1"
    target.mkdir(parents=True)
    shutil.copy(IRIS, target)
    repository = Repository(tmp_path, TrafficStore(tmp_path).read, settle_s=0.2)
    (before,) = repository.scan().found
    new = (MODELS / "iris" / "2" / "model.onnx").read_bytes()
    (target / "model.onnx").write_bytes(new[:100])
    assert repository.scan().found == (before,)
    (target / "model.onnx").write_bytes(new)
    assert repository.scan().found == (before,)

    def contents() -> Contents:
        threading.Event().wait(0.05)
        return repository.scan()

    for _ in range(100):
        if contents().found != (before,):
            break
    (after,) = repository.scan().found
    assert after.content != before.content


def test_a_running_server_takes_a_slow_copy_once() -> None:
    """Short form of the drill: a version copied in slowly is examined once, serves when whole, and nothing fails."""
    report = Report()
    slow_copies(report, copies=1, seconds=1.0)
    assert not report.broken()
