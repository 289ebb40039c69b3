"""Versions come and go while the server answers: every worker goes from one state of the folder to the next."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from serving.access.key_store import KeyStore
from serving.deploy.coordinator import GONE_S
from tests.conftest import MODELS, Server, running

Wait = Callable[[Callable[[], bool]], None]
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with version 1 of iris."""
    shutil.copytree(MODELS / "iris" / "1", tmp_path / "iris" / "1")
    return tmp_path


@pytest.fixture
def key(folder: Path) -> str:
    """A key that may deploy."""
    return KeyStore(folder / ".keys").create("ops", frozenset({"deploy"}))


@pytest.fixture
def live(folder: Path, key: str) -> Iterator[Server]:
    """Two workers that serve it."""
    with running("--workers", "2", "--keys", str(folder / ".keys"), models=folder) as server:
        yield server


def write(folder: Path, **traffic: object) -> None:
    """Replace iris's traffic.json as a tool would: at once."""
    fresh = folder / "iris" / ".traffic.new"
    fresh.write_text(json.dumps(traffic))
    fresh.replace(folder / "iris" / "traffic.json")


def versions(url: str, times: int = 12) -> set[str]:
    """Ask over new connections, so that both workers answer some; return the versions that did."""
    found = set()
    for _ in range(times):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.request("POST", "/v1/models/iris:predict", json.dumps(ROW))
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        assert answer.status == 200, text
        found.add(json.loads(text)["model_version"])
    return found


def add(folder: Path, version: str) -> None:
    """Put a version into the folder at once."""
    staged = folder / ".staged"
    shutil.copytree(MODELS / "iris" / "2", staged)
    os.replace(staged, folder / "iris" / version)


def test_a_new_version_serves_without_a_failed_request(live: Server, folder: Path, eventually: Wait) -> None:
    """A version that appears in the folder takes over in every worker, and no request fails meanwhile."""
    failures, stop, asked = [], threading.Event(), 0

    def ask() -> None:
        nonlocal asked
        with httpx.Client(base_url=live.url, timeout=20) as client:
            while not stop.is_set():
                answer = client.post("/v1/models/iris:predict", json=ROW)
                asked += 1
                if answer.status_code != 200 or answer.json()["model_version"] not in ("1", "2", "3"):
                    failures.append(answer.text)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    add(folder, "2")
    eventually(lambda: versions(live.url) == {"2"})
    add(folder, "3")
    eventually(lambda: versions(live.url) == {"3"})
    stop.set()
    for asker in askers:
        asker.join()
    assert not failures
    assert asked > 50
    assert httpx.post(f"{live.url}/v1/models/iris/versions/1:predict", json=ROW).status_code == 503
    assert httpx.get(f"{live.url}/v1/models/iris/versions/2").status_code == 200


def generations(url: str) -> object:
    return httpx.get(f"{url}/v2/health/ready").json()["generations"]["iris"]


def test_the_document_decides_who_serves(live: Server, folder: Path, eventually: Wait) -> None:
    """Replacing traffic.json moves the traffic back and forth; one that can't be read changes nothing.

    Readiness tells the generation that is served, and how far it is behind what the folder asks for.
    """
    add(folder, "2")
    eventually(lambda: versions(live.url) == {"2"})
    write(folder, generation=1, stable="1")
    eventually(lambda: versions(live.url) == {"1"})
    (folder / "iris" / "traffic.json").write_text("{")
    eventually(lambda: "traffic.json" in httpx.get(f"{live.url}/v1/models").text)
    assert versions(live.url) == {"1"}
    write(folder, generation=2, stable="9")
    eventually(lambda: "stable is version 9" in httpx.get(f"{live.url}/v1/models").text)
    eventually(lambda: generations(live.url) == {"serving": 1, "asked": 2, "lag": 1})
    assert versions(live.url) == {"1"}
    write(folder, generation=3, stable="2")
    eventually(lambda: versions(live.url) == {"2"})
    eventually(lambda: generations(live.url) == {"serving": 3, "asked": 3, "lag": 0})


