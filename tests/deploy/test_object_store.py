"""A repository in an object store: deployed to, followed and served, whatever the store does."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from click.testing import Result
from starlette.testclient import TestClient
from typer.testing import CliRunner

import serving
from serving.command_line import app
from serving.deploy.delete import delete
from serving.deploy.mirror import Mirror, located, mirrored
from serving.deploy.remote_versions import upload
from serving.errors import NotReady
from serving.repository import object_store, transitions
from serving.repository.manifest import MANIFEST_FILE, Hashes, of
from serving.repository.object_store import Bucket
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS, Server
from tests.faulty_store import FaultyStore, faulty_store

IRIS = MODELS / "iris"
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def running_store() -> Iterator[FaultyStore]:
    with faulty_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of servers, of which the second need not examine what the first has."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def store(running_store: FaultyStore) -> Iterator[FaultyStore]:
    """A store without faults, and without objects."""
    yield running_store
    running_store.fault = lambda method, path: ""
    for key in running_store.names():
        running_store.client.delete_object(Bucket="bucket", Key=key)


class Machine:
    """One of several that serve the same repository: its folder, what mirrors the store in it, and its traffic."""

    def __init__(self, state: Path, url: str = "s3://bucket/m", poll_s: float = 5.0) -> None:
        self.root, place = located(Path(url), state)
        found = Mirror.of(self.root, place, poll_s=poll_s)
        assert found is not None
        self.mirror = found
        self.traffic = TrafficStore(self.root, place)

    def versions(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob("iris/*/model.onnx"))

    @property
    def problems(self) -> dict[str, str]:
        return {f"{problem.name} {problem.version}".strip(): problem.reason for problem in self.mirror.problems}


def command(*arguments: str, state: Path) -> Result:
    return CliRunner().invoke(app, [*arguments, "--models", "s3://bucket/m", "--state-dir", str(state)])


def test_a_server_of_a_bucket_follows_what_deployers_do(store: FaultyStore, state: Path, tmp_path: Path) -> None:
    """Publish, promote and roll back by command and over HTTP; another machine sees the same; a store that is away
    stops nothing but changes."""
    store.put("m/iris/1", IRIS / "1")
    keys = tmp_path / "keys"
    key = CliRunner().invoke(app, ["keys", "create", "--name", "ann", "--scope", "deploy", "--keys", str(keys)])
    bearer = {"authorization": f"Bearer {key.stdout.split()[-1]}"}
    server = Server(
        "--state-dir", str(state), "--keys", str(keys), models=Path("s3://bucket/m"), environment=store.environment
    )
    try:
        server.wait()
        with httpx.Client(base_url=server.url, headers=bearer, timeout=30) as client:

            def answers() -> str:
                answer = client.post("/v1/models/iris:predict", json=ROW)
                return str(answer.json().get("model_version", answer.text))

            assert answers() == "1"
            done = command("publish", str(IRIS / "2" / "model.onnx"), "--name", "iris", "--promote", state=state)
            assert done.exit_code == 0, done.output
            assert "version 2 is stable, was 1 (generation 2; 1 server serves it)" in done.stdout
            assert answers() == "2"
            back = client.post("/v1/repository/models/iris/rollback", json={"why": "worse"})
            assert (back.status_code, answers()) == (200, "1"), back.text
            other = Machine(tmp_path / "elsewhere")
            other.mirror.pull()
            assert (other.versions(), other.traffic.read("iris").stable) == (["1", "2"], "1")
            assert [(entry["what"], entry["who"]) for entry in other.traffic.history("iris")[2:]] == [
                ("rollback: version 1 is stable, was 2", "ann")
            ]
            gone = client.delete("/v1/repository/models/iris/versions/2")
            assert (gone.status_code, [key for key in store.names() if "/2/" in key]) == (200, []), gone.text
            store.fault = lambda method, path: "away"
            refused = client.post("/v1/repository/models/iris/promote", json={"version": "1"})
            assert (refused.status_code, answers()) == (503, "1")
            assert refused.json()["error"] == "the object store does not answer as it should; nothing is changed"
            status = command("status", "iris", state=state)
            assert status.exit_code == 0, status.output
            assert "what came from there before is taken" in status.stderr
    finally:
        server.stop()


def test_deployers_who_race_lose_no_change(store: FaultyStore, tmp_path: Path) -> None:
    """Four deployers on two machines at once, while a part of the writes fails before or after it is done: each change
    that was confirmed is there, and the history is one line of them without a gap."""
    store.put("m/iris/1", IRIS / "1")
    machines = [Machine(tmp_path / name) for name in ("a", "b")]
    for machine in machines:
        machine.mirror.pull()
    chance = random.Random(5)
    store.fault = lambda method, path: chance.choice(("lost", "error", *[""] * 6)) if method == "PUT" else ""

    def deploy(deployer: int) -> list[str]:
        confirmed = []
        for label in (f"d{deployer}-{i}" for i in range(3)):
            step = transitions.label(label, "1", available=["1"])
            while label not in confirmed:
                with contextlib.suppress(NotReady):  # all its tries failed: whoever deploys asks again
                    machines[deployer % 2].traffic.change("iris", step, who=str(deployer), what=label)
                    confirmed.append(label)
        return confirmed

    with ThreadPoolExecutor(4) as pool:
        confirmed = {label for labels in pool.map(deploy, range(4)) for label in labels}
    store.fault = lambda method, path: ""
    for machine in machines:
        machine.mirror.pull()
        history = machine.traffic.history("iris")
        assert set(machine.traffic.read("iris").labels) == confirmed
        assert [entry["generation"] for entry in history] == list(range(1, len(history) + 1))
        assert all(old["after"] == new["before"] for old, new in itertools.pairwise(history))


def test_traffic_json_says_what_the_history_does(store: FaultyStore, tmp_path: Path) -> None:
    """However deployers race, people read the last state there."""
    store.put("m/iris/1", IRIS / "1")
    machine = Machine(tmp_path / "a")
    machine.mirror.pull()

    def deploy(i: int) -> None:
        machine.traffic.change("iris", transitions.label(f"d{i}", "1", available=["1"]), who="ann", what="label")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(deploy, range(8)))
    written = json.loads(store.client.get_object(Bucket="bucket", Key="m/iris/traffic.json")["Body"].read())
    assert (written["generation"], len(written["labels"])) == (8, 8)


def test_no_half_version_is_taken(store: FaultyStore, tmp_path: Path) -> None:
    """What comes truncated, altered or late is named and not taken; once the store is well it is."""
    store.put("m/iris/1", IRIS / "1")
    machine = Machine(tmp_path / "a")
    for fault in ("truncated", "wrong", "slow_down"):
        store.fault = lambda method, path, fault=fault: fault if "/1/model.onnx" in path else ""  # type: ignore[misc]
        machine = Machine(tmp_path / "a")
        machine.mirror.pull()
        assert (machine.versions(), list(machine.problems)) == ([], ["iris 1"]), fault
    store.fault = lambda method, path: ""
    machine = Machine(tmp_path / "a")
    machine.mirror.pull()
    assert (machine.versions(), machine.problems) == (["1"], {})
    store.put("m/iris/2", IRIS / "2", but="model.onnx")
    machine.mirror.pull()
    assert machine.problems == {"iris 2": "manifest.json names model.onnx, which is not there"}


def test_empty_objects_that_stand_for_folders_are_none_of_a_version(store: FaultyStore, tmp_path: Path) -> None:
    """As the stores' own consoles make them, beside a version that was copied there without a manifest."""
    store.put("m/iris/1", IRIS / "1", but="manifest.json")
    for key in ("m/", "m/iris/", "m/iris/1/", "m/iris/1/data/"):
        store.client.put_object(Bucket="bucket", Key=key, Body=b"")
    machine = Machine(tmp_path / "a")
    machine.mirror.pull()
    assert (machine.versions(), machine.problems) == (["1"], {})


