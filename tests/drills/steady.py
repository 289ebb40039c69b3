"""Steady load from threads that keep their connections, and tell what became of each request."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROW = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]]}).encode()
PATH = "/v1/models/iris:predict"


class Load:
    """`connections` threads that ask one thing after the other.

    outcomes: "ok" (200 and the right label), "status <n>", "refused" (no connection was had), "lost" (a connection was
    had, a request was sent, and no whole answer came), "lost twice" (the same once more after one retry).
    """

    def __init__(self, port: int, *, connections: int, retry: bool = False) -> None:
        self._port = port
        self._retry = retry
        self._stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.opened = 0
        """Connections that were had."""
        self.said_close = 0
        """Answers that announced the end of their connection."""
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(connections)]

    @property
    def answered(self) -> int:
        return self.outcomes["ok"]

    def _work(self) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            connection, outcome = self._ask(connection)
            if outcome == "lost" and self._retry:
                connection, again = self._ask(None)
                if again in {"lost", "refused"}:
                    outcome = "lost twice"
            self.outcomes[outcome] += 1
            if outcome == "refused":
                time.sleep(0.01)
        if connection is not None:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection | None) -> tuple[http.client.HTTPConnection | None, str]:
        if connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
            try:
                connection.connect()
            except OSError:
                return None, "refused"
            self.opened += 1
        try:
            connection.request("POST", PATH, ROW)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return None, "lost"
        ends = answer.getheader("connection") == "close"
        self.said_close += ends
        if ends:
            connection.close()
        right = answer.status == 200 and b'"label":"setosa"' in body
        return (None if ends else connection), "ok" if right else f"status {answer.status}"

    @contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(35)


def until(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Wait on a condition; return the seconds it took, or infinity where it did not come true."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if condition():
            return time.monotonic() - began
        time.sleep(0.01)
    return float("inf")
