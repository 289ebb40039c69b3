"""Each thing that happens to the folder, and to what is served of it, is one line that says who did what."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serving.deploy.delete import delete
from serving.deploy.deployment_log import DeploymentLog
from serving.deploy.plan import Plan
from serving.repository.manifest import Entry, Manifest
from serving.repository.repository import Repository
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import promote
from tests.conftest import MODELS


class Kept:
    """A log of a folder, and the lines that came of the last step."""

    def __init__(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.store = TrafficStore(root)
        self.document = self.store.import_edit
        self.repository = Repository(root, lambda name: self.document(name), settle_s=0)  # noqa: PLW0108  it is replaced
        self._log = DeploymentLog(self.repository, self.store)
        self._caplog = caplog
        caplog.set_level("INFO", "serving.deployment")

    def lines(self, *served: str) -> list[tuple[str, str]]:
        """Look at the folder, serve these versions of iris, and return what was logged."""
        self._caplog.clear()
        contents = self.repository.scan()
        contents = self.repository.scan()  # a version without a manifest is taken at the second look
        self._log.scanned(contents)
        found = tuple(item for item in contents.found if item.version in served)
        self._log.served({"iris": Plan("iris", 1, self.store.read("iris"), found, (), {})})
        return [(record.levelname, record.getMessage()) for record in self._caplog.records]


@pytest.fixture
def kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Kept:
    shutil.copytree(MODELS / "iris" / "1", tmp_path / "iris" / "1")
    made = Kept(tmp_path, caplog)
    assert made.lines("1") == [], "what is there at the start is announced otherwise"
    return made


def test_versions_that_come_break_and_go(kept: Kept, tmp_path: Path) -> None:
    """A publication names who and why, a copy is one, damage and loss are warnings, and nothing is said twice."""
    iris = tmp_path / "iris"
    shutil.copytree(iris / "1", iris / "2")
    declared = Manifest.model_validate_json((iris / "1" / "manifest.json").read_bytes())
    published = declared.model_copy(update={"who": "ann", "note": "more\nrows", "time": 1.0})
    (iris / "2" / "manifest.json").write_bytes(published.text())
    assert kept.lines("1", "2") == [
        ("INFO", r"iris 2 is published by ann: more\nrows"),
        ("INFO", "iris 2 is loaded in every worker"),
    ]
    shutil.copytree(iris / "1", iris / "3", ignore=shutil.ignore_patterns("manifest.json"))
    assert kept.lines("1", "2") == [("INFO", "iris 3 has come into the folder")]
    assert kept.lines("1", "2") == []
    broken = published.model_copy(update={"files": {"model.onnx": Entry(sha256="0" * 64, size=1)}})
    (iris / "2" / "manifest.json").write_bytes(broken.text())
    (level, line), unloaded = kept.lines("1", "2")
    assert (level, "iris 2: model.onnx has" in line) == ("WARNING", True)
    assert unloaded == ("INFO", "iris 2 is unloaded")
    (iris / "2" / "manifest.json").write_bytes(published.text())
    assert kept.lines("1", "2") == [("INFO", "iris 2 is whole now"), ("INFO", "iris 2 is loaded in every worker")]
    shutil.rmtree(iris / "2")
    assert kept.lines("1") == [("WARNING", "iris 2 has vanished from the folder"), ("INFO", "iris 2 is unloaded")]
    assert kept.lines() == [("WARNING", "iris is unloaded: nothing of it can be served any more")]


def test_a_deletion_that_was_asked_for_warns_nobody(kept: Kept, tmp_path: Path) -> None:
    """What `serving delete` removes has not vanished."""
    shutil.copytree(tmp_path / "iris" / "1", tmp_path / "iris" / "2")
    kept.lines("1", "2")
    delete(kept.store, "iris", "1", who="ann")
    assert kept.lines("2")[0] == ("INFO", "iris 1 is deleted from the folder")


def test_changes_of_traffic(kept: Kept) -> None:
    """Each change is a line with who and why, also of several at once, and where its history is not written yet."""
    for version, why in (("1", "ticket 12"), ("2", "")):
        kept.store.change("iris", promote(version, available="123"), who="ann", what=f"promote {version}", why=why)
    assert kept.lines("1") == [
        ("INFO", "iris: promote 1: version 1 is stable, was the highest; ticket 12 (generation 1, by ann)"),
        ("INFO", "iris: promote 2: version 2 is stable, was 1 (generation 2, by ann)"),
    ]
    kept.store.change("iris", promote("3", available="123"), who="ann", what="promote 3")
    history = kept.store.root / "iris" / "history.jsonl"
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:2]))
    kept.document = kept.store.read  # as where the folder can't be written
    assert kept.lines("1") == [("INFO", "iris: version 3 is stable, was 2 (generation 3)")]
