"""What autoscalers see: the queries of the manifests, asked of a real Prometheus beside pods under load."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2 as httpx
import yaml

from serving.manifests.tree import tree
from tests.conftest import faulty
from tests.dashboards.test_prometheus import free_port, ready
from tests.drills.drill import Report, drill
from tests.drills.steady import PATH, until

PODS = 2
ROWS = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]] * 32}).encode()
TREE = {path: yaml.safe_load(text) for path, text in tree().items() if path.startswith("components/")}
HPA = TREE["components/prometheus-adapter/autoscaler.yaml"]["spec"]
ADAPTER = TREE["components/prometheus-adapter/adapter-values.yaml"]["rules"]["custom"][0]["metricsQuery"]
KEDA = TREE["components/keda/scaled-object.yaml"]["spec"]["triggers"][0]["metadata"]


@drill("autoscaling", "rows that wait have either autoscaler ask for more pods, and for no more once they are answered")
def autoscaling(report: Report, *, callers: int = 16) -> None:
    """Ask 2 slow pods for more than they can do, then for nothing."""
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        slow = {"slow": 0.1}
        pods = [ending.enter_context(faulty(slow, "--max-batch-rows", "32")) for _ in range(PODS)]
        ask = ending.enter_context(_prometheus(folder, [pod.port for pod in pods]))
        until(lambda: len(ask.adapter()) == PODS)
        report.exactly("pods that the adapter knows before anybody asked", len(ask.adapter()), PODS)
        report.exactly("rows that wait then", sum(ask.adapter()), 0)
        with _callers([pod.url for pod in pods], callers):
            until(lambda: min(ask.replicas()) > PODS, 90)
            report.at_least("pods wanted under load, by the adapter's form", ask.replicas()[0], PODS + 1)
            report.at_least("by KEDA's", ask.replicas()[1], PODS + 1)
        until(lambda: max(ask.replicas()) == 0, 120)
        report.exactly("pods wanted afterwards, by the adapter's form", ask.replicas()[0], 0)
        report.exactly("by KEDA's", ask.replicas()[1], 0)


class _Queries:
    """The queries of both forms, put as the autoscalers put them."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def _ask(self, query: str) -> list[float]:
        answer = self._client.get("/query", params={"query": query})
        return [float(series["value"][1]) for series in answer.json()["data"]["result"]]

    def adapter(self) -> list[float]:
        """Return the rows that wait in each pod."""
        matchers = f'namespace="serving",pod=~"{"|".join(f"serving-{i}" for i in range(PODS))}"'
        return self._ask(ADAPTER.replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", "pod"))

    def replicas(self) -> tuple[int, int]:
        """Return how many pods the metric alone asks for, by the HorizontalPodAutoscaler and by KEDA."""
        target = float(HPA["metrics"][0]["pods"]["target"]["averageValue"])
        return math.ceil(sum(self.adapter()) / target), math.ceil(
            sum(self._ask(KEDA["query"])) / float(KEDA["threshold"])
        )


@contextmanager
def _prometheus(folder: Path, ports: list[int]) -> Iterator[_Queries]:
    """Scrape pods once a second, with the labels that the operator gives them."""
    targets = [
        {
            "targets": [f"127.0.0.1:{port}"],
            "labels": {"namespace": "serving", "service": "serving", "pod": f"serving-{i}"},
        }
        for i, port in enumerate(ports)
    ]
    scrape = {"job_name": "serving", "scrape_interval": "1s", "scrape_timeout": "1s", "static_configs": targets}
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=error"]
    process = subprocess.Popen([*command, f"--web.listen-address={address}"], cwd=folder)
    try:
        with httpx.Client(base_url=f"http://{address}/api/v1", timeout=20) as client:
            assert until(lambda: ready(client), 60) < 60
            yield _Queries(client)
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def _callers(urls: list[str], count: int) -> Iterator[None]:
    """Ask for 32 rows again and again, from `count` threads for each server."""
    ended = threading.Event()

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not ended.is_set():
                client.post(PATH, content=ROWS)

    threads = [threading.Thread(target=ask, args=(url,)) for url in urls for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
