"""A real Prometheus beside the real server: every query finds something, and what goes wrong raises its alarm."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
import yaml
from sklearn.datasets import load_iris

from serving.repository.quarantine import Quarantine
from tests.conftest import MODELS, Server, running
from tests.dashboards.test_boards import MADE
from tests.dashboards.test_compose import SERVICES, content
from tests.dashboards.test_rules import RULES
from tests.drills.workers import workers
from tests.metrics.test_metrics import of, parsed

ON_TIME = {"ServingEventLoopLate", "ServingModelSaturated"}
"""Alerts that a slow machine may raise."""
EXPECTED = {
    "ServingGateFailed",
    "ServingModelQuarantined",
    "ServingCrashLoop",
    "ServingDrift",
    "ServingOverloaded",
    "ServingAvailabilityBurns",
    "ServingAvailabilityBurnsSlowly",
}
TRIED = ("--grpc-port", "0", "--jobs-database-url", "sqlite")
KILLS = 2
"""Each costs at most the one request that its worker had answered, and not yet counted."""

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="Debian's prometheus is not installed")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """Run the compose file's Prometheus, and scrape once a second; by rules that do not wait, for two deaths, and for
    what is slow on no machine.
    """
    rules = re.sub(r"\n +for: \w+", "", RULES).replace('le="0.25"', 'le="10.0"').replace("[15m])) > 3", "[15m])) > 1")
    (folder / "rules.yml").write_text(rules)
    often = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    asked = yaml.safe_load(content("prometheus").replace("serving:8080", target))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(asked | {"global": often}))
    address = f"127.0.0.1:{free_port()}"
    places = {"/etc/prometheus": str(folder), "=/prometheus": f"={folder}/data"}
    command = ["prometheus", *SERVICES["prometheus"]["command"], "--log.level=error"]
    for image, here in places.items():
        command = [part.replace(image, here) for part in command]
    process = subprocess.Popen([*command, f"--web.listen-address={address}"])
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", timeout=20) as client:
            yield client
    finally:
        process.terminate()
        process.wait(20)


def ready(client: httpx.Client) -> bool:
    """Tell whether Prometheus answers queries."""
    try:
        return client.get("/query", params={"query": "1"}).status_code == 200
    except httpx.ConnectError:
        return False


def queries() -> dict[str, str]:
    """Return each query of a dashboard or a rule as Grafana would ask it, by where it stands."""
    found = {}
    for uid, board in MADE.items():
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                found[f"{uid}, {panel['title']}, {target['legendFormat']}"] = target["expr"]
    for group in yaml.safe_load(RULES)["groups"]:
        for rule in group["rules"]:
            name = rule.get("record") or rule["alert"]
            found[name] = rule["expr"]
            if "alert" in rule:  # what is compared, for one that does not hold has no data
                found[name] = re.sub(r" (==|>) (bool )?", lambda m: f" {m[1]} bool ", rule["expr"])
    chosen = {"$__rate_interval": "1m", "$version": ".*", "$instance": ".*", '"$model"': '~"iris|diabetes"'}
    for name, value in chosen.items():
        found = {where: expr.replace(name, value) for where, expr in found.items()}
    return found


def repository(root: Path) -> Path:
    """Make iris, with all that there is; one without room, and with a version that the gate refuses; and plain ones."""
    for name in ("iris", "narrow"):
        shutil.copytree(MODELS / "iris", root / name)
    shutil.copytree(MODELS / "iris" / "1", root / "held" / "1")
    shutil.copytree(MODELS / "diabetes", root / "diabetes")
    (root / "iris" / "traffic.json").write_text(json.dumps({"stable": "1", "shadow": {"version": "2"}}))
    (root / "iris" / "model.toml").write_text(
        "[cache]\nentries = 8\n[drift]\nwindow_rows = 100\n[feedback]\nwindow = 60"
    )
    (root / "diabetes" / "model.toml").write_text("[feedback]\nwindow = 20")
    (root / "narrow" / "model.toml").write_text("[limits]\nmax_queued_rows = 1\n[batching]\nmax_delay_ms = 50")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 4]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])], "g", *[[v] for v in values])
    (root / "narrow" / "3").mkdir()
    onnx.save(onnx.helper.make_model(graph), root / "narrow" / "3" / "model.onnx")
    return root


class Callers:
    """Ask for everything that is counted, over and over, until told to end."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(what,)) for what in (self._mixed, *[self._narrow] * 4)
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, what: Callable[[httpx.Client], None]) -> None:
        while not self._ended.is_set():
            try:
                with httpx.Client(base_url=self._server.url, timeout=10) as http:
                    what(http)
            except (httpx.HTTPError, triton.InferenceServerException):
                continue  # its worker was killed

    def _narrow(self, http: httpx.Client) -> None:
        while not self._ended.wait(0.04):
            http.post("/v1/models/narrow:predict", json={"instances": [[5.1, 3.5, 1.4, 0.2]]})

    def _told(self, http: httpx.Client, model: str, rows: Any, truth: Any, key: dict[str, str]) -> None:
        """Predict, and say what was true."""
        http.post(f"/v1/models/{model}:predict", json={"instances": rows.tolist()}, headers=key)
        told = {"id": key["x-request-id"], "outcomes": truth.tolist()}
        http.post(f"/v1/models/{model}:feedback", json={"feedback": [told]})

    def _mixed(self, http: httpx.Client) -> None:
        iris, random = load_iris(), np.random.default_rng(0)
        data, names = iris.data, iris.target_names[iris.target]
        late = {"x-request-timeout": "0.0000001"}
        address = re.search(r"gRPC: (\S+)", self._server.output())
        assert address
        tensor = triton.InferInput("features", [1, 4], "FP32")
        with triton.InferenceServerClient(address[1]) as grpc:
            while not self._ended.wait(0.1):
                some, key = random.integers(0, len(data), 20), {"x-request-id": str(random.random())}
                self._told(http, "iris", data[some] + [0, 0, 2, 0], names[some], key)
                self._told(http, "diabetes", random.random((20, 10)), random.random(20), key)
                http.post("/v1/models/iris:predict", json={"instances": [["x", 1, 1, 1]]})
                http.post("/v1/models/iris/versions/2:predict", json={"instances": data[:2].tolist()})
                http.post("/v1/models/iris:predict", json={"instances": data[:1].tolist()}, headers=late)
                tensor.set_data_from_numpy(random.random((1, 4), np.float32))
                grpc.infer("iris", [tensor])
                with socket.create_connection(("127.0.0.1", self._server.port)) as sock:
                    sock.sendall(b"no HTTP\r\n\r\n")
                    sock.recv(1)


