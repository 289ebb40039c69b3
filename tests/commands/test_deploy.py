"""Deploying from the command line beside a running server: served when it returns, or taken back with the reason."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from serving.command_line import app
from serving.commands.status import state
from serving.repository import servers
from serving.repository.servers import ServerMonitor
from serving.repository.state_directory import state_folders
from tests.conftest import MODELS, Server, running

ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris", root / "iris")
    for version in ("1", "2"):
        shutil.copytree(MODELS / "diabetes" / "1", root / "diabetes" / version)
    return root


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Server]:
    with running("--workers", "2", "--state-dir", str(state_dir(folder)), models=folder) as server:
        yield server


def state_dir(folder: Path) -> Path:
    return folder.with_name("state")


def run(folder: Path, *arguments: str) -> Result:
    """Run a command on a models folder, in this process: starting one takes longer than all that it does."""
    return CliRunner(env={"SERVING_STATE_DIR": str(state_dir(folder))}).invoke(
        app, [*arguments, "--models", str(folder)]
    )


def answering(live: Server) -> set[str]:
    """Ask over new connections, which both workers take; return the versions that answered."""
    found = set()
    for _ in range(12):
        answer = httpx.post(f"{live.url}/v1/models/iris:predict", json=ROW)
        found.add(str(answer.json().get("model_version", answer.status_code)))
    return found


def test_a_change_is_served_when_the_command_returns(live: Server, folder: Path, eventually: Wait) -> None:
    """promote and rollback end when every worker serves the change, and say so in a line."""
    done = run(folder, "promote", "iris", "1", "--why", "ticket 12")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "iris: version 1 is stable" in done.stdout
    assert "1 server serves it" in done.stdout
    assert answering(live) == {"1"}
    assert run(folder, "rollback", "iris").exit_code == 0
    assert answering(live) == {"2"}
    listed = run(folder, "history", "iris").stdout
    assert "promote 1" in listed
    assert "ticket 12" in listed
    assert re.search(r"rollback: version 2 is\s", listed)
    eventually(lambda: "iris: promote 1: version 1 is stable, was the highest; ticket 12 (gen" in live.output())
    eventually(lambda: "iris: rollback: version 2 is stable, was 1 (generation 2" in live.output())
    shown = json.loads(run(folder, "status", "iris", "--json").stdout)["models"][0]
    assert (shown["stable"], shown["up_to_date"], shown["servers"]) == ("2", True, 1)
    assert "by 1" in run(folder, "status").stdout


def test_nothing_of_ours_lies_among_the_models(live: Server, folder: Path, eventually: Wait) -> None:
    """After publishing and promoting there are models under the root, versions under a model, and files beside them."""
    published = run(folder, "publish", str(MODELS / "diabetes" / "1" / "model.onnx"), "--name", "other", "--promote")
    assert published.exit_code == 0, published.output
    eventually(lambda: "other 1 is published by " in live.output())
    first, second = json.loads(run(folder, "history", "other", "--json").stdout)
    assert (first["what"], first["generation"], second["what"]) == ("publish 1", None, "promote 1")
    shutil.rmtree(folder / "other")
    published = run(folder, "publish", str(MODELS / "iris" / "1" / "model.onnx"), "--name", "iris", "--promote")
    assert published.exit_code == 0, published.output
    assert {path.name for path in folder.iterdir()} == {"iris", "diabetes"}
    folders = [path.name for path in (folder / "iris").iterdir() if path.is_dir()]
    assert all(name.isdecimal() for name in folders)
    files = {path.name for path in (folder / "iris").iterdir() if path.is_file()}
    assert files == {"traffic.json", "history.jsonl"}
    assert not [path for path in state_folders(folder) if any(path.iterdir())], "all of it goes where it was told to"
    assert {"servers", "reports"} <= {path.name for path in state_dir(folder).iterdir()}


def test_rollback_from_a_document_that_cant_be_read(live: Server, folder: Path) -> None:
    """Where an edit has broken traffic.json, rollback goes back from what it said last; other changes are refused."""
    run(folder, "promote", "iris", "1")
    run(folder, "promote", "iris", "2")
    (folder / "iris" / "traffic.json").write_text("{")
    assert "traffic.json: is not JSON" in run(folder, "promote", "iris", "2").stderr
    done = run(folder, "rollback", "iris")
    assert (done.exit_code, done.stderr) == (0, "")
    assert answering(live) == {"1"}
    assert run(folder, "promote", "iris", "2").exit_code == 0


def test_a_reason_steers_no_terminal(folder: Path) -> None:
    """Whoever writes a reason over the network sends no control character to the terminal of who reads the history."""
    assert run(folder, "label", "iris", "red", "1", "--why", "a\x1b[31mb\x1b]0;c\x07\x9b1m", "--no-wait").exit_code == 0
    shown = run(folder, "history", "iris").stdout
    assert "\\x1b" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    (folder / "iris" / "traffic.json").write_text(json.dumps({"\x1b[31m": 1}))
    done = run(folder, "status", "iris")
    assert "there is no such field" in done.stdout
    assert "\x1b" not in done.stdout + run(folder, "promote", "iris", "1").stderr
    (folder / "iris" / "traffic.json").unlink()


def test_status_names_all_that_is_asked_for_and_is_not_there(live: Server, folder: Path, eventually: Wait) -> None:
    """A canary and a label whose version is gone from the folder are both said, though stable answers."""
    edited = {"stable": "1", "labels": {"red": "8"}, "canary": {"version": "9", "percent": 5}}
    (folder / "diabetes" / "traffic.json").write_text(json.dumps(edited))
    wanted = ("canary is version 9, which can't serve", "label red is version 8, which can't serve")
    eventually(lambda: all(text in run(folder, "status", "diabetes").stdout for text in wanted))
    (folder / "diabetes" / "traffic.json").unlink()
    shutil.copy(folder / "iris" / "1" / "model.onnx", folder / "rose.onnx")
    eventually(lambda: "rose.onnx: not served here: move it to rose/1" in run(folder, "status").stdout)
    (folder / "rose.onnx").unlink()


def test_a_folder_that_is_not_there_or_not_written_is_said_in_a_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong --models is named, and a disk that takes nothing: neither is an empty table, or a trace."""
    assert "name another with --models" in run(tmp_path / "nope", "status").stderr

    def full(*given: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "model.toml")

    monkeypatch.setattr("serving.commands.status.ServerMonitor", full)
    done = run(folder, "status")
    assert (done.exit_code, done.stderr) == (1, "serving: model.toml: read-only file system\n")


