"""Deploying over HTTP: every verb, the generation check, the history, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from google.protobuf.json_format import ParseDict

from serving.access.key_store import KeyStore
from serving.http_api.app import create_app
from serving.protocols.messages import message, pool
from serving.settings import Settings
from tests.conftest import MODELS

AT = "/v1/repository/models/iris"
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris", root / "iris")
    return root


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[TestClient]:
    keys = folder.parent / f"{folder.name}.keys"
    key = KeyStore(keys).create("ann", frozenset({"deploy"}))
    with TestClient(create_app(Settings(models=folder, keys=str(keys)))) as client:
        client.headers["authorization"] = f"Bearer {key}"
        yield client


@pytest.fixture
def client(running: TestClient) -> TestClient:
    """The application, with version 2 stable and nothing else going on."""
    answer = running.post(f"{AT}/promote", json={"version": "2"})
    assert answer.status_code == 200, answer.text
    return running


def test_every_verb_is_served_when_it_returns(client: TestClient) -> None:
    """A change is in force for the next request, and answers with the new state, whose generation is its ETag."""

    def order(verb: str, **body: object) -> dict[str, object]:
        answer = client.post(f"{AT}/{verb}", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["etag"] == f'"{answer.json()["generation"]}"'
        return dict(answer.json()["traffic"])

    def version(path: str = "") -> str:
        answer = client.post(f"/v1/models/iris{path}:predict", json=ROW)
        return str(answer.json().get("model_version", answer.status_code))

    assert order("promote", version="1", why="better")["stable"] == "1"
    assert version() == "1"
    order("canary", version="2", percent=100)
    assert version() == "2"
    order("canary", version=None)
    assert version() == "1"
    order("shadow", version="2")
    assert version() == "1"
    order("label", label="blue", version="2")
    assert version("/labels/blue") == "2"
    order("label", label="blue")
    assert version("/labels/blue") == "404"
    assert order("rollback")["stable"] == "2"
    assert version() == "2"
    order("unload")
    assert version() == "503"
    order("load")
    assert version() == "2"
    order("keep", keep={"latest": 1})
    assert version("/versions/1") == "503"
    order("keep", keep="all")
    assert version("/versions/1") == "1"


def test_a_rollback_says_what_it_passed_over(client: TestClient, folder: Path) -> None:
    """The answer tells which version before could not serve, and why."""
    shutil.copytree(folder / "iris" / "2", folder / "iris" / "3")
    file = folder / "iris" / "2" / "model.onnx"
    whole = file.read_bytes()
    try:
        for version in ("1", "2", "3"):
            assert client.post(f"{AT}/promote", json={"version": version}).status_code == 200
        file.write_bytes(whole[:1000])
        answer = client.post(f"{AT}/rollback", json={})
        assert (answer.status_code, answer.json()["traffic"]["stable"]) == (200, "1"), answer.text
        assert "version 2 is passed over: model.onnx has 1000 bytes" in answer.json()["notes"][0]
    finally:
        file.write_bytes(whole)
        client.post(f"{AT}/promote", json={"version": "1"})
        shutil.rmtree(folder / "iris" / "3")


@pytest.mark.parametrize(
    ("keep", "policy"),
    [
        ("all", {"all": {}}),
        ({"latest": 3}, {"latest": {"num_versions": 3}}),
        (["1", "2"], {"specific": {"versions": [1, 2]}}),
    ],
)
def test_the_configuration_says_which_versions_stay(client: TestClient, keep: Any, policy: dict[str, Any]) -> None:
    """Triton's configuration has the version policy in force and the priorities, over HTTP and as gRPC's message."""
    assert client.post(f"{AT}/keep", json={"keep": keep}).status_code == 200
    config = client.get("/v2/models/iris/config").json()
    assert config["version_policy"] == policy
    assert config["dynamic_batching"]["priority_levels"] == 3
    assert config["dynamic_batching"]["default_priority_level"] == 2
    ParseDict({"config": config}, message("ModelConfigResponse")(), descriptor_pool=pool)
    assert "schedule_policy" in client.get("/v2").json()["extensions"]


def test_times_of_answers_and_of_failures_are_told_apart(client: TestClient) -> None:
    """Statistics of what was answered hold no time of what was refused, and their parts are not more than the whole."""
    answered = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5, 3, 1, 0]}]}
    for _ in range(5):
        assert client.post("/v2/models/iris/infer", json=answered).status_code == 200
    before = client.get("/v2/models/iris/versions/2/stats").json()["model_stats"][0]["inference_stats"]
    refused = {"inputs": [{**answered["inputs"][0], "data": [[0] * 1000] * 100}]}
    for _ in range(20):
        assert client.post("/v2/models/iris/infer", json=refused).status_code == 400
    after = client.get("/v2/models/iris/versions/2/stats").json()["model_stats"][0]["inference_stats"]
    assert after["fail"]["count"] == before["fail"]["count"] + 20
    assert after["fail"]["ns"] > before["fail"]["ns"]
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert after[part] == before[part]
    assert sum(after[p]["ns"] for p in ("queue", "compute_input", "compute_infer", "compute_output")) <= (
        after["success"]["ns"] * 1.01
    )


def test_history_names_who_and_why(client: TestClient) -> None:
    """Each change is in the history, with the name of the key that made it."""
    client.post(f"{AT}/promote", json={"version": "1", "why": "better"})
    (last,) = client.get(f"{AT}/history?limit=1").json()["history"]
    assert (last["who"], last["what"], last["why"]) == ("ann", "promote 1", "better")
    assert last["before"]["stable"] == "2"
    assert last["after"]["stable"] == "1"


def test_the_loser_of_a_race_gets_412_and_the_state(client: TestClient) -> None:
    """A change made for a generation that has passed is refused, with the state that won; a fresh one is made."""
    state = client.get(AT)
    etag = state.headers["etag"]
    assert (
        client.post(f"{AT}/label", json={"label": "a", "version": "1"}, headers={"If-Match": etag}).status_code == 200
    )
    late = client.post(f"{AT}/label", json={"label": "a", "version": "2"}, headers={"If-Match": etag})
    assert late.status_code == 412
    assert late.json()["current"]["labels"] == {"a": "1"}
    assert late.json()["current"]["generation"] == state.json()["generation"] + 1
    assert client.get(AT).json()["traffic"]["labels"] == {"a": "1"}
    assert client.post(f"{AT}/label", json={"label": "a"}, headers={"If-Match": "*"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        (f"{AT}/promote", {"version": "9"}, 404, "no version '9'"),
        (f"{AT}/promote", {"version": 1}, 400, 'version: should be a version such as "3"'),
        (f"{AT}/promote", {}, 400, "version: is missing"),
        (f"{AT}/promote", [], 400, "should be an object"),
        (f"{AT}/promote", {"version": "1", "force": True}, 400, "force: there is no such field"),
        (f"{AT}/canary", {"version": "1", "percent": 0}, 400, "percent: should be greater than 0"),
        (f"{AT}/canary", {"version": "2"}, 400, "already is stable"),
        (
            f"{AT}/canary",
            {"version": "1", "sticky": {"feature": "age"}},
            400,
            "no feature 'age'; features: sepal_length",
        ),
        (f"{AT}/label", {"label": "latest", "version": "1"}, 400, "'latest' follows the role"),
        ("/v1/repository/models/rose/promote", {"version": "1"}, 404, "no model is called 'rose'"),
    ],
)
def test_what_is_refused_is_said(client: TestClient, path: str, body: object, status: int, text: str) -> None:
    """A bad order changes nothing, and its answer names the field or what there is."""
    before = client.get(AT).json()["traffic"]
    answer = client.post(path, json=body)
    assert (answer.status_code, text in answer.json()["error"]) == (status, True), answer.text
    after = client.get(AT).json()["traffic"]
    assert {k: v for k, v in after.items() if k not in ("generation", "since")} == {
        k: v for k, v in before.items() if k not in ("generation", "since")
    }


def test_only_deployers_may(client: TestClient) -> None:
    """Without a key that may deploy nothing changes, nothing of a body is looked at, and the history stays closed."""
    before = client.get(AT).headers["etag"]
    for verb in ("promote", "rollback", "unload", "nonsense"):
        answer = client.post(f"{AT}/{verb}", content=b"{" * 100, headers={"authorization": ""})
        assert answer.status_code in ((401, 403) if verb != "nonsense" else (404,)), answer.text
    assert client.get(f"{AT}/history", headers={"authorization": ""}).status_code in (401, 403)
    assert client.get(AT).headers["etag"] == before


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("PUT", "versions/next?note=x&allow_breakin=true", "note, allow_breaking"),
        ("POST", "promote?allow_breakin=true", "none"),
        ("POST", "rollback?allow_breakin=1", "none"),
        ("GET", "history?limit=3&allow_breakin=1", "limit"),
    ],
)
def test_a_misspelt_parameter_is_named(client: TestClient, folder: Path, method: str, path: str, known: str) -> None:
    """A parameter that a route does not have is refused with those that it has, and nothing changes."""
    before = client.get(AT).headers["etag"]
    answer = client.request(method, f"{AT}/{path}", content=b'{"version": "1"}')
    assert answer.status_code == 400, answer.text
    assert f"allow_breakin: there is no such parameter; parameters: {known};" in answer.json()["error"]
    assert answer.json()["details"][0]["path"] == "/query/allow_breakin"
    assert client.get(AT).headers["etag"] == before
    assert client.request(method, f"{AT}/{path}", headers={"authorization": ""}).status_code == 401


def test_each_wrong_field_of_a_body_is_named(client: TestClient) -> None:
    """What is wrong with an order is said of each field, by its place."""
    answer = client.post(f"{AT}/canary", content=b'{"percent": 200, "colour": 1}')
    assert answer.status_code == 400
    assert {detail["path"] for detail in answer.json()["details"]} == {"/percent", "/colour"}


def test_a_body_is_bounded(client: TestClient) -> None:
    """A body that no order needs is refused by its size."""
    assert client.post(f"{AT}/promote", content=b" " * 100_000).status_code == 413


def test_a_bad_if_match_is_named(client: TestClient) -> None:
    """A generation that is none is refused, not ignored."""
    answer = client.post(f"{AT}/rollback", json={}, headers={"If-Match": "soon"})
    assert (answer.status_code, "If-Match: should be a generation" in answer.json()["error"]) == (400, True)


def test_figures_of_a_trial(client: TestClient) -> None:
    """With a shadow, the state shows how often labels agree, how far scores are apart, and how long it takes."""
    client.post(f"{AT}/shadow", json={"version": "1"})
    for _ in range(200):
        client.post("/v1/models/iris:predict", json=ROW)
        found = client.get(AT).json()["figures"]
        if found["1"].get("shadow", {}).get("compared"):
            break
    shadow = found["1"]["shadow"]
    assert 0 <= shadow["agreement"] <= 1
    assert shadow["mean_seconds"] > 0
    assert shadow["score_difference"]["rows_up_to"]["+Inf"] >= 1
    assert found["2"]["predictions"] >= 1
    assert client.get(AT).json()["serving"]["shadow"] == "1"


def test_the_gates_report(client: TestClient, folder: Path) -> None:
    """What the gate found out about a version can be read; a file beside it can't say otherwise."""
    (folder / "iris" / "1" / "gate.json").write_text(json.dumps({"ok": False, "reasons": ["no"]}))
    found = client.get(f"{AT}/report/1").json()
    assert found["ok"] is True
    assert "golden rows" in [check["name"] for check in found["checks"]]
    assert client.get(f"{AT}/report/9").status_code == 404
    assert client.get(f"{AT}/report/..%2F..").status_code == 404


def test_the_documentation_shows_the_verbs(client: TestClient) -> None:
    """Each verb is in the OpenAPI document with its body, an example and its refusals."""
    paths = client.get("/openapi.json").json()["paths"]
    for verb in ("promote", "canary", "shadow", "label", "rollback", "unload", "load", "keep"):
        operation = paths["/v1/repository/models/{model}/" + verb]["post"]
        assert operation["summary"]
        assert {"200", "412", "503"} <= operation["responses"].keys()
        assert "if-match" in [p["name"] for p in operation["parameters"]]
        assert operation["security"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["why"]
    assert "$defs" not in json.dumps(paths)
