"""What all lane connections of one worker share: the paths, the counters, and heads that were read before."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.engine.admission import Bodies
from serving.http_api.answer import Headers
from serving.http_api.asks import Asks
from serving.http_api.guard import Guard
from serving.http_api.prediction import Target
from serving.metrics.gathered import RouteMetrics

_MOST_HEADS = 1024
_LONGEST_HEAD = 1024


@dataclass(slots=True, frozen=True)
class Known:
    """What the parser read from the head of a plain request: parsing costs more than all else that the lane does."""

    url: bytes
    headers: Headers
    length: int
    asks: Asks


@dataclass(slots=True)
class Door(Guard):
    """What all lane connections of one worker share."""

    paths: dict[bytes, Target] = field(default_factory=dict)
    """Raw request target to prediction target; replaced entry by entry as models come and go. Empty: no lane."""
    max_body_bytes: int = 0
    routes: dict[str, RouteMetrics] = field(default_factory=dict)
    """Counters by route template; empty where metrics are off."""
    defaults: list[tuple[bytes, bytes]] = field(default_factory=list)
    bodies: Bodies = field(default_factory=lambda: Bodies(sys.maxsize))
    heads: dict[tuple[int, bytes], bytes] = field(default_factory=dict)
    known: dict[bytes, Known] = field(default_factory=dict)

    def remember(self, data: bytes, url: bytes, headers: Headers, length: int, asks: Asks) -> None:
        """Keep the head of a plain request if `data` is all of it: the same bytes will mean the same again."""
        end = data.find(b"\r\n\r\n") + 4
        if len(data) - end != length or end > _LONGEST_HEAD or length > Bodies.FREE:
            return
        if len(self.known) >= _MOST_HEADS:
            self.known.clear()
        self.known[data[:end]] = Known(url, headers, length, asks)

    def head(self, status: int, kind: bytes, defaults: list[tuple[bytes, bytes]]) -> bytes:
        """Return status line, uvicorn's own headers and content type; the list is new each second, for the date."""
        if defaults is not self.defaults:
            self.defaults = defaults
            self.heads.clear()
        made = self.heads.get((status, kind))
        if made is None:
            lines = b"".join([b"%b: %b\r\n" % pair for pair in defaults])
            made = self.heads[status, kind] = b"%b%bcontent-type: %b\r\n" % (STATUS_LINE[status], lines, kind)
        return made
