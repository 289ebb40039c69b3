"""A number is a promise: publishing moves no traffic, what is in use stays, and no other bytes serve under it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner, Result

from serving.access.key_store import KeyStore
from serving.command_line import app
from serving.deploy.delete import delete
from serving.deploy.publish import publish
from serving.errors import Conflict, ModelNotFound, NotReady
from serving.gate.gate import Gate
from serving.repository import transitions
from serving.repository.repository import Repository
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS, Server, running

IRIS_1, IRIS_2 = (MODELS / "iris" / version / "model.onnx" for version in "12")
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
OPS: dict[str, str] = {}
CALLER: dict[str, str] = {}
Wait = Callable[[Callable[[], bool]], None]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_publishing_moves_no_traffic(tmp_path: Path, examiner: Gate) -> None:
    """The first version answers; each later one comes beside it, and the history says that, and why."""
    store = TrafficStore(tmp_path)
    first = publish(tmp_path, "iris", IRIS_1, who="ana", examiner=examiner)
    assert (first.version, first.answers, store.read("iris").generation) == ("1", "1", 0)
    second = publish(tmp_path, "iris", IRIS_2, who="ben", examiner=examiner)
    assert (second.version, second.answers) == ("2", "1")
    third = publish(tmp_path, "iris", IRIS_2, version="9", who="ben", examiner=examiner)
    assert (third.answers, store.read("iris").stable) == ("1", "1")
    (entry,) = store.history("iris")
    assert (entry["who"], entry["what"]) == ("ben", "stay on 1")
    # A publication counts from when it began.
    assert [event["what"] for event in store.events("iris")] == ["publish 1", "publish 2", "stay on 1", "publish 9"]
    assert publish(tmp_path, "iris", IRIS_1, version="1", examiner=examiner).answers == "1"


def test_what_answers_is_not_what_can_not(tmp_path: Path, examiner: Gate) -> None:
    """A damaged highest version does not answer today, so it is not what stays; Triton's version_policy is followed."""
    for version, source in (("1", IRIS_1), ("2", IRIS_2), ("3", IRIS_1)):
        (tmp_path / "iris" / version).mkdir(parents=True)
        shutil.copy(source, tmp_path / "iris" / version / "model.onnx")
    (tmp_path / "iris" / "3" / "model.onnx").write_bytes(IRIS_1.read_bytes()[:500])
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "iris", copied / "iris")
    (copied / "iris" / "config.pbtxt").write_text("version_policy: { specific: { versions: [1] } }")
    diabetes = MODELS / "diabetes" / "1" / "model.onnx"
    for root, stays in ((tmp_path, "2"), (copied, "1")):
        new = publish(root, "iris", diabetes, allow_breaking=True, examiner=examiner)
        assert (new.version, new.answers, TrafficStore(root).read("iris").stable) == ("4", stays, stays)


def test_a_version_without_a_role_is_deleted(tmp_path: Path) -> None:
    """Stable, canary, shadow, labels and versions kept by name stay; others go, and the history has who and why."""
    store = TrafficStore(tmp_path)
    for version in "123456":
        shutil.copytree(MODELS / "iris" / "2", tmp_path / "iris" / version)
    with pytest.raises(Conflict, match="version 6 is in use: it is stable"):
        delete(store, "iris", "6", who="ana")
    here = store.versions("iris")
    for step in (
        transitions.promote("1", available=here),
        transitions.canary("2", 10, available=here),
        transitions.shadow("3", available=here),
        transitions.label("blue", "4", available=here),
        transitions.keep(("5",), available=here),
    ):
        store.change("iris", step, who="ana", what="test")
    roles = ("stable", "the canary", "the shadow", "labelled blue", "kept by name")
    for version, role in zip("12345", roles, strict=True):
        with pytest.raises(Conflict, match=f"version {version} is in use: it is {role}"):
            delete(store, "iris", version, who="ana")
    with pytest.raises(ModelNotFound):
        delete(store, "iris", "7", who="ana")
    before = store.read("iris")
    after = delete(store, "iris", "6", who="ana", why="old")
    assert after.same(before)
    assert sorted(path.name for path in (tmp_path / "iris").iterdir() if path.is_dir()) == list("12345")
    entry = store.history("iris")[-1]
    assert (entry["who"], entry["what"], entry["why"]) == ("ana", "delete 6", "old")


def test_a_link_to_a_version_is_deleted_and_its_files_are_not(tmp_path: Path) -> None:
    """A version that lies elsewhere goes out of the folder with nothing left behind; where it lies it stays."""
    shutil.copytree(MODELS / "iris" / "2", tmp_path / "iris" / "2")
    (tmp_path / "iris" / "1").symlink_to(MODELS / "iris" / "1")
    delete(TrafficStore(tmp_path), "iris", "1", who="ana")
    assert [path.name for path in (tmp_path / "iris").iterdir() if path.name.startswith(".deleted")] == []
    assert (MODELS / "iris" / "1" / "model.onnx").is_file()


