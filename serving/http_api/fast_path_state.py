"""What all fast path connections of one worker share: the paths and the counters. Nothing that a caller sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.http_api.connection_reaper import ConnectionReaper
from serving.http_api.prediction import Endpoint
from serving.metrics.recorders import RouteMetrics


@dataclass(slots=True)
class FastPathState(ConnectionReaper):
    """What all fast path connections of one worker share."""

    paths: dict[bytes, Endpoint] = field(default_factory=dict)
    """Raw request target to prediction target; replaced entry by entry as models come and go. Empty: no fast path."""
    routes: dict[str, RouteMetrics] = field(default_factory=dict)
    """Counters by route template; empty where metrics are off."""
    defaults: list[tuple[bytes, bytes]] = field(default_factory=list)
    heads: dict[tuple[int, bytes], bytes] = field(default_factory=dict)

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
