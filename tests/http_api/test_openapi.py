"""The OpenAPI document says what is really sent, of every route, and is reviewed like code.

`python -m tests.http_api.test_openapi` writes the snapshot anew: look at its diff before you commit it.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import onnx
import pyarrow as pa
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serving.access.key_store import KeyStore
from serving.http_api.app import create_app
from serving.http_api.openapi.document import document
from serving.protocols.strict_json import dumps
from serving.settings import Settings
from tests.bulk.test_formats import arrow
from tests.bulk.test_streams import ARROW, CSV, NDJSON
from tests.conftest import MODELS, Server
from tests.drills.openapi import fuzz

SNAPSHOT = Path(__file__).with_name("openapi.json")
IRIS = "/v1/repository/models/iris"
ROW = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """The application over a copy of the shipped models, asked by somebody who may deploy."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        shutil.copytree(MODELS, root, ignore=shutil.ignore_patterns(".*"))
        (root / "iris" / "model.toml").write_text("[feedback]")
        keys = Path(folder) / "keys"
        key = KeyStore(keys).create("ann", frozenset({"deploy"}))
        jobs = {"jobs_database_url": f"sqlite:///{folder}/jobs.db", "jobs_folder": f"{folder}/jobs"}
        with TestClient(create_app(Settings(models=root, keys=str(keys), **jobs))) as made:
            made.headers["authorization"] = f"Bearer {key}"
            yield made


@pytest.fixture(scope="module")
def described(client: TestClient) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/openapi.json").json()
    return document


def snapshot(app: FastAPI) -> str:
    """Write the document, without what changes with every release."""
    made = document(app, app.state.serving)
    made["info"]["version"] = "0"
    return json.dumps(json.loads(dumps(made)), indent=1) + "\n"


def test_the_document_is_the_one_that_was_reviewed(client: TestClient) -> None:
    """What the document says of the shipped models changes only where somebody has looked at it."""
    app: Any = client.app
    assert snapshot(app) == SNAPSHOT.read_text(), "see its diff after: python -m tests.http_api.test_openapi"


