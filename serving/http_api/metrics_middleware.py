"""The outermost middleware: a request id in and out, and a count and a time for every request by ASGI.

It also knows the prediction paths, and takes a request for one straight to its answer: the router's walk over all
routes costs more than a small prediction.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import shown
from serving.http_api.route import IDENTITY, PREDICTION, answer
from serving.http_api.route_names import RouteNames
from serving.http_api.security import CALLER
from serving.http_api.services import Services
from serving.prediction.endpoint import Endpoint
from serving.prediction.request_id import request_id
from serving.prediction.request_log import Ended
from serving.protocols.headers import header

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Observed:
    """Pure ASGI; wraps `app`.

    names: of the app's routes. paths: endpoints by raw path, for requests that need nothing of the app.
    """

    def __init__(self, app: ASGIApp, services: Services, *, names: RouteNames, paths: dict[bytes, Endpoint]) -> None:
        self._app = app
        self._bodies, self._log, self._metrics = services.bodies, services.log, services.metrics
        self._names = names
        self._paths = paths
        self._scopes: dict[int, tuple[Scope, Endpoint | None]] = {}  # of requests in progress
        if self._metrics is not None:
            self._metrics.in_progress = self._in_progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        identity = scope[IDENTITY] = request_id(header(headers, b"x-request-id"))
        began = time.monotonic()
        status = 499  # the client left before there was an answer
        size = 0

        async def observed_send(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity)]
            else:
                size += len(message.get("body", b""))
            await send(message)

        endpoint = self._paths.get(scope.get("raw_path", b"")) if scope["method"] == "POST" else None
        if endpoint is not None and header(headers, b"origin") is not None:
            endpoint = None  # cross-origin requests need the CORS middleware
        self._scopes[id(scope)] = scope, endpoint
        try:
            if endpoint is not None:
                await answer(endpoint, scope, receive, observed_send, self._bodies)
            else:
                await self._app(scope, receive, observed_send)
        except Exception:
            status = 500
            raise
        finally:
            del self._scopes[id(scope)]
            route, method = self._labels(scope, endpoint)
            if self._metrics is not None:
                self._metrics.route(route, method).finished(status, time.monotonic() - began)
            if self._log is not None:
                model, caller = scope.get("path_params", {}).get("model"), scope.get(CALLER)
                self._log.asked(
                    Ended(identity, route, status, size, method),
                    began,
                    headers,
                    # A connection keeps its last scope: the model must not live on in it.
                    prediction=scope.pop(PREDICTION, None),
                    model=shown(str(model)) if model is not None else None,
                    caller=caller.name if caller is not None else None,
                )

    def _in_progress(self) -> Iterator[tuple[str, str]]:
        """Return route and method of each request in progress: which route it is, is known some time after it began."""
        return (self._labels(scope, endpoint) for scope, endpoint in self._scopes.copy().values())

    def _labels(self, scope: Scope, endpoint: Endpoint | None) -> tuple[str, str]:
        route = endpoint.route if endpoint is not None else self._names.of(scope)
        return route, scope["method"] if scope["method"] in _METHODS else "other"
