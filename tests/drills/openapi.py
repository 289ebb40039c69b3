"""schemathesis over the live OpenAPI document: what a client may send by it, and what it may not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2 as httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from tests.conftest import running
from tests.drills.drill import Report, drill
from tests.drills.wire import workers

CHANGES = "/v2/repository/models/"
"""Paths that load and unload models: a model that is gone answers 503, as it should."""


@drill("openapi", "schemathesis finds no 5xx, hang or restart in anything that the OpenAPI document describes")
def run(report: Report, *, cases: int = 10_000) -> None:
    """Send valid and invalid cases to every operation, by the fast path."""
    with running("--grpc-port", "0") as server:
        document = httpx.get(f"{server.url}/openapi.json", timeout=20).json()
        before = workers(server)
        statuses, slowest, wrong = fuzz(document, server.url, cases)
        restarts = float(before != workers(server) or not before)
        logged = server.output().count("Traceback")
    report.at_least("cases", statuses.total(), cases)
    report.at_least("of them answered 200", statuses[200], cases / 25)
    report.at_least("of them refused", sum(n for s, n in statuses.items() if 400 <= s < 500), cases / 20)
    report.exactly("5xx", sum(n for s, n in statuses.items() if s >= 500), 0)
    report.exactly("hangs", statuses[0], 0)
    report.exactly("restarts", restarts, 0)
    report.exactly("tracebacks in the log", logged, 0)
    report.at_most("slowest answer", slowest, 20, "s")
    stub = ThreadingHTTPServer(("127.0.0.1", 0), _Oops)
    threading.Thread(target=stub.serve_forever).start()
    few = {**document, "paths": dict(list(document["paths"].items())[:3])}
    found, _, _ = fuzz(few, f"http://127.0.0.1:{stub.server_port}", 35)
    stub.shutdown()
    stub.server_close()
    report.control("a server that answers 500 is found out", found[500] == found.total() > 0)
    for text in wrong[:5]:
        print(text)


def fuzz(document: dict[str, Any], url: str, cases: int) -> tuple[Counter[int], float, list[str]]:
    """Send so many cases, spread over the operations; count statuses (0: no answer in 20 s)."""
    paths = {path: item for path, item in document["paths"].items() if not path.startswith(CHANGES)}
    schema = schemathesis.openapi.from_dict({**document, "paths": paths})
    schema.config.update(base_url=url)
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    posts = [operation for operation in operations if operation.method == "post"]
    # Those without a body have few cases; with so many for each of the others the sum is reached all the same.
    many = -(-cases // len(posts))
    client = requests.Session()

    def one(case: Any) -> None:
        nonlocal slowest
        began = time.perf_counter()
        status, text = _sent(client, case)
        slowest = max(slowest, time.perf_counter() - began)
        statuses[status] += 1
        if status >= 500 or not status:
            wrong.append(f"{case.as_curl_command()}: {status} {text[:300]}")

    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)
            count = many if operation in posts else 1 + many // 20
            with contextlib.suppress(Unsatisfiable):  # what takes nothing can't be sent anything wrong
                settings(
                    max_examples=count,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )(given(case=strategy)(one))()
    client.close()
    return statuses, slowest, wrong


def _sent(client: requests.Session, case: Any) -> tuple[int, str]:
    try:
        answer = case.call(session=client, timeout=20)
    except Exception as error:
        return 0, repr(error)
    return answer.status_code, answer.text


class _Oops(BaseHTTPRequestHandler):
    """Answers 500 to all."""

    def _oops(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(500)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_TRACE = _oops

    def log_message(self, *args: Any) -> None:
        """Say nothing."""