def _strict(schema: Any) -> Any:
    """Refuse what a schema of an answer does not name: clients have to bear it, and the document should have it."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


class Asker:
    """Asks, holds each answer against the document, and keeps which statuses of which operations were seen."""

    def __init__(self, client: TestClient, described: dict[str, Any]) -> None:
        self.client = client
        self._strict = _strict(copy.deepcopy(described))
        self._described = described
        self.seen: set[tuple[str, str]] = set()
        self.names = {"model": "iris", "version": "1", "label": "stable", "job": ""}

    def __call__(self, method: str, template: str, status: int, /, at: str = "", **more: Any) -> Any:
        answer = self.client.request(method, at or template.format(**self.names), **more)
        assert answer.status_code == status, (template, answer.status_code, answer.text)
        responses = self._described["paths"][template][method.lower()]["responses"]
        response = responses[str(status)]
        if "$ref" in response:
            response = self._described["components"]["responses"][response["$ref"].rsplit("/", 1)[1]]
        self.seen.add((method.lower(), template))
        if status == 204:
            return answer
        kind = answer.headers["content-type"].split(";")[0]
        schema = response["content"][kind]["schema"]
        if kind == "application/json":
            whole = {**_strict(schema), "components": self._strict["components"]}
            faults = [str(fault) for fault in jsonschema_rs.Draft202012Validator(whole).iter_errors(answer.json())]
            assert not faults, (template, faults[:3], answer.text[:500])
        return answer


def _ask_jobs(ask: Asker, eventually: Callable[[Callable[[], bool]], None]) -> None:
    job = {"json": {"model": "iris", "rows": [ROW]}, "headers": {"idempotency-key": "a"}}
    for status in (201, 200):
        ask.names["job"] = ask("POST", "/v1/jobs", status, **job).json()["id"]
    eventually(lambda: ask("GET", "/v1/jobs/{job}", 200).json()["state"] == "succeeded")
    ask("POST", "/v1/jobs", 409, json={"model": "iris", "rows": [[1]]}, headers={"idempotency-key": "a"})
    ask("POST", "/v1/jobs/{job}/cancel", 409)


def _ask_streams(ask: Asker, path: str, content: dict[str, Any]) -> None:
    """Send the example as a stream of each kind: it is a good row, and the answer is of the same kind, or as asked."""
    if path.endswith("/infer"):
        return
    row = content["application/json"]["example"]["instances"]
    bodies = {NDJSON: content[NDJSON]["example"], CSV: content[CSV]["example"], ARROW: arrow(pa.Table.from_pylist(row))}
    assert content.keys() == {"application/json", *bodies}
    for kind, body in bodies.items():
        ask("POST", path, 200, content=body, headers={"content-type": kind})
        answer = ask("POST", path, 200, content=body, headers={"content-type": kind, "accept": NDJSON})
        assert answer.text.endswith('{"summary":{"good":1,"bad":0}}\n'), (path, kind, answer.text)


def test_every_route_answers_as_the_document_says(
    client: TestClient, described: dict[str, Any], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """A 200 of every operation has the documented form, no key more or less; so have the errors."""
    ask = Asker(client, described)
    _ask_jobs(ask, eventually)
    for path, operations in described["paths"].items():
        if "get" in operations:
            ask("GET", path, 200)
            if "{model}" in path:
                ask("GET", path, 404, at=path.format(model="rose", version="1", label="stable"))
        elif path.endswith((":predict", "/infer")):
            content = operations["post"]["requestBody"]["content"]
            ask("POST", path, 200, json=content["application/json"]["example"])
            ask("POST", path, 400, content=b"{")
            _ask_streams(ask, path, content)
    infer, predict = "/v2/models/iris/infer", "/v1/models/iris:predict"
    ask("POST", predict, 200, json={"inputs": {name: [value] * 2 for name, value in ROW.items()}})
    ask("POST", predict, 422, json={"instances": [{**ROW, "petal_width": "wide"}]})
    feedback, told = "/v1/models/{model}:feedback", {"id": "a", "outcomes": ["setosa"]}
    ask("POST", feedback, 200, json={"feedback": [told]})
    ask("POST", feedback, 422, json={"feedback": [{**told, "outcomes": ["rose"]}]})
    ask("POST", feedback, 400, content=b"{")
    ask("POST", predict, 413, content=b"x" * (8 * 1024 * 1024 + 1))
    ask("POST", predict, 415, content=b"x", headers={"content-encoding": "br"})
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}
    ask("POST", infer, 200, json={"id": "a", "inputs": [tensor], "parameters": {"binary_data_output": True}})
    ask("DELETE", "/v1/jobs/{job}", 204)
    ask("DELETE", "/v1/jobs/{job}", 404)
    ask("POST", "/v2/repository/index", 200)
    ask("POST", "/v2/repository/index", 400, json={"ready": 1})
    for verb, order in (
        ("label", {"label": "blue", "version": "1"}),
        ("canary", {"version": "1", "percent": 20, "sticky": {"header": "x-user"}}),
        ("canary", {}),
        ("shadow", {"version": "1", "judge": {"after_s": 3600}}),
        ("keep", {"keep": "all"}),
        ("rollback", {}),
        ("promote", {"version": "1", "why": "better"}),
        ("unload", {}),
        ("load", {}),
    ):
        path = "/v1/repository/models/{model}/" + verb
        ask("POST", path, 200, json=order)
        ask("GET", "/v1/repository/models/{model}", 200)
        ask("POST", path, 400, params={"colour": "red"})
        ask("POST", path, 412, json=order, headers={"if-match": '"0"'})
    for verb in ("unload", "load"):
        ask("POST", "/v2/repository/models/{model}/" + verb, 200)
    ask("GET", "/v1/repository/models/{model}/history", 400, params={"limit": 0})
    publish = "/v1/repository/models/{model}/versions/{version}"
    model = onnx.load(next((MODELS / "iris").glob("[0-9]*/model.onnx")))
    same = (MODELS / "iris" / "1" / "model.onnx").read_bytes()
    model.doc_string = "another"
    ask("PUT", publish, 200, content=same)
    ask("PUT", publish, 409, content=model.SerializeToString())
    ask("PUT", publish, 201, at=publish.format(model="rose", version="next"), content=same)
    ask("PUT", publish, 422, at=publish.format(model="iris", version="next"), content=b"no model")
    ask("DELETE", publish, 409)
    ask("DELETE", publish, 200, at=publish.format(model="iris", version="2"))
    ask("DELETE", publish, 404, at=publish.format(model="iris", version="2"))
    ask("GET", "/v1/repository/models/{model}/history", 200)
    del client.headers["authorization"]
    ask("GET", "/v1/repository/models/{model}/history", 401)
    operations = {(method, path) for path, item in described["paths"].items() for method in item}
    assert operations == ask.seen


def test_refusals_have_one_form_everywhere(described: dict[str, Any]) -> None:
    """FastAPI's 422 is nowhere: each status that is no 2xx is described by this server's own error."""
    text = json.dumps(described)
    assert "HTTPValidationError" not in text
    assert set(re.findall(r'"#/components/responses/([^"]+)"', text)) == set(described["components"]["responses"])
    for response in described["components"]["responses"].values():
        assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


def test_operations_have_names_of_their_own(described: dict[str, Any]) -> None:
    """Generators of clients call functions by operationId: each is there once, and is an identifier."""
    named = [o["operationId"] for item in described["paths"].values() for o in item.values()]
    assert len(named) == len(set(named))
    assert all(name.isidentifier() for name in named)


@pytest.mark.parametrize("server", ["fast_path"], indirect=True)
def test_random_requests_are_answered_as_described(server: Server, described: dict[str, Any]) -> None:
    """Some right and wrong requests that schemathesis makes of the document; the drill sends thousands."""
    chosen = ("/v1/models/iris:predict", "/v2/models/iris/infer", "/v1/models/{model}", "/v2/repository/index")
    few = {**described, "paths": {path: described["paths"][path] for path in chosen}}
    found = fuzz(few, server.url, 20)
    assert not found.untrue
    assert not found.wrong
    assert {200, 400, 404} <= found.statuses.keys()


if __name__ == "__main__":
    with TestClient(create_app(Settings(models=MODELS))) as renewing:
        SNAPSHOT.write_text(snapshot(renewing.app))  # type: ignore[arg-type]
