"""schemathesis over the live OpenAPI document: what a client may send by it, what it may not, and what comes back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2 as httpx
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import running
from tests.drills.drill import Report, drill
from tests.drills.wire import workers

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
CHANGES = "/v2/repository/models/"
"""Paths that load and unload models: a model that is gone answers 503, as it should."""


@drill(
    "openapi", "schemathesis finds no 5xx, hang, restart or undocumented answer in what the OpenAPI document describes"
)
def run(report: Report, *, cases: int = 10_000) -> None:
    """Send valid and invalid cases to every operation, by the fast path."""
    with running("--grpc-port", "0") as server:
        document = httpx.get(f"{server.url}/openapi.json", timeout=20).json()
        before = workers(server)
        found = fuzz(document, server.url, cases)
        restarts = float(before != workers(server) or not before)
        logged = server.output().count("Traceback")
    statuses = found.statuses
    report.at_least("cases", statuses.total(), cases)
    report.at_least("of them answered 200", statuses[200], cases / 25)
    report.at_least("of them refused", sum(n for s, n in statuses.items() if 400 <= s < 500), cases / 20)
    report.exactly("5xx but a caller's own deadline, or hangs", len(found.wrong), 0)
    report.exactly("restarts", restarts, 0)
    report.exactly("tracebacks in the log", logged, 0)
    report.exactly("answers that are not as the document has them", len(found.untrue), 0)
    report.at_most("slowest answer", found.slowest, 20, "s")
    stub = ThreadingHTTPServer(("127.0.0.1", 0), _Oops)
    threading.Thread(target=stub.serve_forever).start()
    few = {**document, "paths": dict(list(document["paths"].items())[:3])}
    stubbed = fuzz(few, f"http://127.0.0.1:{stub.server_port}", 35)
    stub.shutdown()
    stub.server_close()
    total = stubbed.statuses.total()
    report.control("a server that answers 500 is found out", stubbed.statuses[500] == total > 0)
    report.control("a status that the document does not have is found out", len(stubbed.untrue) == total)
    for text in (found.wrong + found.untrue)[:5]:
        print(text)


@dataclass
class Found:
    """What came of the cases: statuses (0: no answer in 20 s), and the requests with a wrong or untrue answer."""

    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)
    untrue: list[str] = field(default_factory=list)
    """Status, content type or body are not as documented."""


def fuzz(document: dict[str, Any], url: str, cases: int) -> Found:
    """Send so many cases, spread over the operations, and hold each answer against the document."""
    paths = {path: item for path, item in document["paths"].items() if not path.startswith(CHANGES)}
    schema = schemathesis.openapi.from_dict({**document, "paths": paths})
    schema.config.update(base_url=url)
    operations = [found.ok() for found in schema.get_all_operations()]
    found = Found()
    posts = [operation for operation in operations if operation.method == "post"]
    # Those without a body have few cases; with so many for each of the others the sum is reached all the same.
    many = -(-cases // len(posts))
    client = requests.Session()

    def one(case: Any) -> None:
        began = time.perf_counter()
        answer, failure = _sent(client, case)
        found.slowest = max(found.slowest, time.perf_counter() - began)
        status = 0 if answer is None else answer.status_code
        found.statuses[status] += 1
        asked_for = status == 504 and "X-Request-Timeout" in (case.headers or {})
        if answer is None or (status >= 500 and not asked_for):
            found.wrong.append(f"{case.as_curl_command()}: {status} {failure[:300]}")
        if answer is None:
            return
        try:
            case.validate_response(answer, checks=CHECKS)
        except (Failure, FailureGroup) as untrue:
            found.untrue.append(f"{case.as_curl_command()}: {status}: {untrue}"[:2000])

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
    return found


def _sent(client: requests.Session, case: Any) -> tuple[Any, str]:
    """Return the answer, or None, and its text or the reason."""
    try:
        answer = case.call(session=client, timeout=20)
    except Exception as error:
        return None, repr(error)
    return answer, answer.text


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
