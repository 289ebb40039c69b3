"""What all connections of one worker share: who is cut, the paths, the counters. Nothing that a caller sent."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.bodies.byte_budget import ByteBudget
from serving.metrics.recorders import RouteMetrics
from serving.prediction.endpoint import Endpoint
from serving.protocols.headers import BINARY, JSON
from serving.timeouts import Timeouts


@dataclass(slots=True)
class FastPathState:
    """What all connections of one worker share."""

    timeouts: Timeouts = field(default_factory=Timeouts)
    now: float = field(default_factory=time.monotonic)
    """A coarse clock, moved by `sweep`, so that an answer needs no timer of its own."""
    cut: Counter[str] = field(default_factory=Counter)
    """Connections that this side ended, by reason."""
    bodies: ByteBudget = field(default_factory=lambda: ByteBudget(sys.maxsize))
    """The bytes that the process holds: of bodies, and of answers that clients have not taken."""
    taken: set[Any] = field(init=False, default_factory=set)
    """Connections that count: neither spare ones nor such as were refused or closed."""
    paths: dict[bytes, Endpoint] = field(default_factory=dict)
    """Endpoints by raw request target; changed entry by entry as models come and go. Empty: no fast path."""
    routes: dict[str, RouteMetrics] = field(default_factory=dict)
    """Counters by route template; empty where metrics are off."""
    _defaults: list[tuple[bytes, bytes]] = field(default_factory=list)
    _heads: dict[tuple[int, bytes], bytes] = field(default_factory=dict)

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
        for connection in quiet[: max(1, self.timeouts.connections // 16)]:
            connection.give_way()
        return bool(quiet)

    def heads(self, defaults: list[tuple[bytes, bytes]]) -> dict[tuple[int, bytes], bytes]:
        """Return the heads of answers with status 200, and those of others that were made, by status and content type.

        A head is status line, uvicorn's own headers and content type. `defaults` is a new list each second, for the
        date, and so is what is returned: what a thread was given does not change.
        """
        if defaults is not self._defaults:
            self._defaults, self._heads = defaults, {}
            for kind in (JSON, BINARY):
                self.head(200, kind, defaults)
        return self._heads

    def head(self, status: int, kind: bytes, defaults: list[tuple[bytes, bytes]]) -> bytes:
        """Return the head of an answer."""
        heads = self._heads if defaults is self._defaults else self.heads(defaults)
        made = heads.get((status, kind))
        if made is None:
            lines = b"".join([b"%b: %b\r\n" % pair for pair in defaults])
            made = heads[status, kind] = b"%b%bcontent-type: %b\r\n" % (STATUS_LINE[status], lines, kind)
        return made
