"""The outermost middleware: a request id in and out, and a count and a time for every request by ASGI."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http_api.answer import header, request_id
from serving.metrics import Metrics

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Observed:
    """Pure ASGI; wraps `app`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics | None) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = request_id(header(scope["headers"], b"x-request-id"))
        began = time.monotonic()
        status = 499  # the client left before there was an answer

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity)]
            await send(message)

        if self._metrics is not None:
            self._metrics.in_flight += 1
        try:
            await self._app(scope, receive, observed_send)
        except Exception:
            status = 500
            raise
        finally:
            if self._metrics is not None:
                self._metrics.in_flight -= 1
                route = getattr(scope.get("route"), "path", "unknown")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._metrics.route(route, method).finished(status, time.monotonic() - began)
