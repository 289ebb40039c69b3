"""Clients that leave while their requests wait in line, or run."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence

import httpx2 as httpx

from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.steady import PATH, ROW, until


@drill("departed", "a client that leaves while it waits costs no prediction, and one that leaves later nobody else")
def departed(report: Report, *, clients: int = 1000) -> None:
    """Have clients leave while the model is busy, some while it runs theirs; the control runs them all."""
    with faulty({"slow": 1.0}) as server:
        executed, stayed = leave(server, clients)
        report.at_most("departed requests that were executed", executed, clients / 100)
        report.exactly("those that stayed got their answers, of 20", stayed, 20)
    with faulty({"slow": 1.0, "off": ["departed"]}) as server:
        executed, _ = leave(server, clients)
        report.control("where nobody notices they are all executed", executed > clients / 100)


def leave(server: Server, clients: int) -> tuple[int, int]:
    """Make the model busy, ask from so many clients that leave at once, and from 20 that stay.

    Returns how many rows of those that left were run, and how many of those that stayed were answered.
    """
    before = rows(server)
    first = _asked(server, 1)  # leaves while it runs
    time.sleep(0.3)
    gone = _asked(server, clients)
    stay = _asked(server, 20)
    _close(first)
    _close(gone)
    stayed = 0
    for connection in stay:
        connection.settimeout(60)
        stayed += connection.recv(65536).startswith(b"HTTP/1.1 200")
    _close(stay)
    until(lambda: rows(server) - before >= 21, 10)
    return round(rows(server) - before - 21), stayed


def _asked(server: Server, times: int) -> list[socket.socket]:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(ROW)}\r\n\r\n".encode()
    connections = []
    for _ in range(times):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head + ROW)
        connections.append(connection)
    return connections


def _close(connections: Sequence[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def rows(server: Server) -> float:
    """Return how many rows of iris were run."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(n) for n in re.findall(r'^serving_batch_rows_sum\{model="iris".*\} (\S+)$', text, re.M))
