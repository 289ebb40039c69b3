"""What all connections of one worker share, and who of them is cut."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from serving.bodies.byte_budget import ByteBudget
from serving.timeouts import Timeouts


@dataclass(slots=True)
class ConnectionReaper:
    """What all connections of one worker share."""

    patience: Timeouts = field(default_factory=Timeouts)
    now: float = field(default_factory=time.monotonic)
    """A coarse clock, moved by `sweep`, so that an answer needs no timer of its own."""
    cut: Counter[str] = field(default_factory=Counter)
    """Connections that this side ended, by reason."""
    bodies: ByteBudget = field(default_factory=lambda: ByteBudget(sys.maxsize))
    """The bytes that the process holds: of bodies, and of answers that clients have not taken."""
    taken: set[Any] = field(init=False, default_factory=set)
    """Connections that count: neither spare ones nor such as were refused or closed."""

    def sweep(self, connections: Any) -> None:
        """Cut what takes too long; to be called twice a second."""
        now = self.now = time.monotonic()
        for connection in list(connections):
            connection.look(now)

    def make_room(self) -> bool:
        """Close the connections that have been quiet longest, a sixteenth of all; tell whether there is room now.

        Their places are free at once, and not when the loop turns: thousands may be accepted before that.
        """
        quiet = sorted((c for c in self.taken if c.is_quiet() and not c.transport.is_closing()), key=lambda c: c.since)
        for connection in quiet[: max(1, self.patience.connections // 16)]:
            connection.give_way()
        return bool(quiet)
