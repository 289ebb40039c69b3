"""Promotions and rollbacks under load: no request fails, and nobody is answered by a version that could not serve."""

from __future__ import annotations

import bisect
import http.client
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from serving.access.key_store import KeyStore
from tests.conftest import MODELS, Server, running
from tests.drills.drill import Report, drill
from tests.drills.load import Answer, Asker, load

ROW = [5.1, 3.5, 1.4, 0.2]
PATH = "/v1/models/iris:predict"


class Change(NamedTuple):
    """One change: between `began` and `ended` either version may answer, afterwards only `version`."""

    began: float
    ended: float
    version: str


@contextmanager
def served(*flags: str) -> Iterator[tuple[Server, str]]:
    """Serve two versions of iris from two workers; yield the server and a key that may deploy."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        shutil.copytree(MODELS / "iris", models / "iris")
        key = KeyStore(Path(folder) / "keys").create("drill", frozenset({"deploy"}))
        with running("--workers", "2", "--grpc-port", "0", "--keys", f"{folder}/keys", *flags, models=models) as server:
            yield server, key


def order(server: Server, key: str, verb: str, body: dict[str, object]) -> Change:
    """Give an order over HTTP and wait for its answer."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", f"/v1/repository/models/iris/{verb}", json.dumps(body), {"Authorization": f"Bearer {key}"}
    )
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 200, text
    return Change(began, time.monotonic(), str(json.loads(text)["traffic"]["stable"]))


def impossible(answers: list[Answer], changes: list[Change], first: str) -> list[Answer]:
    """Return the answers that came from a version which, by the log of changes, could not serve at that time."""
    begins = [change.began for change in changes]
    wrong = []
    for answer in answers:
        if not answer.version:
            continue
        # The last change that had ended before it was asked says who served; any that began before it came may too.
        possible = {first}
        for change in changes[max(0, bisect.bisect_right(begins, answer.asked) - 2) :]:
            if change.ended <= answer.asked:
                possible = {change.version}
            elif change.began <= answer.came:
                possible.add(change.version)
            else:
                break
        if answer.version not in possible:
            wrong.append(answer)
    return wrong


@drill("promotions", "versions change under load without one failed request, and none answers when it must not")
def promotions(report: Report, *, times: int = 1000, fresh: int = 10, requests: int = 200_000) -> None:
    """Promote and roll back in turn, `times` together, and ask `fresh` times over new connections after each."""
    with served() as (server, key), load() as askers:
        address = re.search(r"gRPC: (\S+)", server.output())
        assert address is not None
        order(server, key, "promote", {"version": "1"})
        changes = [order(server, key, "promote", {"version": "2"})]
        askers.http(server.port, PATH, ROW, askers=3)
        askers.grpc(address[1], "iris", ROW, askers=2)
        stale = 0
        for number in range(times):
            change = (
                order(server, key, "promote", {"version": "2"}) if number % 2 else order(server, key, "rollback", {})
            )
            changes.append(change)
            for _ in range(fresh):
                asker = Asker(server.port, PATH, ROW)
                stale += asker.ask().version != change.version
                asker.close()
        # The load goes on until it is as large as promised: a slow machine takes longer for it.
        until = time.monotonic() + 600
        while counted(server) < requests and time.monotonic() < until:
            time.sleep(0.5)
        answers = askers.stop()
    failed = [answer for answer in answers if not answer.version]
    for answer in failed[:5]:
        print("failed:", answer)
    rollbacks = sorted(change.ended - change.began for change in changes[1::2])
    report.exactly("changes", len(changes) - 1, times)
    report.at_least("requests under them, over HTTP and gRPC", len(answers) + times * fresh, requests)
    report.exactly("failed", len(failed), 0)
    report.exactly("answers from a version that could not serve", len(impossible(answers, changes, "2")), 0)
    report.exactly(f"stale answers of {times * fresh} over new connections after a change", stale, 0)
    report.at_most("rollback, p99", rollbacks[int(len(rollbacks) * 0.99)], 1.0, "s")
    turned = [change._replace(version={"1": "2", "2": "1"}[change.version]) for change in changes]
    report.control("the same answers judged by a log that is wrong", bool(impossible(answers, turned, "1")))


def counted(server: Server) -> float:
    """Return how many predictions all workers have answered."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.findall(r'^serving_predictions_total\{[^}]*outcome="ok"[^}]*\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, found))