def test_a_deletion_that_can_not_be_noted_does_not_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the history can't be written the version is back where it was."""
    for version in "12":
        shutil.copytree(MODELS / "iris" / "2", tmp_path / "iris" / version)

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        with pytest.raises(NotReady, match="nothing is changed"):
            delete(TrafficStore(tmp_path), "iris", "1", who="ana")
    monkeypatch.setattr("serving.repository.traffic_store._write", full)
    with pytest.raises(NotReady, match="nothing is changed"):
        delete(TrafficStore(tmp_path), "iris", "1", who="ana")
    assert (tmp_path / "iris" / "1" / "model.onnx").is_file()
    assert Repository(tmp_path, TrafficStore(tmp_path).read).scan().problems == ()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one model that was published once."""
    root = tmp_path_factory.mktemp("live")
    publish(root, "iris", IRIS_1)
    publish(root, "plain", IRIS_1)
    (root / "plain" / "1" / "manifest.json").unlink()
    keys = tmp_path_factory.mktemp("keys") / "keys"
    key = KeyStore(keys).create("ops", frozenset({"deploy"}))
    predict = KeyStore(keys).create("caller", frozenset({"predict"}))
    CALLER["authorization"], OPS["authorization"] = f"Bearer {predict}", f"Bearer {key}"
    with running("--keys", str(keys), models=root) as server:
        yield server


def answered(server: Server, model: str = "iris") -> str:
    return str(httpx.post(f"{server.url}/v1/models/{model}:predict", json=ROW, headers=CALLER).json()["model_version"])


def test_the_command_publishes_beside_waits_and_deletes(live: Server) -> None:
    """`publish --wait` returns when it can be asked for by number; traffic moves when asked; `delete` lets it go."""
    done = run("publish", IRIS_2, "--name", "iris", "--wait", "--models", live.models)
    assert done.exit_code == 0, done.output
    assert "iris version 2 published; version 1 answers: serving promote iris 2" in done.output
    assert "1 server serves it" in done.output
    assert answered(live) == "1"
    assert httpx.post(f"{live.url}/v1/models/iris/versions/2:predict", json=ROW, headers=CALLER).status_code == 200
    share = run("publish", IRIS_2, "--name", "iris", "--version", "2", "--canary", "100", "--models", live.models)
    assert share.exit_code == 0, share.output
    assert answered(live) == "2"
    assert run("delete", "iris", "2", "--models", live.models).exit_code == 1
    assert run("canary", "iris", "--end", "--models", live.models).exit_code == 0
    gone = run("delete", "iris", "2", "--why", "no use", "--models", live.models)
    assert gone.exit_code == 0, gone.output
    assert httpx.post(f"{live.url}/v1/models/iris/versions/2:predict", json=ROW, headers=CALLER).status_code == 404
    assert answered(live) == "1"


def test_over_http_too(live: Server) -> None:
    """PUT says which version answers; DELETE takes a version away, and refuses one that is in use with 409."""
    place = f"{live.url}/v1/repository/models/iris/versions"
    put = httpx.put(f"{place}/7", content=IRIS_2.read_bytes(), headers=OPS, timeout=60)
    assert (put.status_code, put.json()["answers"]) == (201, "1")
    refused = httpx.delete(f"{place}/1", headers=OPS)
    assert refused.status_code == 409
    assert "it is stable" in refused.json()["error"]
    deleted = httpx.delete(f"{place}/7?why=no+use", headers=OPS)
    assert (deleted.status_code, deleted.json()["version"]) == (200, "7")
    assert httpx.delete(f"{place}/7", headers=OPS).status_code == 404
    assert httpx.delete(f"{place}/1", headers=CALLER).status_code == 403
    history = httpx.get(f"{live.url}/v1/repository/models/iris/history", headers=OPS).json()["history"]
    assert (history[-1]["what"], history[-1]["why"]) == ("delete 7", "no use")


@pytest.mark.parametrize("model", ["iris", "plain"])
def test_bytes_that_were_replaced_do_not_serve(model: str, live: Server, eventually: Wait) -> None:
    """Other files under a number that serves are a problem that is named; what was loaded answers on, to the bit."""
    before = httpx.post(f"{live.url}/v1/models/{model}:predict", json=ROW, headers=CALLER).json()
    folder = live.models / model / "1"
    manifest = folder / "manifest.json"
    if manifest.exists():  # who replaces all of it, as rsync does, replaces that too
        told = json.loads(manifest.read_bytes())
        told["files"] = json.loads((MODELS / "iris" / "2" / "manifest.json").read_bytes())["files"]
        manifest.write_text(json.dumps(told))
    shutil.copy(IRIS_2, folder / "model.onnx")

    def said() -> str:
        return " ".join(run("status", model, "--models", live.models).output.split())

    eventually(lambda: "version 1: its files were replaced" in said())
    assert httpx.post(f"{live.url}/v1/models/{model}:predict", json=ROW, headers=CALLER).json() == before
    for verb in ("unload", "load"):
        assert run(verb, model, "--models", live.models).exit_code == 0
    after = httpx.post(f"{live.url}/v1/models/{model}:predict", json=ROW, headers=CALLER).json()
    assert after["predictions"] != before["predictions"]
    eventually(lambda: "replaced" not in said())
