"""Realistic mixed traffic against a running server: several models, sizes, dialects, and some bad requests.

make serve                                                  # in one terminal
.venv/bin/locust -f benchmarks/locustfile.py                # web page on http://127.0.0.1:8089
.venv/bin/locust -f benchmarks/locustfile.py --headless     # stages of SHAPE, then a verdict as the exit status
"""

from __future__ import annotations

import json
import random
from typing import Any

from locust import FastHttpUser, LoadTestShape, between, events, task
from locust.env import Environment

SHAPE = [(15, 10), (30, 40), (45, 80), (60, 20)]
"""Stages: seconds since the start, users."""
P99_MS = 100
"""Most that the 99th percentile of any kind of request may be, in milliseconds, for the run to pass."""


class Stages(LoadTestShape):
    """Rises, peaks and falls as SHAPE says."""

    def tick(self) -> tuple[int, float] | None:
        """Return users and spawn rate for now, or None at the end."""
        now = self.get_run_time()
        return next(((users, 20.0) for until, users in SHAPE if now < until), None)


class Application(FastHttpUser):
    """An application that sends what applications send, bad rows among it."""

    host = "http://127.0.0.1:8080"
    wait_time = between(0.005, 0.05)

    def on_start(self) -> None:
        """Learn each model's example from the server, as a newcomer would from /docs."""
        document = self.client.get("/openapi.json", name="openapi.json").json()
        self.examples: dict[str, Any] = {}
        for path, operations in document["paths"].items():
            if "requestBody" in operations.get("post", {}):
                content = operations["post"]["requestBody"]["content"]["application/json"]
                self.examples[path] = content["example"]

    def predict(self, model: str, rows: int, name: str) -> None:
        """Send the model's example, `rows` times."""
        path = f"/v1/models/{model}:predict"
        with self.client.post(
            path, json={"instances": self.examples[path]["instances"] * rows}, name=name, catch_response=True
        ) as answer:
            if answer.status_code == 200 and len(json.loads(answer.text)["predictions"]) == rows:
                answer.success()
            else:
                answer.failure(f"{answer.status_code}: {(answer.text or '')[:100]}")

    @task(10)
    def one_row(self) -> None:
        """One row of a table."""
        self.predict(random.choice(["iris", "breast_cancer", "diabetes"]), 1, "V1 one row")

    @task(3)
    def mixed_row(self) -> None:
        """One row with strings and missing values."""
        self.predict("penguins", 1, "V1 mixed row")

    @task(3)
    def text(self) -> None:
        """A text."""
        self.predict("docs_topic", 1, "V1 text")

    @task(2)
    def many_rows(self) -> None:
        """The batch endpoint: 100 rows."""
        self.predict("breast_cancer", 100, "V1 100 rows")

    @task(6)
    def tensors(self) -> None:
        """Tensors by the Open Inference Protocol."""
        path = f"/v2/models/{random.choice(['iris', 'digits', 'breast_cancer'])}/infer"
        self.client.post(path, json=self.examples[path], name="v2 tensors")

    @task(1)
    def bad_row(self) -> None:
        """A row with a string for a number: the right answer is a 422 that names the cell."""
        body = {"instances": [{"sepal_length": "5.1", "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}]}
        with self.client.post("/v1/models/iris:predict", json=body, name="bad row", catch_response=True) as answer:
            if answer.status_code == 422 and "/instances/0/sepal_length" in (answer.text or ""):
                answer.success()
            else:
                answer.failure(f"{answer.status_code} instead of 422")

    @task(1)
    def unknown_model(self) -> None:
        """A model that is not there: the right answer is a 404."""
        with self.client.post(
            "/v1/models/none:predict", json={"instances": [1]}, name="unknown model", catch_response=True
        ) as answer:
            if answer.status_code == 404:
                answer.success()
            else:
                answer.failure(f"{answer.status_code} instead of 404")


@events.quitting.add_listener
def judge(environment: Environment, **_: Any) -> None:
    """Pass where nothing failed and every kind of request kept its 99th percentile."""
    slow = {
        entry.name: entry.get_response_time_percentile(0.99)
        for entry in environment.stats.entries.values()
        if entry.name != "openapi.json" and entry.get_response_time_percentile(0.99) > P99_MS
    }
    failed = environment.stats.total.num_failures
    passed = not failed and not slow and environment.stats.total.num_requests > 0
    print(f"{'PASSED' if passed else 'FAILED'}: {failed} failed; over {P99_MS} ms at p99: {slow or 'none'}")
    environment.process_exit_code = 0 if passed else 1