def removed(folder: Path) -> bool:
    """Remove a folder; the server may still be writing the history of the last change to it."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def test_a_model_that_leaves_the_folder_leaves_the_server(live: Server, folder: Path, eventually: Wait) -> None:
    """A removed model is 404 after a while; one that is unloaded on purpose is 503 and comes back when asked.

    The log and the metrics tell of both.
    """
    shutil.copytree(MODELS / "diabetes", folder / "diabetes")
    eventually(lambda: httpx.get(f"{live.url}/v2/models/diabetes/ready").status_code == 200)
    write(folder, generation=1, unloaded=True)
    eventually(lambda: httpx.post(f"{live.url}/v1/models/iris:predict", json=ROW).status_code == 503)
    write(folder, generation=2)
    eventually(lambda: httpx.post(f"{live.url}/v1/models/iris:predict", json=ROW).status_code == 200)
    eventually(lambda: removed(folder / "iris"))
    eventually(lambda: httpx.post(f"{live.url}/v1/models/iris:predict", json=ROW).status_code == 404)
    eventually(lambda: 'serving_model_refused{model="iris"} 1.0' in httpx.get(f"{live.url}/metrics").text)
    for line in ("iris is unloaded: as asked", "1 has vanished from the folder", "iris is unloaded: nothing of it"):
        eventually(lambda line=line: line in live.output())
    assert httpx.get(f"{live.url}/v2/models/diabetes/ready").status_code == 200


def test_a_folder_whose_volume_is_gone_takes_nothing_down(
    live: Server, folder: Path, key: str, eventually: Wait
) -> None:
    """An empty folder in the place of the models is no order to unload them: it is an error, and ends by itself."""

    def gone() -> bool:
        return "serving_models_folder_gone 1.0" in httpx.get(f"{live.url}/metrics").text

    assert not gone()
    away = folder.with_name(f"{folder.name}-volume")
    folder.rename(away)
    folder.mkdir()
    eventually(gone)
    assert versions(live.url) == {"1"}
    assert "the models folder holds nothing of what is served (iris)" in live.output()
    assert "is its volume mounted?" in httpx.get(f"{live.url}/v1/models").text
    ready = httpx.get(f"{live.url}/v2/health/ready")
    assert (ready.status_code, ready.json()["not_served"]) == (200, [])
    assert "is its volume mounted?" in ready.json()["folder_gone"]
    for answer in (
        httpx.put(
            f"{live.url}/v1/repository/models/iris/versions/next",
            content=(MODELS / "iris" / "2" / "model.onnx").read_bytes(),
            headers={"authorization": f"Bearer {key}"},
        ),
        httpx.post(f"{live.url}/v1/repository/models/iris/rollback", headers={"authorization": f"Bearer {key}"}),
    ):
        assert (answer.status_code, "is its volume mounted?" in answer.json()["error"]) == (503, True), answer.text
    time.sleep(GONE_S + 0.5)  # a model that has vanished is kept so long
    assert versions(live.url) == {"1"}
    assert list(folder.iterdir()) == [], "nothing is written into the bare mount point"
    folder.rmdir()
    away.rename(folder)
    eventually(lambda: not gone())
    add(folder, "2")
    eventually(lambda: versions(live.url) == {"2"})


def test_the_only_version_serves_on_while_its_file_is_half_there(live: Server, folder: Path, eventually: Wait) -> None:
    """A file that is being copied over the one that serves takes nothing down; readiness names it until it is whole."""
    file = folder / "iris" / "1" / "model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    eventually(lambda: httpx.get(f"{live.url}/v2/health/ready").json()["not_served"] == ["iris 1"])
    assert versions(live.url) == {"1"}
    file.write_bytes(whole)
    eventually(lambda: httpx.get(f"{live.url}/v2/health/ready").json()["not_served"] == [])
    assert versions(live.url) == {"1"}


def test_a_worker_that_restarts_serves_the_current_state(live: Server, folder: Path, eventually: Wait) -> None:
    """What replaces a killed worker answers with the version that the others answer with."""
    from tests.commands.test_command import children

    add(folder, "2")
    write(folder, generation=1, stable="1")
    eventually(lambda: versions(live.url) == {"1"})
    before = children(live.process.pid)
    os.kill(min(before), 9)
    eventually(lambda: len(children(live.process.pid) - before) == 1)
    eventually(lambda: versions(live.url, 30) == {"1"})


def test_a_worker_that_starts_beside_a_half_copied_file_serves_once_it_is_whole(
    live: Server, folder: Path, eventually: Wait
) -> None:
    """What replaces a killed worker may find the file half there: it gets the version when the same bytes are back."""
    from tests.commands.test_command import children

    file = folder / "iris" / "1" / "model.onnx"
    whole = file.read_bytes()
    before = children(live.process.pid)
    file.write_bytes(whole[:1000])
    os.kill(min(before), 9)
    eventually(lambda: len(children(live.process.pid) - before) == 1)
    eventually(lambda: 503 in statuses(live.url))
    file.write_bytes(whole)
    eventually(lambda: statuses(live.url) == {200})
    eventually(lambda: httpx.get(f"{live.url}/v2/health/ready").json()["not_served"] == [])


def statuses(url: str, times: int = 30) -> set[int]:
    """Ask over new connections, so that both workers answer some; return the statuses."""
    return {httpx.post(f"{url}/v1/models/iris:predict", json=ROW).status_code for _ in range(times)}


def test_tritons_client_unloads_and_loads(live: Server, folder: Path, key: str) -> None:
    """What Triton's own client asks of the repository is done in every worker when the call returns."""
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(live.url.removeprefix("http://"))
    allowed = {"Authorization": f"Bearer {key}"}
    for _ in range(2):
        client.unload_model("iris", headers=allowed)
        assert not client.is_model_ready("iris")
        (entry,) = client.get_model_repository_index()
        assert entry == {"name": "iris", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
        client.load_model("iris", headers=allowed)
        assert versions(live.url, 6) == {"1"}
    history = [json.loads(line) for line in (folder / "iris" / "history.jsonl").read_text().splitlines()]
    assert [(entry["who"], entry["what"]) for entry in history] == [("ops", "unload"), ("ops", "load")] * 2
