"""`serving run --app`: somebody's application with this server's workers, fast path, metrics, reload and end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx2 as httpx
import pytest

from serving import library
from serving.protocols.messages import message
from serving.settings import Settings
from tests.conformance.own import grpc_address
from tests.conftest import Server
from tests.library.conftest import ROWS

SERVICE = """
import os
import serving
from fastapi import Depends, FastAPI

app = FastAPI(lifespan=serving.lifespan())
app.include_router(serving.router, prefix="/ml")
app.add_exception_handler(serving.ServingError, serving.error_response)

@app.post("/flowers")
async def flowers(rows: list[dict[str, float]], iris: serving.Predictor = Depends(serving.predictor("iris"))):
    answers = await iris.predict(rows, version="1")
    return {"said": "first", "worker": os.getpid(), "labels": [one["label"] for one in answers]}
"""
WITHOUT = "from fastapi import FastAPI\napp = FastAPI()\nno_app = 3\n"


def test_an_application_is_served_by_workers_that_follow_its_code(
    models: Path, tmp_path: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Both workers answer its routes and predictions, gRPC beside; edited code takes over; the end is clean."""
    (tmp_path / "service.py").write_text(SERVICE)
    flags = ("--app", "service:app", "--reload", "--workers", "2", "--grpc-port", "0")
    server = Server(*flags, models=models, cwd=tmp_path).wait()
    try:

        def ask() -> tuple[str, int]:
            answer = httpx.post(f"{server.url}/flowers", json=ROWS).json()
            assert answer["labels"] == ["setosa", "virginica"]
            return answer["said"], answer["worker"]

        body = {"instances": ROWS}
        for _ in range(3):
            assert httpx.post(f"{server.url}/ml/v1/models/iris/versions/1:predict", json=body).status_code == 200
        request = message("ModelInferRequest")(model_name="iris", model_version="1")
        request.inputs.add(name="X", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([5.1, 3.5, 1.4, 0.2])
        with grpc.insecure_channel(grpc_address(server)) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            with pytest.raises(grpc.RpcError) as refused:
                call(request.SerializeToString(), timeout=20)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # it knows the model, whose input is not X
        eventually(lambda: _counted(server, 'POST",route="/ml/v1/models/{model}/versions/{version}:predict') == 3)
        assert ask()[0] == "first"
        eventually(lambda: _counted(server, 'POST",route="/flowers') >= 1)
        (tmp_path / "service.py").write_text(SERVICE.replace("first", "second"))
        seen: set[int] = set()

        def both_are_new() -> bool:
            said, worker = ask()
            seen.add(worker)
            if said == "first":
                seen.clear()
            return len(seen) >= 2

        eventually(both_are_new)
    finally:
        assert server.stop() == 0, server.output()


def _counted(server: Server, labels: str) -> float:
    lines = httpx.get(f"{server.url}/ml/metrics").text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("serving_http_requests_total") and labels in line and "2xx" in line
    )


def test_an_application_without_models_does_not_start(models: Path, tmp_path: Path) -> None:
    """An application that never enters the lifespan ends the command with the reason in a line, and no traceback."""
    (tmp_path / "service.py").write_text(WITHOUT)
    server = Server("--app", "service:app", models=models, cwd=tmp_path)
    assert server.process.wait(60) == 3
    assert "does not enter serving.lifespan when it starts" in server.output()
    assert "Traceback" not in server.output()
    server.stop()


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("nowhere:app", "there is no module nowhere"),
        ("service:other", "other there is nothing"),
        ("service:no_app", "should name a FastAPI application, and no_app there is int"),
    ],
)
def test_what_can_not_be_served_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: str, said: str) -> None:
    """What --app names is an application that is there, or the worker says what is there instead."""
    (tmp_path / "service.py").write_text(WITHOUT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(library, "_hosted", None)
    services: Any = object()
    try:
        with pytest.raises(library.Unfit, match=said):
            library.host(Settings(app=app), services)
    finally:
        sys.modules.pop("service", None)