def test_figures_of_several_servers_say_whose_they_are(folder: Path) -> None:
    """Each server counts for itself, so two lines of one trial are told apart."""
    said = {"iris": {"trial": ["canary 2: 5 predictions"]}}
    made = servers.Server.model_construct
    live = [made(host=host, pid=pid, models=said, problems=[]) for host, pid in (("one", 1), ("two", 2))]
    shown = state(folder, state_dir(folder), "iris", live)["trials"]
    assert shown == ["canary 2: 5 predictions (one, process 1)", "canary 2: 5 predictions (two, process 2)"]


def test_a_version_that_is_half_there_is_not_shown_as_stable(tmp_path: Path) -> None:
    """Where nobody has named a stable version, status shows the one that answers, not the highest number."""
    shutil.copytree(MODELS / "iris", tmp_path / "iris")
    live = [servers.Server.model_construct(host="one", pid=1, models={"iris": {"stable": "1"}}, problems=[])]
    assert state(tmp_path, None, "iris", live)["stable"] == "1"
    assert state(tmp_path, None, "iris", [])["stable"] == "2"


def test_the_real_command(folder: Path) -> None:
    """The installed command does the same, and does not load what predicts to do it."""
    whole = [sys.executable, "-X", "importtime", "-m", "serving.cli", "label", "iris", "blue", "1", "--no-wait"]
    done = subprocess.run([*whole, "--models", str(folder)], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, "label blue is version 1" in done.stdout) == (0, True), done.stderr
    assert "onnxruntime" not in done.stderr


def test_what_cant_be_served_is_taken_back(live: Server, folder: Path) -> None:
    """A version that no worker can load changes nothing: exit status 1, the reason, and a history that says so."""
    run(folder, "promote", "iris", "2")
    (folder / "iris" / "7").mkdir()
    (folder / "iris" / "7" / "model.onnx").write_bytes(b"no model")
    try:
        done = run(folder, "promote", "iris", "7")
        assert done.exit_code == 1
        assert "serving: promote 7 of iris is not served" in done.stderr
        assert "what served before goes on" in done.stderr
        assert answering(live) == {"2"}
        last = json.loads(run(folder, "history", "iris", "--json").stdout)[-1]
        assert last["what"] == "reverted: promote 7"
        assert last["why"]
        assert last["after"]["stable"] == "2"
    finally:
        shutil.rmtree(folder / "iris" / "7")