def test_a_listing_is_only_a_hint(store: FaultyStore, tmp_path: Path) -> None:
    """What a stale listing lacks stays; what is gone goes, unless it has a role; an empty store changes nothing."""
    store.put("m/iris/1", IRIS / "1")
    machine = Machine(tmp_path / "a")
    machine.mirror.pull()
    store.put("m/iris/2", IRIS / "2", but=MANIFEST_FILE)  # as somebody copies it, who has no manifest
    again = Machine(tmp_path / "a")
    store.fault = lambda method, path: "stale"
    again.mirror.pull()
    store.fault = lambda method, path: ""
    again.mirror.pull()
    assert again.problems == {"iris 2": "it has no manifest.json, so it waits until nothing in it changes any more"}
    again.mirror.pull()
    assert again.versions() == ["1", "2"]
    assert (machine.root / "iris" / "2" / MANIFEST_FILE).exists()
    store.fault = lambda method, path: "stale"
    store.stale_now(without="/1/")
    again.mirror.pull()
    assert again.versions() == ["1", "2"]
    store.fault = lambda method, path: ""
    again.traffic.change("iris", transitions.pin("2"), who="ann", what="pin")
    store.remove("m/iris/1")
    again.mirror.pull()
    assert again.versions() == ["2"]
    store.put("m/iris/3", IRIS / "1")
    store.remove("m/iris/2")
    again.mirror.pull()
    assert again.versions() == ["2", "3"]
    assert again.problems == {"iris 2": "it has gone from the store, and what is here serves on"}
    store.remove("m/")
    with pytest.raises(NotReady, match="holds no model at all"):
        again.mirror.pull()
    assert again.versions() == ["2", "3"]


