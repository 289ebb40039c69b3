"""How long requests and answers of many megabytes hold the event loop; a part of benchmarks.protocols."""

from __future__ import annotations

import http.client
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import grpc
import numpy as np

from benchmarks.bodies import WIDTH, json_body
from benchmarks.contestants import Contestant, free_port, running
from benchmarks.findings import Finding
from benchmarks.grpc_load import METHOD
from benchmarks.long_answers import long_answers
from benchmarks.long_documents import long_documents, wrong_documents
from benchmarks.long_requests import Long, long_requests

LOOP_S = 0.005
"""Longest that large bodies may hold the event loop at a time."""


def held_loop(models: Path, folder: Path, rounds: int, seconds: float, only: str = ".") -> list[Finding]:
    """Large bodies one after the other on two connections, and meanwhile a probe on the worker's own event loop.

    All forms take turns. Two controls show the machine's own floor: no load at all, and one small row again and again.
    """
    log = folder / "lags"
    grpc_port = free_port()
    probe = (sys.executable, "-m", "benchmarks.lag", str(models), str(log), "{port}", str(grpc_port))
    row = json_body(np.zeros((1, WIDTH)))
    small = Long("the same client, single rows", "/v2/models/wide/infer", row, {})
    every = [*long_requests(), *long_documents(), *wrong_documents(), *long_answers()]
    forms = [small, *(each for each in every if re.search(only, each.what))]
    spans: dict[str, list[tuple[float, float]]] = {each.what: [] for each in forms}
    spans["no load"] = []
    with running(Contestant("lag", probe, {}, "/v2/health/ready"), folder, None) as (port, _, _):
        for each in forms:
            hammer(each, port, grpc_port, 0.1)
        for _ in range(rounds):
            began = time.monotonic()
            time.sleep(seconds)
            spans["no load"].append((began, time.monotonic()))
            for each in forms:
                began = time.monotonic()
                hammer(each, port, grpc_port, seconds)
                spans[each.what].append((began, time.monotonic()))
    at, late, held = np.loadtxt(log, unpack=True)
    findings = []
    for what, times in spans.items():
        during = [(at >= began) & (at <= ended) for began, ended in times]
        longest = sorted(float(held[those].max()) * 1e3 for those in during)
        aim = None if what in {"no load", small.what} else LOOP_S * 1e3
        findings += [
            Finding(f"loop held, {what}: longest of a round, median", median(longest), "ms", aim, most=True),
            Finding(f"loop held, {what}: longest of all", longest[-1], "ms"),
            Finding(
                f"loop late, {what}: longest of all", max(float(late[those].max()) for those in during) * 1e3, "ms"
            ),
        ]
    return findings


def hammer(request: Long, port: int, grpc_port: int, seconds: float) -> int:
    """Send a request on two connections for a while; return how often."""
    until = time.monotonic() + seconds
    cores = sorted(os.sched_getaffinity(0))

    def send() -> int:
        # What a client computes must not take the core that the server's loop waits for.
        os.sched_setaffinity(0, cores[-1:])
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        sent = 0
        with asking(request, port, grpc_port) as ask:
            while time.monotonic() < until:
                ask()
                sent += 1
        return sent

    with ThreadPoolExecutor(2) as senders:
        return sum(sender.result() for sender in [senders.submit(send), senders.submit(send)])


@contextmanager
def asking(request: Long, port: int, grpc_port: int) -> Iterator[Callable[[], object]]:
    """Open a connection; give what sends the request on it once, and reads the answer."""
    if not request.path:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options) as channel:
            call = channel.unary_unary(METHOD)
            yield lambda: call(request.body)
        return
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    room = bytearray(1 << 20)

    def ask() -> None:
        connection.request("POST", request.path, request.body, request.headers)
        answer = connection.getresponse()
        while answer.readinto(room):
            pass
        if answer.status != request.status:
            raise RuntimeError(f"{request.what} was answered {answer.status}")

    yield ask
    connection.close()
