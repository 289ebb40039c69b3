"""The channel between coordinator and worker: whole messages of any size, and nobody who waits for the other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
import uvloop

from serving.deploy.channel import Channel, pair

Wait = Callable[[Callable[[], bool]], None]


class End:
    """One end on an event loop of its own, which may answer each message with as much."""

    def __init__(self, sock: Any, loop: asyncio.AbstractEventLoop, *, answers: bool = False) -> None:
        self.heard: list[dict[str, Any]] = []
        self._answers = answers
        self._loop = loop
        self.channel = Channel(sock, self._hear)
        self._thread = threading.Thread(target=loop.run_forever)
        self._thread.start()
        self.do(self.channel.connect)

    def do(self, action: Callable[..., Any], *given: Any) -> None:
        """Have something done on the loop, and wait for it."""

        async def act() -> None:
            done = action(*given)
            if asyncio.iscoroutine(done):
                await done

        asyncio.run_coroutine_threadsafe(act(), self._loop).result(30)

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("kind") == "unknown":
            raise KeyError(message["kind"])
        self.heard.append(message)
        if self._answers:
            self.channel.send(message)

    def stop(self) -> None:
        self.do(self.channel.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


@contextmanager
def parent(sock: Any) -> Iterator[End]:
    end = End(sock, asyncio.SelectorEventLoop())
    try:
        yield end
    finally:
        end.stop()


@contextmanager
def worker(sock: Any, *, answers: bool = False) -> Iterator[End]:
    end = End(sock, uvloop.new_event_loop(), answers=answers)
    try:
        yield end
    finally:
        end.stop()


def test_messages_of_megabytes_arrive_whole_and_in_order(eventually: Wait) -> None:
    """Both ways at once, small ones between large ones, again and again."""
    ours, theirs = pair()
    sizes = [3 * 2**20, 0, 16 * 1024 - 20, 2**16, 1, 2**20] * 5
    with parent(ours) as one, worker(theirs, answers=True) as other:
        for number, size in enumerate(sizes):
            one.do(one.channel.send, {"kind": "told", "number": number, "text": "x" * size})
        eventually(lambda: len(one.heard) == len(sizes) and one.channel.idle)
    for found in (other.heard, one.heard):
        assert [message["number"] for message in found] == list(range(len(sizes)))
        assert [len(message["text"]) for message in found] == sizes


def test_nobody_waits_for_a_worker_that_does_not_read(eventually: Wait) -> None:
    """What a deaf worker is sent is kept, its lag grows, and once it listens it gets all of it."""
    ours, theirs = pair()
    with parent(ours) as one:
        assert one.channel.behind(time.monotonic()) == 0
        for number in range(20):
            one.do(one.channel.send, {"kind": "told", "number": number, "text": "x" * 2**20})
        now = time.monotonic()
        assert one.channel.behind(now + 60) - one.channel.behind(now) == pytest.approx(60)
        with worker(theirs) as other:
            eventually(lambda: one.channel.idle)
            assert [message["number"] for message in other.heard] == list(range(20))
            assert one.channel.behind(time.monotonic()) == 0


def test_who_lags_is_told_what_is_so_now(eventually: Wait) -> None:
    """Of news that came while a worker did not read it gets the last, after all that was sent before."""
    ours, theirs = pair()
    with parent(ours) as one:
        one.do(one.channel.send, {"number": 0})
        for number in range(1, 10):
            one.do(one.channel.send_latest, orjson.dumps({"number": number}))
        with worker(theirs) as other:
            eventually(lambda: len(other.heard) == 2)
            one.do(one.channel.send_latest, b'{"number":10}')
            eventually(lambda: len(other.heard) == 3)
    assert [message["number"] for message in other.heard] == [0, 9, 10]


def test_the_end_of_a_worker_is_noticed(eventually: Wait) -> None:
    """A worker that ended is known to have, whatever is sent to it meanwhile; and it counts as silent since then."""
    ours, theirs = pair()
    with parent(ours) as one:
        theirs.close()
        one.do(one.channel.send, {"kind": "ping"})
        eventually(lambda: one.channel.ended_at is not None)
        assert one.channel.behind(time.monotonic() + 60) >= 60
        one.do(one.channel.send, {"kind": "ping"})


def test_what_is_told_to_a_parent_that_ended_is_dropped(eventually: Wait) -> None:
    """A worker goes on where its coordinator has gone: what it is asked to pass on is no error."""
    ours, theirs = pair()
    with worker(theirs) as one:
        ours.close()
        eventually(lambda: one.channel.ended_at is not None)
        one.do(one.channel.send, {"kind": "scan"})


def test_a_worker_that_can_not_be_told_counts_as_silent(eventually: Wait, caplog: pytest.LogCaptureFixture) -> None:
    """Where a message can't be taken the log says why, and the worker's silence has it replaced."""
    ours, theirs = pair()
    with parent(ours) as one, worker(theirs):
        one.do(one.channel.send, {"kind": "unknown"})
        eventually(lambda: one.channel.ended_at is not None)
    assert "KeyError" in caplog.text