def killed_meanwhile(server: Server, eventually: Callable[..., None]) -> tuple[int, int]:
    """Ask a model while each worker is killed; return how many answers came and how many requests broke."""
    answered = broken = 0
    before = workers(server)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
        for _ in range(20):
            try:
                url = f"{server.url}/v1/models/held:predict"
                answered += httpx.post(url, json={"instances": [[5.1, 3.5, 1.4, 0.2]]}).status_code == 200
            except httpx.HTTPError:
                broken += 1
    eventually(lambda: len(workers(server) - before) == 2, 60)
    return answered, broken


def test_every_query_finds_data_and_faults_raise_their_alarms(tmp_path: Path, eventually: Callable[..., None]) -> None:
    """On a server with two workers that are killed under load each query has data, and those alarms fire that should.

    The counters say what was answered, but for what died in flight.
    """
    models = repository(tmp_path / "models")
    Quarantine(models).add("narrow", "1", "it ended two workers")
    with (
        running(*SERVICES["serving"]["command"][1:], *TRIED, models=models) as server,
        prometheus(tmp_path, f"127.0.0.1:{server.port}") as client,
        Callers(server),
    ):

        def result(path: str, **parameters: str) -> Any:
            answer = client.get(path, params=parameters).json()
            assert answer["status"] == "success", (parameters, answer)
            return answer["data"]

        eventually(lambda: ready(client))
        eventually(lambda: [up["value"][1] for up in result("/query", query="up")["result"]] == ["1"])
        answered, broken = killed_meanwhile(server, eventually)

        def counted() -> float:
            return of(parsed(httpx.get(f"{server.url}/metrics").text), "serving_predictions_total", model="held")

        eventually(lambda: counted() >= answered - KILLS)
        assert counted() <= answered + broken

        def firing() -> set[str]:
            return {alert["labels"]["alertname"] for alert in result("/alerts")["alerts"] if alert["state"] == "firing"}

        silent = queries()
        until = time.monotonic() + 40
        while (silent or firing() - ON_TIME != EXPECTED) and time.monotonic() < until:
            time.sleep(0.5)
            silent = {where: expr for where, expr in silent.items() if not result("/query", query=expr)["result"]}
        assert silent == {}
        assert firing() - ON_TIME == EXPECTED
