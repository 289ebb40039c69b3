"""The limit of connections, a turn of the event loop at a time: connections are made in memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serving.http_api.fast_path.protocol import fast_path_for
from serving.http_api.fast_path.state import FastPathState
from tests.drills import heads
from tests.drills.heads import BAITS, LAST, Way, answers, both_ways


@pytest.mark.parametrize("fast", [True, False], ids=["fast_path", "asgi"])
async def test_what_is_refused_is_not_run(fast: bool) -> None:
    """Of a burst within one turn of the loop, so many connections are served as there may be; the rest run nothing."""
    async with both_ways() as (fast_path, _):
        shared: FastPathState = fast_path.app.state.serving.shared
        few = replace(shared, timeouts=replace(shared.timeouts, connections=4), paths=shared.paths if fast else {})
        way = Way(fast_path.app, fast_path_for(few))
        wires = []
        for _ in range(120):
            wires.append(way.connect())
            wires[-1].feed(BAITS[0])  # now it owes an answer, and makes no room
        for wire in wires:
            wire.feed(BAITS[0])  # the same again, known by now or thrown away
            wire.feed(LAST)
        await heads.settled(wires)
        statuses = [[int(first.split()[1]) for first, _, _ in answers(bytes(wire.written))] for wire in wires]
        assert statuses[:4] == [[200, 200, 200]] * 4
        assert statuses[4:68] == [[503]] * 64
        assert statuses[68:] == [[]] * 52
        assert fast_path.app.state.serving.metrics.totals([("iris", "2")])["iris", "2"].ok == 8


async def test_who_is_beyond_the_limit_may_ask_for_health() -> None:
    """Where all connections are busy, a few more are taken, and answer probes and nothing else."""
    async with both_ways() as (fast_path, _):
        shared: FastPathState = fast_path.app.state.serving.shared
        way = Way(fast_path.app, fast_path_for(replace(shared, timeouts=replace(shared.timeouts, connections=1))))
        busy, probe, other = way.connect(), None, None
        busy.feed(BAITS[0])
        probe, other = way.connect(), way.connect()
        probe.feed(LAST)
        other.feed(b"GET /v2/models/iris HTTP/1.1\r\nhost: x\r\n\r\n")
        await heads.settled([probe, other])
        assert answers(bytes(probe.written))[0][0] == b"HTTP/1.1 200 OK"
        assert answers(bytes(other.written))[0][0].startswith(b"HTTP/1.1 503")
        busy.feed(LAST)
        await heads.settled([busy])


async def test_the_limit_holds_within_one_turn_of_the_loop() -> None:
    """Newcomers take the places of idle connections, and no more than they need, however many come before a turn."""
    async with both_ways() as (fast_path, _):
        shared: FastPathState = fast_path.app.state.serving.shared
        way = Way(fast_path.app, fast_path_for(replace(shared, timeouts=replace(shared.timeouts, connections=64))))
        wires = [way.connect() for _ in range(500)]
        assert 60 <= sum(not wire.is_closing() for wire in wires) <= 64
        wires[-1].feed(BAITS[0])
        wires[-1].feed(LAST)
        await heads.settled([wires[-1]])
        assert answers(bytes(wires[-1].written))[0][0] == b"HTTP/1.1 200 OK"
        await asyncio.sleep(0)
