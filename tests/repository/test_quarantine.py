"""Versions that ended workers serve no more, until their file is replaced."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from serving.command_line import app
from serving.repository.quarantine import Quarantine, select_culprit
from serving.repository.state_directory import state_folder
from tests.conftest import MODELS, running
from tests.drills.steady import ROW
from tests.drills.workers import copied, default_version

Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models folder with the two versions of iris."""
    return copied(tmp_path)


def test_the_guilty_one_is_told_from_those_that_ran_beside_it() -> None:
    """Two deaths condemn a version; where another ran as often beside it, it takes four."""
    a, b = ("a", "1"), ("b", "1")
    assert select_culprit(Counter({a: 1}), [a]) is None
    assert select_culprit(Counter({a: 2}), [a]) == a
    assert select_culprit(Counter({a: 2, b: 1}), [a, b]) == a
    assert select_culprit(Counter({a: 2, b: 2}), [a, b]) is None
    assert select_culprit(Counter({a: 4, b: 4}), [a, b]) in (a, b)
    assert select_culprit(Counter(), []) is None


def test_a_quarantine_ends_with_the_file_that_earned_it(folder: Path) -> None:
    """A version is held back across restarts, and let go when its file is replaced; a broken record holds nothing."""
    Quarantine(folder).add("iris", "2", "it ended two workers")
    assert [(case.name, case.version) for case in Quarantine(folder).cases()] == [("iris", "2")]
    shutil.copy(MODELS / "iris" / "1" / "model.onnx", folder / "iris" / "2" / "model.onnx")
    assert Quarantine(folder).cases() == []
    (state_folder(folder) / "quarantine.json").write_text("{")
    assert Quarantine(folder).cases() == []


def test_a_quarantined_version_is_a_problem_with_its_reason(folder: Path) -> None:
    """What is in quarantine at the start is not loaded, and asking for it says why."""
    Quarantine(folder).add("iris", "2", "it ended two workers")
    with running(models=folder) as server:
        assert default_version(server) == "1"
        answer = httpx.post(f"{server.url}/v1/models/iris/versions/2:predict", content=ROW)
        assert answer.status_code == 503
        assert "quarantined: it ended two workers" in answer.json()["error"]


def test_a_quarantine_is_followed_while_it_serves(folder: Path, eventually: Wait) -> None:
    """What is put in quarantine serves no more, promoted or alone, nor can it be promoted; taken out, it serves."""
    shutil.copytree(MODELS / "digits", folder / "digits")
    (folder / "iris" / "traffic.json").write_text('{"generation": 1, "stable": "2"}')
    with running(models=folder) as server:
        digits = f"{server.url}/v2/models/digits/ready"
        assert default_version(server) == "2"
        Quarantine(folder).add("iris", "2", "it ended two workers")
        Quarantine(folder).add("digits", "1", "it ended two workers")
        eventually(lambda: default_version(server) == "1")
        eventually(lambda: httpx.get(digits).status_code == 503)
        assert "quarantined: it ended two workers" in httpx.get(digits).json()["error"]
        assert httpx.get(f"{server.url}/v2/health/ready").json()["not_served"] == ["digits 1", "iris 2", "iris"]
        tried = CliRunner().invoke(app, ["promote", "iris", "2", "--models", str(folder)])
        assert tried.exit_code == 1
        assert "quarantined: it ended two workers" in tried.output
        assert default_version(server) == "1"
        (state_folder(folder) / "quarantine.json").unlink()
        eventually(lambda: default_version(server) == "2")
        eventually(lambda: httpx.get(digits).status_code == 200)
