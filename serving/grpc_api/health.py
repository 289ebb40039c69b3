"""`grpc.health.v1.Health`. Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from serving.grpc_api.status import Aborted, Status
from serving.protocols.messages import message

_Response = message("HealthCheckResponse", "grpc.health.v1")


class Health:
    """One state for all of `services`, and for the server as a whole, whose name is empty."""

    def __init__(self, *services: str) -> None:
        self._services = frozenset(("", *services))
        self._serving = False
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Change the state, and tell who watches."""
        if serving is not self._serving:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def _response(self, service: str) -> Any:
        if service not in self._services:
            return _Response(status="SERVICE_UNKNOWN")
        return _Response(status="SERVING" if self._serving else "NOT_SERVING")

    async def check(self, request: Any, _: Any) -> Any:
        """Answer whether a service is served."""
        if request.service not in self._services:
            raise Aborted(Status.NOT_FOUND, "there is no such service")
        return self._response(request.service)

    async def watch(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        """Answer the same, and again with each change; never ends by itself."""
        async for request in requests:
            told = None
            while True:
                changed, response = self._changed, self._response(request.service)
                if response != told:
                    told = response
                    yield response
                    continue  # it may have changed while the client took that
                await changed.wait()