def test_traffic_that_is_edited_in_the_store_is_followed(store: FaultyStore, tmp_path: Path) -> None:
    """An edit counts as a new generation and stands in the history with the next change; an older state that comes back
    does not."""
    for version in ("1", "2"):
        store.put(f"m/iris/{version}", IRIS / version)
    machine = Machine(tmp_path / "a")
    machine.mirror.pull()
    machine.traffic.change("iris", transitions.pin("1"), who="ann", what="pin")
    old = store.client.get_object(Bucket="bucket", Key="m/iris/traffic.json")["Body"].read()
    store.client.put_object(Bucket="bucket", Key="m/iris/traffic.json", Body=b'{"stable": "2"}')
    machine.mirror.pull()
    assert (machine.traffic.read("iris").stable, machine.traffic.read("iris").generation) == ("2", 2)
    machine.traffic.change("iris", transitions.label("blue", "1", available=["1"]), who="ann", what="label")
    store.client.put_object(Bucket="bucket", Key="m/iris/traffic.json", Body=old)
    machine.mirror.pull()
    assert machine.traffic.read("iris").stable == "2"
    assert [entry["what"] for entry in machine.traffic.history("iris")] == ["pin", "edited", "label"]
    assert [entry["generation"] for entry in machine.traffic.history("iris")] == [1, 2, 3]
    store.fault = lambda method, path: "wrong" if (method, "history" in path) == ("GET", True) else ""
    with pytest.raises(NotReady, match="is not whole"):
        machine.traffic.change("iris", transitions.pin("1"), who="ann", what="pin")
    store.fault = lambda method, path: ""
    assert machine.traffic.change("iris", transitions.pin("1"), who="ann", what="pin").generation == 4


def test_publishers_who_race_get_numbers_of_their_own(store: FaultyStore, tmp_path: Path) -> None:
    """Whoever writes a version's manifest first has its number, and nobody writes into it."""

    def publish(i: int) -> str:
        staged = tmp_path / str(i)
        shutil.copytree(IRIS / str(i % 2 + 1), staged)
        found = of(staged, Hashes()).model_copy(update={"note": str(i)})
        (staged / MANIFEST_FILE).write_bytes(found.text())
        return upload(Bucket("s3://bucket/m"), staged, "iris", None)

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(publish, range(2))) == ["1", "2"]
    machine = Machine(tmp_path / "a")
    machine.mirror.pull()
    assert (machine.versions(), machine.problems) == (["1", "2"], {})


