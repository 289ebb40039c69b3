"""What is told of single requests: access log, slow requests, Server-Timing."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from fastapi.testclient import TestClient

from serving.access.key_store import KeyStore
from serving.http_api.app import create_app
from serving.prediction.request_log import Ended, RequestLog
from serving.settings import Settings
from tests.conftest import MODELS, Server, running

VALUE = 5.12345
ROW = {"sepal_length": VALUE, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
PREDICT = "/v1/models/{model}:predict"
_TIMING = re.compile(r"decode;dur=[\d.]+, queue;dur=[\d.]+, inference;dur=[\d.]+, total;dur=[\d.]+")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris", folder / "iris")
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    file = tmp_path_factory.mktemp("keys") / "serving.keys"
    return KeyStore(file).create("app", frozenset({"predict"})), file


@pytest.fixture(scope="module")
def telling(models: Path, key: tuple[str, Path]) -> Iterator[Server]:
    """A server that logs every request, and says in answers where their time went."""
    flags = ("--access-log", "1", "--server-timing", "--keys", str(key[1]), "--grpc-port", "0", "--log-level", "error")
    with running(*flags, models=models) as server:
        yield server


def lines(server: Server) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in server.output().splitlines() if line.startswith("{")]
    return [line for line in found if line["logger"] == "serving.requests"]


def test_every_kind_of_request_has_its_line(
    telling: Server, key: tuple[str, Path], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Fast path, ASGI, gRPC, other routes and refusals: who, what, how it ended, how large; and no feature."""
    bearer = {"authorization": f"Bearer {key[0]}"}
    body = json.dumps({"instances": [ROW]}).encode()
    bad = json.dumps({"instances": [ROW | {"petal_width": "wide"}]}).encode()
    due: dict[str, tuple[str, str | None, str | None, int | str, str | None, int]] = {}
    with httpx.Client(base_url=telling.url, headers=bearer) as client:

        def ask(identity: str, path: str, content: Any = None, **headers: str) -> httpx.Response:
            headers |= {"x-request-id": identity, "content-type": "application/json"}
            return client.request("GET" if content is None else "POST", path, content=content, headers=headers)

        path = "/v1/models/iris:predict"
        for identity, content in (("fast", body), ("again", body), ("asgi", iter([body]))):
            answer = ask(identity, path, content)
            assert _TIMING.fullmatch(answer.headers["server-timing"])
            due[identity] = PREDICT, "iris", "2", 200, "app", len(answer.content)
        answer = ask("bad", path, bad)
        due["bad"] = PREDICT, "iris", "2", 422, "app", len(answer.content)
        answer = ask("stranger", path, body, authorization="Bearer x")
        due["stranger"] = PREDICT, None, None, 401, None, len(answer.content)
        answer = ask("unknown", "/v1/models/nobody:predict", body)
        due["unknown"] = PREDICT, "nobody", None, 404, None, len(answer.content)
        answer = ask("read", "/v2/models/iris")
        due["read"] = "/v2/models/{model}", "iris", None, 200, "app", len(answer.content)
        ask("nowhere", f"/nowhere/{VALUE}?sepal_length={VALUE}")
    address = re.search(r"gRPC: (127\.0\.0\.1:\d+)", telling.output())
    assert address is not None
    tensor = triton_grpc.InferInput("features", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([list(ROW.values())], np.float32))
    with triton_grpc.InferenceServerClient(address[1]) as asked:
        answer_bytes = (
            asked.infer("iris", [tensor], headers=bearer | {"x-request-id": "grpc"}).get_response().ByteSize()
        )
    due["grpc"] = "ModelInfer", "iris", "2", "OK", "app", answer_bytes
    eventually(lambda: {*due, "nowhere"} <= {line["request_id"] for line in lines(telling)})
    by_id = {line["request_id"]: line for line in lines(telling)}
    assert len(by_id) == len(lines(telling))
    names = ("route", "model", "version", "status", "principal", "bytes")
    assert {identity: tuple(by_id[identity][name] for name in names) for identity in due} == due
    assert by_id["nowhere"]["status"] == 404
    assert all(line["ms"] > 0 and line["message"] == "request" for line in by_id.values())
    assert str(VALUE) not in telling.output()
    assert key[0] not in telling.output()


def test_slow_requests_are_logged_with_their_stages(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What takes longer than is wanted has a line that says where its time went, though no other has one."""
    with TestClient(create_app(Settings(models=models, slow_log_s=1e-6))) as client:
        assert "server-timing" not in client.post("/v1/models/iris:predict", json={"instances": [ROW]}).headers
    found = [record.fields for record in caplog.records if record.getMessage() == "slow request"]  # type: ignore[attr-defined]
    assert len(found) == 1
    stages = [found[0][f"{name}_ms"] for name in ("decode", "queue", "inference")]
    assert all(ms >= 0 for ms in stages)
    assert sum(stages) <= found[0]["ms"] + 0.01
    caplog.clear()
    with TestClient(create_app(Settings(models=models, slow_log_s=3600))) as client:
        client.post("/v1/models/iris:predict", json={"instances": [ROW]})
    assert not [record for record in caplog.records if record.name == "serving.requests"]


def test_a_share_of_requests_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Of many requests the share that is asked for gets lines."""
    random.seed(5)
    log = RequestLog(0.1, None)
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            log.asked(Ended(b"id", "/", 200, 1), 0.01, None, None, None)
    assert 70 < len(caplog.records) < 130
