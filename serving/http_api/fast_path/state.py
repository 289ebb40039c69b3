"""What all fast path connections of one worker share: the paths and the counters. Nothing that a caller sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serving.http_api.fast_path.reaper import ConnectionReaper
from serving.metrics.recorders import RouteMetrics
from serving.prediction.endpoint import Endpoint
from serving.protocols.headers import BINARY, JSON


@dataclass(slots=True)
class FastPathState(ConnectionReaper):
    """What all fast path connections of one worker share."""

    paths: dict[bytes, Endpoint] = field(default_factory=dict)
    """Endpoints by raw request target; changed entry by entry as models come and go. Empty: no fast path."""
    routes: dict[str, RouteMetrics] = field(default_factory=dict)
    """Counters by route template; empty where metrics are off."""
    _defaults: list[tuple[bytes, bytes]] = field(default_factory=list)
    _heads: dict[tuple[int, bytes], bytes] = field(default_factory=dict)

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