def test_a_document_that_is_too_large_to_read_harms_only_its_model(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What lies under a document's name is read where it is of a document's size: the model is named, others follow."""
    store.put("m/iris/1", IRIS / "1")
    store.put("m/other/1", IRIS / "2")
    store.client.put_object(Bucket="bucket", Key="m/iris/model.toml", Body=b"#" * 200_001)
    monkeypatch.setattr(object_store, "_MOST", 200_000)
    machine = Machine(tmp_path)
    machine.mirror.pull()
    assert [path.parent.parent.name for path in machine.root.glob("*/*/model.onnx")] == ["other"]
    assert "200001 bytes: 200000 at most" in machine.problems["iris 1"]


def test_a_publication_that_was_cut_off_is_completed_or_deleted(store: FaultyStore, tmp_path: Path) -> None:
    """Nobody takes it meanwhile; the same files get the number that they had."""
    store.put("m/iris/1", IRIS / "1")
    machine, staged = Machine(tmp_path / "a"), tmp_path / "staged"
    machine.mirror.pull()
    shutil.copytree(IRIS / "2", staged)

    def cut_off() -> None:
        store.fault = lambda method, path: "error" if "/2/model.onnx" in path else ""
        with pytest.raises(NotReady):
            upload(Bucket("s3://bucket/m"), staged, "iris", None)
        store.fault = lambda method, path: ""
        machine.mirror.pull()
        assert machine.problems == {"iris 2": "manifest.json names model.onnx, which is not there"}

    cut_off()
    delete(machine.traffic, "iris", "2", who="ann")
    assert [name for name in store.names() if "/2/" in name] == []
    cut_off()
    assert upload(Bucket("s3://bucket/m"), staged, "iris", None) == "2"
    machine = Machine(tmp_path / "a")
    machine.mirror.pull()
    assert (machine.versions(), machine.problems) == (["1", "2"], {})


def test_a_store_that_is_away_is_said(store: FaultyStore, tmp_path: Path, eventually: Wait) -> None:
    """From the second time that it can't be read it is a problem of the folder, until it is back."""
    store.put("m/iris/1", IRIS / "1")
    machine, moved = Machine(tmp_path / "a", poll_s=0.02), threading.Event()
    store.fault = lambda method, path: "refused"
    with pytest.raises(NotReady, match="s3://bucket/m: the object store refuses"):
        mirrored(Path("s3://bucket/m"), tmp_path / "a", say=print)
    following = threading.Thread(target=machine.mirror.follow, args=(moved.set,))
    following.start()
    try:
        eventually(lambda: "refuses the credentials" in machine.problems.get("", ""))
        assert moved.is_set()
        store.fault = lambda method, path: ""
        eventually(lambda: machine.versions() == ["1"] and not machine.problems)
        store.fault = lambda method, path: "away"
        said: list[str] = []
        assert mirrored(Path("s3://bucket/m"), tmp_path / "a", say=said.append)[0] == machine.root
        assert "what came from there before is taken" in said[0]
    finally:
        machine.mirror.close()
        following.join()


def test_an_application_of_ones_own_serves_a_bucket(store: FaultyStore, state: Path) -> None:
    """`create_app` takes the URL as the command does."""
    store.put("m/iris/1", IRIS / "1")
    with TestClient(serving.create_app("s3://bucket/m", state_dir=state)) as client:
        assert client.post("/v1/models/iris:predict", json=ROW).json()["model_version"] == "1"


def test_what_is_no_store_is_refused(store: FaultyStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error names the option, and what to do."""

    def said(models: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["status", "--models", models, "--state-dir", str(tmp_path)])
        return done.exit_code, done.stderr

    for url in ("http://bucket/m", "S3://bucket/m"):
        assert said(url) == (2, "serving: --models: write a folder, or s3://, gs:// or az:// and a bucket\n")
    assert said("s3://nobody") == (1, "serving: s3://nobody: there is no such bucket\n")
    assert said("s3://nobody/m") == (1, "serving: s3://nobody/m: there is no such bucket\n")
    store.fault = lambda method, path: "refused"
    assert "refuses the credentials" in said("s3://bucket/m")[1]
    store.fault = lambda method, path: ""
    store.client.put_object(Bucket="bucket", Key="m//iris/1/model.onnx", Body=b"x")
    assert "the store has an object 'm//iris/1/model.onnx', whose name is no path" in said("s3://bucket/m")[1]
    with monkeypatch.context() as context:
        context.delenv("AWS_ACCESS_KEY_ID")
        context.setenv("AWS_PROFILE", "nobody")
        assert said("s3://bucket/m") == (
            1,
            "serving: s3://bucket/m: AWS_PROFILE, or what it and ~/.aws name, gives no credentials\n",
        )
    monkeypatch.setattr(object_store, "find_spec", lambda name: None)
    assert "pip install 'serving[store]'" in said("s3://bucket/m")[1]
    run = CliRunner().invoke(app, ["run", "--models", "s3://bucket/m"])
    assert (run.exit_code, "pip install 'serving[store]'" in run.stderr) == (2, True)
