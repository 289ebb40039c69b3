"""The channel between coordinator and worker: whole messages of any size, and nobody who waits for the other."""

from __future__ import annotations

import asyncio
import select
import threading
import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest
import uvloop

from serving.deploy.channel import Link, WorkerEnd, pair

Wait = Callable[[Callable[[], bool]], None]


class Worker:
    """A worker's end on an event loop of its own, which answers each message with as much."""

    def __init__(self, sock: Any) -> None:
        self.heard: list[dict[str, Any]] = []
        self._loop = uvloop.new_event_loop()
        self._end = WorkerEnd(sock, self._hear)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _hear(self, message: dict[str, Any]) -> None:
        self.heard.append(message)
        self._end.send(message)

    def _run(self) -> None:
        self._loop.call_soon(self._end.start)
        self._loop.run_forever()
        self._end.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def test_messages_of_megabytes_arrive_whole_and_in_order() -> None:
    """Both ways at once, small ones between large ones, again and again."""
    ours, theirs = pair()
    link, worker = Link(ours), Worker(theirs)
    sizes = [3 * 2**20, 0, 16 * 1024 - 20, 2**16, 1, 2**20] * 5
    try:
        for number, size in enumerate(sizes):
            link.send(orjson.dumps({"kind": "told", "number": number, "text": "x" * size}))
        answers: list[dict[str, Any]] = []
        until = time.monotonic() + 30
        while (len(answers) < len(sizes) or not link.idle) and time.monotonic() < until:
            select.select([link], [link] if link.writes else [], [], 1)
            link.flush()
            answers += link.receive()
    finally:
        link.close()
        worker.stop()
    for found in (worker.heard, answers):
        assert [message["number"] for message in found] == list(range(len(sizes)))
        assert [len(message["text"]) for message in found] == sizes
    assert link.idle


def test_nobody_waits_for_a_worker_that_does_not_read(eventually: Wait) -> None:
    """What a deaf worker is sent is kept, its lag grows, and once it listens it gets all of it."""
    ours, theirs = pair()
    link = Link(ours)
    assert link.behind(time.monotonic()) == 0
    for number in range(20):
        link.send(orjson.dumps({"kind": "told", "number": number, "text": "x" * 2**20}))
    now = time.monotonic()
    assert link.writes
    assert link.behind(now + 60) - link.behind(now) == pytest.approx(60)
    worker = Worker(theirs)

    def caught_up() -> bool:
        link.flush()
        link.receive()
        return link.idle

    try:
        eventually(caught_up)
        assert [message["number"] for message in worker.heard] == list(range(20))
        assert link.behind(time.monotonic()) == 0
    finally:
        link.close()
        worker.stop()


def test_the_end_of_a_worker_shows_where_it_is_read_from() -> None:
    """A worker that ended is known to have, whatever is sent to it meanwhile; and it counts as silent since then."""
    ours, theirs = pair()
    link = Link(ours)
    theirs.close()
    link.send(b'{"kind":"ping"}')
    with pytest.raises(EOFError):
        link.receive()
    link.close()
    assert link.behind(time.monotonic() + 60) >= 60
