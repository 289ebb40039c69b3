"""What is told of single requests: access log, slow requests, spans, Server-Timing."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from fastapi.testclient import TestClient
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

from serving.access.key_store import KeyStore
from serving.engine.request import Run
from serving.engine.signature import Feature, Signature, TensorSpec
from serving.http_api.app import create_app
from serving.prediction.logged_row import row_of
from serving.prediction.request_log import Ended, RequestLog
from serving.prediction.spans import Described, SpanMaker, spans_of
from serving.prediction.tracing import Tracing
from serving.settings import Settings
from tests.conftest import MODELS, ROOT, Server

VALUE = 5.12345
ROW = {"sepal_length": VALUE, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
PREDICT = "/v1/models/{model}:predict"
_TIMING = re.compile(r"decode;dur=[\d.]+, queue;dur=[\d.]+, inference;dur=[\d.]+, encode;dur=[\d.]+, total;dur=[\d.]+")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(MODELS / "iris", folder / "iris")
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    file = tmp_path_factory.mktemp("keys") / "serving.keys"
    return KeyStore(file).create("app", frozenset({"predict", "jobs"})), file


class Receiver:
    """A receiver of spans in a process of its own; `endpoint` is what OTEL_EXPORTER_OTLP_ENDPOINT should say."""

    def __init__(self, folder: Path) -> None:
        self._printed = folder / "spans"
        with self._printed.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.prediction.otlp_receiver"], stdout=file, cwd=ROOT
            )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._printed.read_text().splitlines()[0]}"

    def started(self) -> bool:
        return self._printed.read_text().endswith("\n")

    def spans(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._printed.read_text().splitlines()[1:] if line.endswith("}")]


@pytest.fixture(scope="module")
def receiver(
    tmp_path_factory: pytest.TempPathFactory, eventually: Callable[[Callable[[], bool]], None]
) -> Iterator[Receiver]:
    made = Receiver(tmp_path_factory.mktemp("receiver"))
    try:
        eventually(made.started)
        yield made
    finally:
        made.process.kill()
        made.process.wait()


@pytest.fixture(scope="module")
def telling(models: Path, key: tuple[str, Path], receiver: Receiver) -> Iterator[Server]:
    """A server that logs every request, traces those of callers that ask for it, and says where their time went."""
    flags = ("--access-log", "1", "--server-timing", "--keys", str(key[1]), "--grpc-port", "0", "--log-level", "error")
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
    }
    flags += ("--max-delay-ms", "200", "--jobs-database-url", "sqlite")
    server = Server(*flags, models=models, environment=environment)
    try:
        yield server.wait()
    finally:
        server.stop()


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


def trace_parent(number: int, sampled: bool = True) -> dict[str, str]:
    """Return the header of a caller whose trace and span have this number."""
    return {"traceparent": f"00-{number:032x}-{number:016x}-0{sampled:d}"}


def tree(spans: list[dict[str, Any]], number: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the span of a request in a caller's trace, and those of its stages by name."""
    mine = [span for span in spans if span["trace"] == f"{number:032x}"]
    (whole,) = (span for span in mine if span["parent"] == f"{number:016x}")
    return whole, {span["name"]: span for span in mine if span["parent"] == whole["id"]}


