"""What model.toml says of one model holds over every transport, and is followed while it serves."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from google.protobuf.json_format import ParseDict

from serving.access.key_store import KeyStore
from serving.protocols.messages import SERVICE, message
from tests.conftest import MODELS, Server, running

ROW = [5.1, 3.5, 1.4, 0.2]
TRANSPORTS = ("fast path", "ASGI", "gRPC")
Wait = Callable[[Callable[[], bool]], None]


@dataclass
class Asked:
    """A running server with models of its own, and two keys that may predict."""

    server: Server
    keys: dict[str, str]
    http: httpx.Client
    grpc: grpc.Channel

    def predict(self, transport: str, key: str | None, row: list[float] = ROW, model: str = "iris") -> int:
        """Return the HTTP status of a prediction, or what answers to it in gRPC."""
        bearer = {} if key is None else {"authorization": f"Bearer {self.keys[key]}"}
        if transport == "gRPC":
            tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "contents": {"fp32_contents": row}}
            request = ParseDict({"model_name": model, "inputs": [tensor]}, message("ModelInferRequest")())
            call = self.grpc.unary_unary(
                f"/{SERVICE}/ModelInfer", type(request).SerializeToString, message("ModelInferResponse").FromString
            )
            try:
                call(request, metadata=list(bearer.items()), timeout=20)
            except grpc.RpcError as error:
                return CODES[error.code()]
            return 200
        body = f'{{"instances": [{row}]}}'.encode()
        content: Any = body if transport == "fast path" else iter([body])  # in chunks it leaves the fast path
        return self.http.post(f"/v1/models/{model}:predict", content=content, headers=bearer).status_code

    def write(self, text: str, model: str = "iris") -> None:
        folder = self.server.models / model
        (folder / ".new").write_text(text)
        os.replace(folder / ".new", folder / "model.toml")

    def looked_up(self) -> dict[str, float]:
        """Return how often the cache of iris was asked, by outcome."""
        text = self.http.get("/metrics").text
        found = re.findall(r'^serving_cache_requests_total\{.*model="iris".*outcome="(\w+)".*\} (.*)$', text, re.M)
        return {outcome: float(value) for outcome, value in found}


CODES = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    models, keys = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("keys") / "serving.keys"
    shutil.copytree(MODELS / "iris" / "1", models / "iris" / "1")
    shutil.copytree(MODELS / "iris" / "1", models / "open" / "1")
    (models / "iris" / "model.toml").write_text('[access]\npredict = ["one"]\n')
    store = KeyStore(keys)
    made = {name: store.create(name, frozenset({scope})) for name, scope in (("one", "predict"), ("two", "predict"))}
    with (
        running("--keys", str(keys), "--grpc-port", "0", models=models) as server,
        httpx.Client(base_url=server.url, timeout=20) as http,
    ):
        found = re.search(r"gRPC: (127\.0\.0\.1:\d+)", server.output())
        assert found is not None
        with grpc.insecure_channel(found[1]) as channel:
            yield Asked(server, made, http, channel)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_only_those_who_are_named_may_predict(asked: Asked, eventually: Wait, transport: str) -> None:
    """A model with names in [access] answers those alone, from the start and after a change; others as ever."""
    asked.write('[access]\npredict = ["one"]\n')
    eventually(lambda: asked.predict(transport, "one") == 200)
    assert asked.predict(transport, "two") == 403
    assert asked.predict(transport, None) == 401
    assert asked.predict(transport, "two", model="open") == 200
    asked.write('[access]\npredict = ["two", "nobody"]\n')
    eventually(lambda: asked.predict(transport, "two") == 200)
    assert asked.predict(transport, "one") == 403


def test_an_answer_is_given_again_to_its_own_caller(asked: Asked, eventually: Wait) -> None:
    """With [cache] equal tensors of one key run once, whatever they come by; another key's run again."""
    asked.write("[cache]\nentries = 100\n")

    def warm() -> bool:
        return asked.predict("fast path", "one", [1, 1, 1, 1]) == 200 and bool(asked.looked_up())

    eventually(warm)
    before = asked.looked_up()
    for key in ("one", "two"):
        for transport in TRANSPORTS:
            assert asked.predict(transport, key) == 200
    eventually(lambda: sum(asked.looked_up().values()) == sum(before.values()) + 6)
    after = asked.looked_up()
    assert (after["hit"] - before.get("hit", 0), after["miss"] - before["miss"]) == (4, 2)
    bearer = {"authorization": f"Bearer {asked.keys['one']}"}
    counted = asked.http.get("/v2/models/iris/stats", headers=bearer).json()["model_stats"][0]["inference_stats"]
    assert counted["cache_hit"]["count"] == after["hit"]
    assert counted["cache_miss"]["count"] == after["miss"]
    asked.write("[cache]\nentries = 99\n")  # another cache: nothing of before is in it
    eventually(lambda: asked.predict("fast path", "one") == 200 and asked.looked_up()["miss"] > after["miss"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_model_has_a_deadline_of_its_own(asked: Asked, eventually: Wait, transport: str) -> None:
    """Who still waits at the deadline of its model is told so, and not at the server's."""
    asked.write("[batching]\nmax_delay_ms = 1000\n[limits]\ndeadline_s = 0.02\n")
    eventually(lambda: asked.predict(transport, "one") == 504)
    asked.write("")
    eventually(lambda: asked.predict(transport, "one") == 200)


def test_a_change_loses_no_request(asked: Asked, eventually: Wait) -> None:
    """While settings change, and sessions are made anew for them, every request is answered."""
    statuses: set[int] = set()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            statuses.add(asked.predict("gRPC", "one"))
            statuses.add(asked.predict("fast path", "one"))

    def config() -> Any:
        bearer = {"authorization": f"Bearer {asked.keys['one']}"}
        return asked.http.get("/v2/models/iris/config", headers=bearer).json()

    def threads() -> str:
        return str(config()["parameters"]["intra_op_thread_count"]["string_value"])

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        asked.write("[execution]\nthreads = 3")
        eventually(lambda: threads() == "3")
        asked.write("[cache]\nbytes = 100000")
        eventually(lambda: "response_cache" in config()["parameters"] and threads() != "3")
        asked.write("[batching]\nenabled = false")
        eventually(lambda: config()["max_batch_size"] == 0)
        asked.write("[execution]\ninstances = 2\nthreads = 2\n[batching]\nmax_batch_rows = 16")
        eventually(lambda: config()["max_batch_size"] == 16)
    finally:
        over.set()
        asker.join()
    assert statuses == {200}