def test_rollback_passes_over_a_damaged_version(live: Server, folder: Path) -> None:
    """Where the version before is half there, one command goes to the one before it, and says so and why."""
    shutil.copytree(folder / "iris" / "2", folder / "iris" / "3")
    try:
        for version in ("1", "2", "3"):
            assert run(folder, "promote", "iris", version).exit_code == 0
        file = folder / "iris" / "2" / "model.onnx"
        whole = file.read_bytes()
        file.write_bytes(whole[:1000])
        done = run(folder, "rollback", "iris")
        file.write_bytes(whole)
        assert done.exit_code == 0, done.stderr
        assert "version 1 is stable, was 3; version 2 is passed over: model.onnx has 1000 bytes" in done.stdout
        assert answering(live) == {"1"}
        last = json.loads(run(folder, "history", "iris", "--json").stdout)[-1]
        assert last["what"].startswith("rollback: version 1 is stable, was ")
        assert "version 2 is passed over: model.onnx has" in last["why"]
    finally:
        shutil.rmtree(folder / "iris" / "3")


def test_a_judged_canary_is_promoted_by_itself(live: Server, folder: Path, eventually: Wait) -> None:
    """A canary that answers its rows without a fault is promoted, and status tells how it goes meanwhile."""
    run(folder, "promote", "iris", "1")
    done = run(folder, "canary", "iris", "2", "--percent", "50", "--rows", "30", "--max-error-rate", "0.1")
    assert done.exit_code == 0, done.stderr

    def told() -> str:
        seen = ServerMonitor(folder, state_dir(folder)).servers()
        return "".join(line for server in seen for line in server.models["iris"].get("trial", ()))

    eventually(lambda: "canary 2:" in told())  # before there is anything to judge by

    def promoted() -> bool:
        answering(live)
        history = (folder / "iris" / "history.jsonl").read_text().splitlines()
        return bool(json.loads(history[-1])["who"] == "judge")

    eventually(promoted)
    last = json.loads((folder / "iris" / "history.jsonl").read_text().splitlines()[-1])
    assert last["what"] == "promote 2"
    assert re.search(r"in \d+ s, 0 of \d+ failed", last["why"])
    eventually(lambda: answering(live) == {"2"})


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("promote", "iris", "9"), 1, "no version '9' that can serve; versions: 1, 2"),
        (("promote", "iris", "one"), 2, 'version: should be a version such as "3"'),
        (("canary", "iris", "2", "--percent", "0"), 2, "percent: should be greater than 0"),
        (("canary", "iris"), 2, "give a version, or --end"),
        (("canary", "iris", "1", "--sticky-feature", "age"), 1, "no feature 'age'; features: sepal_length"),
        (("canary", "iris", "1", "--after", "soon"), 2, "--after: 'soon' is no time"),
        (("canary", "iris", "1", "--max-error-rate", "0.1"), 2, "--after or --rows must say when"),
        (("canary", "iris", "1", "--percent", "100", "--rows", "9", "--max-latency-ratio", "2"), 2, "of 100 % leaves"),
        (
            ("canary", "diabetes", "1", "--rows", "9", "--min-agreement", "0.9"),
            1,
            "version 1 gives no labels to compare",
        ),
        (
            ("shadow", "diabetes", "1", "--rows", "9", "--min-agreement", "0.9"),
            1,
            "gives no labels to compare: leave it",
        ),
        (("label", "iris", "stable", "1"), 2, "'stable' follows the role"),
        (("keep", "iris", "some"), 2, "keep: should be"),
        (("keep", "iris", "1,9"), 1, "no version '9' that can serve"),
        (
            ("publish", str(MODELS / "iris" / "1" / "model.onnx"), "--name", "rose", "--canary", "0"),
            2,
            "greater than 0",
        ),
        (("publish", "a.onnx", "--name", "rose", "--canary", "5", "--promote"), 2, "--promote or --canary, not both"),
        (("check", str(MODELS / "iris" / "1"), "--name", "rose"), 0, "there is no model rose in"),
        (("rollback", "rose"), 1, "no model is called 'rose'"),
    ],
)
def test_what_is_refused_is_said(
    live: Server, folder: Path, arguments: tuple[str, ...], status: int, text: str
) -> None:
    """A command that makes no sense ends with a sentence and a status, and no trace."""
    done = run(folder, *arguments)
    assert (done.exit_code, text in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr
