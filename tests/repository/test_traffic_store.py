"""The store: one change after the other, each in the history, whatever crashes, fills up or is edited by hand."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.deploy.commands import Rollback
from serving.errors import GenerationConflict, InvalidRequest, ModelNotFound, NotReady
from serving.gate import gate
from serving.gate.findings import Findings
from serving.repository import history, manifest
from serving.repository import transitions as to
from serving.repository.quarantine import Quarantine
from serving.repository.state_directory import state_folder
from serving.repository.traffic import Traffic
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS
from tests.drills.deployers import deployers
from tests.drills.drill import Report
from tests.drills.promoting import promoting

HERE = ("1", "2", "3")


@pytest.fixture
def store(tmp_path: Path) -> TrafficStore:
    for version in HERE:
        (tmp_path / "iris" / version).mkdir(parents=True)
    return TrafficStore(tmp_path)


def promote(store: TrafficStore, version: str, **more: Any) -> Traffic:
    return store.change("iris", to.promote(version, available=HERE), who="ann", what=f"promote {version}", **more)


def chain(store: TrafficStore) -> list[dict[str, Any]]:
    """Return the history, having checked that each line goes on where the one above ended, and ends at the document."""
    entries = store.history("iris", 10_000)
    for one, two in itertools.pairwise(entries):
        assert two["before"] == one["after"]
        assert two["generation"] > one["generation"]
    if entries:
        assert entries[-1]["after"] == store.read("iris").document()
    return entries


@pytest.fixture
def filled(store: TrafficStore, tmp_path: Path) -> TrafficStore:
    """Each version holds a model and has been stable, the highest last."""
    for version in HERE:
        shutil.copytree(MODELS / "iris" / "1", tmp_path / "iris" / version, dirs_exist_ok=True)
        promote(store, version)
    return store


def test_rollback_passes_over_what_is_in_quarantine(filled: TrafficStore, tmp_path: Path) -> None:
    """The version before may have ended workers too: one command goes to the one before that."""
    Quarantine(tmp_path).add("iris", "2", "it ended two workers")
    assert Rollback().step(filled, "iris").transition(filled.read("iris")).stable == "1"


@pytest.mark.parametrize("declared", [True, False], ids=["manifest", "plain copy"])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("truncate", "half copied|cut short"),
        ("unlink", "not there|no model.onnx"),
        ("refuse", "gave no answer"),
    ],
)
def test_rollback_passes_over_what_is_damaged(
    filled: TrafficStore, tmp_path: Path, declared: bool, harm: str, reason: str
) -> None:
    """The version before may be half there or refused by the gate: one command goes on, and the history says why."""
    folder = tmp_path / "iris" / "2"
    file = folder / "model.onnx"
    if not declared:
        (folder / "manifest.json").unlink()
    if harm == "truncate":
        os.truncate(file, 1000)
    elif harm == "unlink":
        file.unlink()
    else:
        found = manifest.of(folder, manifest.Hashes())
        gate.keep(state_folder(tmp_path), gate.judge(found, gate.read(b"{}"), Findings(), at=0))
        file_one = tmp_path / "iris" / "1" / "model.onnx"
        shutil.copy(MODELS / "iris" / "2" / "model.onnx", file_one)
        (tmp_path / "iris" / "1" / "manifest.json").unlink()
    step = Rollback(why="ticket 12").step(filled, "iris")
    after = filled.change("iris", step.transition, who="ann", what="rollback", why=step.why)
    assert after.stable == "1"
    (entry,) = filled.history("iris", 1)
    assert re.fullmatch(f"ticket 12; version 2 is passed over: .*({reason}).*", entry["why"])
    assert step.notes == (entry["why"].removeprefix("ticket 12; "),)


def test_a_rollback_to_nothing_says_what_there_was(filled: TrafficStore, tmp_path: Path) -> None:
    """Where no version before can serve nothing changes, and the answer has the reason of each."""
    for version in ("1", "2"):
        os.truncate(tmp_path / "iris" / version / "model.onnx", 1000)
    with pytest.raises(InvalidRequest, match=r"no earlier version to go back to; version 2 is .*; version 1 is passed"):
        Rollback().step(filled, "iris")


def test_a_rollback_from_no_name_goes_below_what_serves(filled: TrafficStore, tmp_path: Path) -> None:
    """Where the highest version that can serve is stable, going back is from that, not from a damaged one above it."""
    (tmp_path / "iris" / "traffic.json").unlink()
    os.truncate(tmp_path / "iris" / "3" / "model.onnx", 1000)
    assert Rollback().step(filled, "iris").transition(filled.read("iris")).stable == "1"


def test_ending_a_canary_asks_nothing_of_the_disk(filled: TrafficStore, tmp_path: Path) -> None:
    """Stable serves from memory: a canary beside it can be ended, whatever has become of the files."""
    filled.change("iris", to.canary("2", available=HERE), who="ann", what="canary 2")
    os.truncate(tmp_path / "iris" / "3" / "model.onnx", 1000)
    after = Rollback().step(filled, "iris").transition(filled.read("iris"))
    assert (after.stable, after.canary) == ("3", None)


def test_every_change_is_noted(store: TrafficStore, tmp_path: Path) -> None:
    """A change is on disk as the next generation, and in the history: when, who, what, why, before and after."""
    assert store.read("iris") == Traffic()
    first = promote(store, "1", why="ticket 12")
    second = promote(store, "2", if_generation=1)
    assert (first.generation, second.generation) == (1, 2)
    assert store.read("iris") == second
    assert json.loads((tmp_path / "iris" / "traffic.json").read_text())["stable"] == "2"
    one, two = chain(store)
    assert (one["who"], one["what"], one["why"], one["generation"]) == ("ann", "promote 1", "ticket 12", 1)
    assert one["when"].endswith("Z")
    assert two["after"]["previous"] == "1"
    assert store.history("iris", 1) == [two]


def test_the_loser_of_a_race_gets_the_state(store: TrafficStore) -> None:
    """A change made for a generation that has passed is refused, and told what is there now."""
    promote(store, "1")
    promote(store, "2")
    with pytest.raises(GenerationConflict) as caught:
        promote(store, "3", if_generation=1)
    assert caught.value.current["stable"] == "2"
    assert caught.value.current["generation"] == 2
    assert len(chain(store)) == 2


def test_unknown_models_and_bad_names(store: TrafficStore) -> None:
    """A model that is not in the folder is named; a name that is a path is no name."""
    for name in ("rose", "../iris", ".serving", ""):
        with pytest.raises(ModelNotFound):
            store.read(name)


def test_an_edit_by_hand_is_a_change(store: TrafficStore, tmp_path: Path) -> None:
    """Who replaces traffic.json, with or without a greater generation, has made a change: it counts, and is noted."""
    file = tmp_path / "iris" / "traffic.json"
    promote(store, "1")
    file.write_text('{"stable": "2"}')
    assert store.read("iris").generation == 2
    assert store.import_edit("iris").stable == "2"
    assert store.import_edit("iris").generation == 2
    assert [e["what"] for e in chain(store)] == ["promote 1", "edited"]
    file.write_text('{"stable": "3", "generation": 40}')
    with pytest.raises(GenerationConflict):
        promote(store, "1", if_generation=2)
    assert promote(store, "1", if_generation=40).generation == 41
    file.unlink()
    assert store.read("iris") == Traffic(generation=42)
    store.import_edit("iris")
    assert [e["generation"] for e in chain(store)] == [1, 2, 40, 41, 42]


def test_a_document_that_cant_be_read(store: TrafficStore, tmp_path: Path) -> None:
    """A broken traffic.json is named, and is not overwritten by a change that has not seen it."""
    file = tmp_path / "iris" / "traffic.json"
    file.write_text('{"stable": 1}')
    for act in (lambda: store.read("iris"), lambda: store.import_edit("iris"), lambda: promote(store, "1")):
        with pytest.raises(InvalidRequest, match="stable: should be a version"):
            act()
    assert file.read_text() == '{"stable": 1}'


def test_a_torn_line_is_passed_over(store: TrafficStore, tmp_path: Path) -> None:
    """Half a line at the end of the history, and rubbish in it, hide no other line."""
    promote(store, "1")
    file = tmp_path / "iris" / "history.jsonl"
    with file.open("ab") as opened:
        opened.write(b'rubbish\n{"when": "20')
    assert len(chain(store)) == 1
    promote(store, "2")
    assert [e["what"] for e in chain(store)] == ["promote 1", "promote 2"]


def test_a_long_history_is_read_from_its_end(store: TrafficStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are whole wherever the blocks that are read begin."""
    for turn in range(12):
        promote(store, HERE[turn % 3])
    for size in (1, 7, 512):
        monkeypatch.setattr(history, "_BLOCK", size)
        assert [e["generation"] for e in chain(store)] == list(range(1, 13))


def test_what_is_being_removed_stays_removed(store: TrafficStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sees a model's folder half removed puts no history back, or the folder could not be removed."""
    promote(store, "1")
    folder = store.root / "iris"
    (folder / "traffic.json").unlink()
    real = history.last

    def then_removed(folder: Path) -> Traffic:
        monkeypatch.undo()
        found = real(folder)
        (folder / "history.jsonl").unlink()
        return found

    monkeypatch.setattr(history, "last", then_removed)
    store.import_edit("iris")
    assert [path.name for path in folder.iterdir() if path.is_file()] == []


def test_a_read_only_folder_says_so(store: TrafficStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the models folder can't be written, a change says that, and reading goes on."""

    def refuse(*args: object, **more: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NotReady, match="read-only"):
        promote(store, "1")
    assert store.import_edit("iris") == Traffic()


class Crash(BaseException):
    """The process is gone: nothing that it would have done later happens."""


STEPS: list[tuple[object, str]] = [
    (os, "fsync"),
    (os, "write"),
    (os, "open"),
    (Path, "open"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "mkdir"),
]


@pytest.mark.parametrize("fault", [Crash, OSError(errno.ENOSPC, "No space left on device")], ids=["crash", "full"])
def test_a_fault_at_any_step_leaves_one_truth(store: TrafficStore, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed or out of space at each of its system calls: the old state or the new one, and a history without a gap."""
    promote(store, "1")
    reached = step = made = 0
    while reached == step:
        step += 1
        before = store.read("iris")
        turn = "2" if before.stable != "2" else "3"
        with monkeypatch.context() as patched:
            reached = _fail_at(step, fault, patched, lambda turn=turn: promote(store, turn))
        after = store.read("iris")
        assert after == before or (after.stable == turn and after.generation == before.generation + 1)
        made += after != before
        assert len(chain(store)) == made + 1
        assert store.import_edit("iris") == after
    assert step > 10
    assert made >= 3, "some of the faults came after the change"


def _fail_at(step: int, fault: Any, patched: pytest.MonkeyPatch, act: Callable[[], object]) -> int:
    """Run `act` with its `step`th call of STEPS failing; return how many calls were made, `step` if it came to it."""
    calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            nonlocal calls
            if calls < step:
                calls += 1
                if calls == step:
                    raise fault
            elif fault is Crash:
                raise fault
            return real(*args, **more)

        return counted

    for owner, name in STEPS:
        patched.setattr(owner, name, wrap(getattr(owner, name)))
    with contextlib.suppress(Crash, NotReady):
        act()
    return calls


def test_a_real_kill_between_document_and_history(store: TrafficStore, tmp_path: Path) -> None:
    """A process that dies with the document replaced and the line unwritten: the next look finds who it was."""
    script = (
        "import os; from pathlib import Path; from serving.repository import traffic_store, transitions as to\n"
        "traffic_store.history.append = lambda *a: os.kill(os.getpid(), 9)\n"
        f"store = traffic_store.TrafficStore(Path({str(tmp_path)!r}))\n"
        "store.change('iris', to.promote('2', available=['2']), who='bob', what='promote 2')"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert store.read("iris").stable == "2"
    assert [e["who"] for e in chain(store)] == ["bob"]


def test_deployers_at_once() -> None:
    """Several processes that change one model at once: no gap, no error without a cause, and the control fails."""
    report = Report()
    deployers(report, processes=3, operations=12, live=False)
    assert report.kept, report.broken()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the library that strikes is compiled")
def test_a_promotion_cut_off_anywhere_is_made_and_noted_or_not_made() -> None:
    """Short form of the drill: kills, full disks and failing calls at some of the steps."""
    report = Report()
    promoting(report, strikes=18)
    assert not report.broken()
