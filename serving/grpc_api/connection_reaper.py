"""What all gRPC connections of one worker share, and who of them is cut."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from serving.timeouts import Timeouts

IDLE_FRAMES, FORGIVEN_S = 1000, 250
"""Frames that bring nothing (pings, settings, resets, empty data) before a connection is cut, and how many of them are
forgiven each second."""


@dataclass(slots=True)
class ConnectionReaper:
    """The connections of one worker, looked at a few times a second: no timer belongs to one of them."""

    timeouts: Timeouts = field(default_factory=Timeouts)
    now: float = field(default_factory=time.monotonic)
    """A coarse clock, moved by `sweep`."""
    cut: Counter[str] = field(default_factory=Counter)
    """Connections, and streams, that this side ended, by reason."""
    connections: set[Any] = field(default_factory=set)
    spare: int = 32
    """Connections beyond the cap that are taken to answer health."""

    def sweep(self) -> None:
        """Cut what takes too long, and forgive what was long ago."""
        before, self.now = self.now, time.monotonic()
        forgiven = int(FORGIVEN_S * (self.now - before))
        for connection in list(self.connections):
            connection.enforce_timeouts(self.now)
            connection.http2.idle.forgive(forgiven)

    def room(self) -> int:
        """Return how many connections more are taken, `spare` ones counted; closes such as have long been quiet."""
        most, here = self.timeouts.connections, len(self.connections)
        if here >= most:
            here -= sum(connection.transport.is_closing() for connection in self.connections)
        if here >= most:
            here -= self._make_room()
        return most + self.spare - here

    def _make_room(self) -> int:
        """Close a sixteenth of all if they are quiet, those first that were told to go; return how many."""
        quiet = sorted((c for c in self.connections if c.is_quiet()), key=lambda c: (bool(c.calls), c.since))
        going = quiet[: max(1, self.timeouts.connections // 16)]
        for connection in going:
            connection.make_room()
        return len(going)
