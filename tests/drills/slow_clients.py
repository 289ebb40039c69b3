"""Clients that trickle, that never end what they began, and that do not read: cut in time, and felt by nobody."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import selectors
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from tests.conftest import Server, running
from tests.drills.drill import Report, drill

PATH = "/v1/models/iris:predict"
ROWS = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]]}).encode()
LARGE = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: t\r\n\r\n"
"""Asks for a megabyte that costs no computing: what is measured is waiting, not work."""


def _head(length: int, path: str = PATH) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n" % (path.encode(), length)


KINDS: dict[str, tuple[bytes, bytes]] = {
    # What is sent at once, and what comes after it byte by byte, for ever.
    "head": (b"POST %b HTTP/1.1\r\nHost: t\r\nX-Slow: " % PATH.encode(), b"a"),
    "silent": (b"", b""),
    "fast path body": (_head(100_000) + b"\r\n", b" "),
    "asgi body": (_head(100_000, "/v2/repository/index") + b"\r\n", b" "),
    "chunked body": (
        b"POST %b HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n" % PATH.encode(),
        b"1\r\n \r\n",
    ),
}
SETTLE_S = 0.7
"""Until the server has answered what the clients that do not read have asked for: that is work, and no slowness."""
INTERVAL_S = 0.5
"""Between two pieces of one client; tools for this attack take ten seconds and more."""
TURNS = 250
"""In which a quarter of a second is divided: in each a part of the clients sends its next byte."""
DEAF = "not reading"
"""Sends requests with large answers, and reads none."""


@drill(
    "slow_clients", "500 clients that trickle, stall or do not read are cut in time, and a good client feels nothing"
)
def run(report: Report, *, sockets: int = 500, patience: float = 5.0, seconds: float = 4.0, rounds: int = 3) -> None:
    """Attack `rounds` times; `patience`: seconds for a head, and before a body's rate counts.

    seconds: of a good client's requests, before, in and after each attack; 0: it is only answered, and all servers are
    attacked at once.
    """
    flags = ("--head-s", str(patience), "--write-s", str(patience))

    def attacked(fast_path: str) -> None:
        uncut, last, quiet, busy = 0, 0.0, [], []
        with running(fast_path, *flags) as server:
            for _ in range(rounds):
                quiet.append(p99(server, seconds))
                with attack(server, sockets, patience + 6) as ending:
                    time.sleep(SETTLE_S)
                    busy.append(p99(server, seconds))
                    left, latest = ending.recv()
                uncut, last = uncut + sum(left.values()), max(last, latest)
                quiet.append(p99(server, seconds))
        report.exactly(f"{fast_path}: slow clients not cut, of {rounds} x {sockets}", uncut, 0)
        if seconds:
            report.at_most(f"{fast_path}: the last was cut after", last, patience + 1.5, "s")
            base = statistics.median(quiet)
            ratio = statistics.median(busy) / base
            report.at_most(f"{fast_path}: p99 of a good client, times its baseline ({base * 1e3:.2f} ms)", ratio, 1.5)

    def endless() -> None:
        never = ("--head-s", "1000", "--body-s", "1000", "--write-s", "1000", "--min-bytes-per-s", "1")
        with running(*never) as server, attack(server, len(KINDS), patience + 2) as ending:
            left, _ = ending.recv()
        report.control("without patience's end slow clients stay", sum(left.values()) >= len(KINDS))

    with ThreadPoolExecutor(1 if seconds else 3) as pool:
        for done in [*(pool.submit(attacked, way) for way in ("--fast-path", "--no-fast-path")), pool.submit(endless)]:
            done.result()


def p99(server: Server, seconds: float) -> float:
    """Return the 99th percentile, in seconds, of one client that asks, waits and asks again."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    times: list[float] = []
    until = time.monotonic() + seconds
    while not times or time.monotonic() < until:
        began = time.perf_counter()
        client.request("POST", PATH, ROWS)
        answer = client.getresponse()
        answer.read()
        assert answer.status == 200
        times.append(time.perf_counter() - began)
        time.sleep(0.002)
    client.close()
    return sorted(times)[int(len(times) * 0.99)]


@contextmanager
def attack(server: Server, sockets: int, seconds: float) -> Iterator[Connection]:
    """Trickle from another process for at most `seconds`; receive what was not cut, by kind, and when the last was."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_trickle, args=(server.port, sockets, seconds, there), daemon=True)
    process.start()
    there.close()
    assert here.recv() == "connected"
    try:
        yield here
    finally:
        process.join()


def _trickle(port: int, sockets: int, seconds: float, report: Any) -> None:
    """Be the slow clients, in a process of their own, which leaves the cores to the server and the good client."""
    os.nice(19)
    kinds = [DEAF, *list(KINDS) * 4]
    open_: dict[socket.socket, str] = {}
    poll = selectors.DefaultSelector()
    for index in range(sockets):
        kind = kinds[index % len(kinds)]
        client = socket.socket()
        if kind == DEAF:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            # A reset that does not fit its window is ignored: its kernel has to ask whether the server is still there.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        client.connect(("127.0.0.1", port))
        client.setblocking(False)
        open_[client] = kind
        if kind != DEAF:
            client.send(KINDS[kind][0])
            poll.register(client, selectors.EVENT_READ)
    deaf = [client for client, kind in open_.items() if kind == DEAF]
    _fill(deaf)
    began = latest = time.monotonic()
    report.send("connected")
    # Each at its own time, as strangers are: all at once they would be one burst of work.
    turns = [list(open_)[at::TURNS] for at in range(TURNS)]
    due = began
    while open_ and time.monotonic() < began + seconds:
        for turn in turns:
            ended = [client for client in turn if open_.get(client) == DEAF and _is_dead(client)]
            ended += [key.fileobj for key, _ in poll.select(0) if _has_ended(key.fileobj)]  # type: ignore[arg-type, misc]
            for client in ended:
                if open_.pop(client) != DEAF:
                    poll.unregister(client)
                client.close()
                latest = time.monotonic()
            for client in turn:
                if (kind := open_.get(client, DEAF)) != DEAF and KINDS[kind][1]:
                    with contextlib.suppress(OSError):  # seen when it is read
                        client.send(KINDS[kind][1])
            due += INTERVAL_S / TURNS
            time.sleep(max(0.0, due - time.monotonic()))
    report.send((Counter(open_.values()), latest - began))


def _fill(deaf: list[socket.socket]) -> None:
    """Send requests until more is owed than the buffers on the way hold."""
    sent: Counter[socket.socket] = Counter()
    until = time.monotonic() + 3
    while deaf and min(sent[client] for client in deaf) < 20 * len(LARGE) and time.monotonic() < until:
        for client in deaf:
            with contextlib.suppress(OSError):  # full; or cut already
                sent[client] += client.send(LARGE[sent[client] % len(LARGE) :])
        time.sleep(0.01)


def _is_dead(client: socket.socket) -> bool:
    """Tell whether a client that reads nothing has been reset."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x01"


def _has_ended(client: socket.socket) -> bool:
    try:
        return client.recv(65536) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