def test_a_caller_s_trace_goes_on_over_every_transport(
    telling: Server, receiver: Receiver, key: tuple[str, Path], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Fast path, ASGI and gRPC: a span of the request under the caller's, and of its stages, one behind the other."""
    bearer = {"authorization": f"Bearer {key[0]}"}
    body = json.dumps({"instances": [ROW]}).encode()
    url = f"{telling.url}/v1/models/iris:predict"
    with httpx.Client(headers=bearer | {"content-type": "application/json"}) as client:
        client.post(url, content=body, headers=trace_parent(1) | {"x-request-id": "traced", "tracestate": "a=1,b=2"})
        client.post(url, content=iter([body]), headers=trace_parent(2))
        client.post(url, content=b"{}", headers=trace_parent(3))
        client.get(f"{telling.url}/v2/models/iris", headers=trace_parent(4))
        client.post(url, content=body, headers=trace_parent(5, sampled=False) | {"x-request-id": "unsampled"})
        client.post(url, content=body, headers={"x-request-id": "nobody's"})
    address = re.search(r"gRPC: (127\.0\.0\.1:\d+)", telling.output())
    assert address is not None
    tensor = triton_grpc.InferInput("features", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([list(ROW.values())], np.float32))
    with triton_grpc.InferenceServerClient(address[1]) as asked:
        asked.infer("iris", [tensor], headers=bearer | trace_parent(6))
    due = {f"{number:032x}" for number in (1, 2, 3, 4, 6)}
    eventually(lambda: due <= {span["trace"] for span in receiver.spans() if span["kind"] == 2})
    spans = receiver.spans()
    assert f"{5:032x}" not in {span["trace"] for span in spans}
    for number in (1, 2, 6):
        whole, stages = tree(spans, number)
        assert list(stages) == ["decode", "queue", "inference", "encode"]
        times = [time for span in stages.values() for time in (span["start"], span["end"])]
        assert times == sorted(times)
        assert whole["start"] <= times[0]
        assert times[-1] == whole["end"]
        (batch,) = (span for span in spans if span["id"] in stages["inference"]["links"])
        assert (batch["name"], batch["links"]) == ("batch", [whole["id"]])
        assert batch["attributes"] == {
            "serving.model.name": "iris",
            "serving.model.version": "2",
            "serving.batch.rows": 1,
            "serving.batch.requests": 1,
        }
    whole = tree(spans, 1)[0]
    assert (whole["name"], whole["kind"], whole["state"], whole["status"]) == (f"POST {PREDICT}", 2, "a=1,b=2", 0)
    assert whole["attributes"] == {
        "http.request.method": "POST",
        "http.route": PREDICT,
        "http.response.status_code": 200,
        "serving.model.name": "iris",
        "serving.model.version": "2",
        "serving.outcome": "ok",
        "serving.principal": "app",
        "serving.request_id": "traced",
    }
    assert tree(spans, 3)[0]["attributes"]["serving.outcome"] == "invalid"
    assert tree(spans, 4)[0]["name"] == "GET /v2/models/{model}"
    whole = tree(spans, 6)[0]
    assert whole["name"] == whole["attributes"]["rpc.method"] == "inference.GRPCInferenceService/ModelInfer"
    assert (whole["attributes"]["rpc.system.name"], whole["attributes"]["rpc.response.status_code"]) == ("grpc", "OK")
    assert whole["resource"]["service.name"] == "serving"
    assert whole["resource"]["deployment.environment.name"] == "test"
    eventually(lambda: {"traced", "unsampled", "nobody's"} <= {line["request_id"] for line in lines(telling)})
    by_id = {line["request_id"]: (line["trace_id"], line["span_id"]) for line in lines(telling)}
    assert by_id["traced"] == (f"{1:032x}", tree(spans, 1)[0]["id"])
    assert by_id["unsampled"] == (f"{5:032x}", None)
    assert by_id["nobody's"] == (None, None)


def test_requests_of_one_batch_are_linked_to_its_one_span(
    telling: Server, receiver: Receiver, key: tuple[str, Path], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Two callers whose rows ran together find the same span of a batch of two."""
    body = json.dumps({"instances": [ROW]}).encode()
    sockets = [socket.create_connection(("127.0.0.1", telling.port)) for _ in range(2)]
    for number, sock in enumerate(sockets, 11):  # both within the time that a model waits for company
        head = f"POST /v1/models/iris:predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key[0]}\r\n"
        head += f"traceparent: {trace_parent(number)['traceparent']}\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
    for sock in sockets:
        assert sock.recv(64).startswith(b"HTTP/1.1 200")
        sock.close()
    due = {f"{number:032x}" for number in (11, 12)}
    eventually(lambda: due <= {span["trace"] for span in receiver.spans() if span["kind"] == 2})
    spans = receiver.spans()
    links = [tree(spans, number)[1]["inference"]["links"] for number in (11, 12)]
    assert links[0] == links[1]
    (batch,) = (span for span in spans if span["id"] in links[0])
    assert (batch["attributes"]["serving.batch.rows"], batch["attributes"]["serving.batch.requests"]) == (2, 2)


def test_a_job_goes_on_in_the_trace_that_it_was_asked_for_in(
    telling: Server, receiver: Receiver, key: tuple[str, Path], eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Each piece of a job is a span in its caller's trace, whichever worker does it, long after the request."""
    headers = {"authorization": f"Bearer {key[0]}"} | trace_parent(21)
    answer = httpx.post(f"{telling.url}/v1/jobs", json={"model": "iris", "rows": [ROW]}, headers=headers)
    assert answer.status_code == 201, answer.text
    due = {"job split", "job score", "job publish", "POST /v1/jobs"}

    def mine() -> list[dict[str, Any]]:
        return [span for span in receiver.spans() if span["trace"] == f"{21:032x}"]

    eventually(lambda: due <= {span["name"] for span in mine()})
    pieces = [span for span in mine() if span["name"].startswith("job")]
    assert {span["attributes"]["serving.job.id"] for span in pieces} == {answer.json()["id"]}
    assert {(span["kind"], span["parent"], span["status"]) for span in pieces} == {(5, f"{21:016x}", 0)}


def test_a_tracestate_that_is_none_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """What a caller writes there is not in the log, for there may be any number of such requests."""
    headers = [*((k.encode(), v.encode()) for k, v in trace_parent(7).items()), (b"tracestate", b"=callers-own")]
    assert Tracing([], follow=True, share=1).sampled(headers) is not None
    assert not caplog.text


def test_spans_are_written_as_opentelemetry_itself_writes_them() -> None:
    """What goes to a receiver of OTLP is, byte by byte, what OpenTelemetry's own encoder makes of the same spans."""
    maker = SpanMaker(OTLPSpanExporter())
    records: list[Any] = []
    tracing = Tracing([SimpleNamespace(on_end=records.append)], follow=True, share=1)  # type: ignore[list-item]
    for headers in ([], [*((k.encode(), v.encode()) for k, v in trace_parent(7).items()), (b"tracestate", b"a=1,b=2")]):
        context = tracing.sampled(headers)
        assert context is not None
        run = Run(started=1.25, ended=1.5, rows=2, requests=2)
        stages = [("queue", 1.0, 1.25), ("inference", 1.25, 1.5)]
        failed = Described(
            "GET /é", {"serving.model.name": "iris", "http.response.status_code": 500}, failed=bool(headers)
        )
        tracing.record(context, lambda failed=failed: failed, began=1.0, ended=2.0, stages=stages, run=run)
    spans = [span for record in records for span in spans_of(record)]
    assert [span.name for span in spans] == ["batch", "queue", "inference", "GET /é"] * 2
    shift = time.time_ns()
    readable = [maker.readable(span, shift) for span in spans]
    assert maker._write(spans, shift) == encode_spans(readable).SerializeToString()
    maker.shutdown()


def test_traces_that_can_t_be_had_are_named_and_do_no_harm(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exporter that is not installed, a sampler that there is not: an error in the log, and predictions go on."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeon")
    assert Tracing.from_environment() is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "2")
    assert Tracing.from_environment() is None
    assert ["pigeon" in caplog.messages[0], "from 0 to 1" in caplog.messages[1]] == [True, True]


def test_slow_requests_are_logged_with_their_stages(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What takes longer than is wanted has a line that says where its time went, though no other has one."""
    with TestClient(create_app(Settings(models=models, slow_log_s=1e-6))) as client:
        assert "server-timing" not in client.post("/v1/models/iris:predict", json={"instances": [ROW]}).headers
    found = [record.fields for record in caplog.records if record.getMessage() == "slow request"]  # type: ignore[attr-defined]
    assert len(found) == 1
    stages = [found[0][f"{name}_ms"] for name in ("decode", "queue", "inference", "encode")]
    assert all(ms >= 0 for ms in stages)
    assert sum(stages) <= found[0]["ms"] + 0.01
    caplog.clear()
    with TestClient(create_app(Settings(models=models, slow_log_s=3600))) as client:
        client.post("/v1/models/iris:predict", json={"instances": [ROW]})
    assert not [record for record in caplog.records if record.name == "serving.requests"]


def test_features_are_logged_where_that_is_allowed(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Then a line of one row has its features, but for those that are sensitive; other lines have none."""
    (models / "iris/model.toml").write_text('[privacy]\nsensitive = ["sepal_width"]')
    with TestClient(create_app(Settings(models=models, access_log=1, log_features=True))) as client:
        for rows in ([ROW], [ROW, ROW], [{}]):
            client.post("/v1/models/iris:predict", json={"instances": rows})
    (models / "iris/model.toml").unlink()
    found = [r.fields for r in caplog.records if getattr(r, "fields", {}).get("model") == "iris"]  # type: ignore[attr-defined]
    assert [fields.get("features") for fields in found] == [
        {k: v for k, v in ROW.items() if k != "sepal_width"},
        None,
        None,
    ]


def test_a_row_takes_so_many_bytes_of_a_line() -> None:
    """Long texts are cut, features beyond the bound left out; NaN is null; a misspelt sensitive name shows nothing."""
    features = tuple(Feature(name=f"f{i}", datatype="BYTES") for i in range(40))
    tensors = tuple(TensorSpec(name=f"f{i}", datatype="BYTES", shape=(-1,)) for i in range(40))
    out = TensorSpec(name="y", datatype="FP32", shape=(-1,))
    wide = Signature(inputs=tensors, outputs=(out,), layout="columns", features=features)
    model: Any = SimpleNamespace(signature=wide, sensitive=frozenset({"f1"}))
    shown = row_of(model, tuple(np.array(["ü" * 1000 if i else "a"], object) for i in range(40)))
    assert list(shown) == ["f0", "f2", "f3"]
    assert shown["f2"] == "ü" * 256
    model.sensitive = None
    assert row_of(model, (np.array(["a"], object),) * 40) == {}
    numbers = tuple(Feature(name=name, datatype="FP32") for name in "abc")
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 3))
    matrix = Signature(inputs=(spec,), outputs=(out,), layout="matrix", features=numbers)
    model = SimpleNamespace(signature=matrix, sensitive=frozenset())
    assert row_of(model, (np.array([[0.1, np.nan, 3]], np.float32),)) == {"a": 0.1, "b": None, "c": 3.0}


def test_a_share_of_requests_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Of many requests the share that is asked for gets lines."""
    random.seed(5)
    log = RequestLog(0.1, None)
    with caplog.at_level(logging.INFO):
        for _ in range(1000):
            log.asked(Ended(b"id", "/", 200, 1), time.monotonic(), (), prediction=None, model=None, caller=None)
    assert 70 < len(caplog.records) < 130
