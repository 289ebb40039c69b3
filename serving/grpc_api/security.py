"""Who may, over gRPC: the table of methods, and the guard that stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from serving.access.access import Access
from serving.access.caller import Scope
from serving.errors import Forbidden, InvalidRequest, ServingError, Unauthenticated
from serving.grpc_api.messages import SERVICE
from serving.grpc_api.status import status_of, trailers

SCOPES: dict[str, Scope | None] = {
    "ServerLive": None,
    "ServerReady": None,
    "ServerMetadata": "predict",
    "ModelReady": "predict",
    "ModelMetadata": "predict",
    "ModelConfig": "predict",
    "ModelStatistics": "predict",
    "ModelInfer": "predict",
    "ModelStreamInfer": "predict",
    "RepositoryIndex": "predict",
    "RepositoryModelLoad": "deploy",
    "RepositoryModelUnload": "deploy",
}
"""What each method of the service requires; None is open. A method that is not here requires `deploy`."""

_REFUSED = (Unauthenticated, Forbidden, InvalidRequest)


class Guard(grpc.GenericRpcHandler):
    """Stands before the handlers of the service: who may not call gets a status before a message is read."""

    def __init__(self, handlers: grpc.GenericRpcHandler, access: Access) -> None:
        self._handlers = handlers
        self._access = access
        prefix = f"/{SERVICE}/"
        closable = {m: s for m, s in SCOPES.items() if s == "deploy" or (s is not None and access.configured)}
        self._open = {prefix + method for method in SCOPES if method not in closable}
        self._scopes: dict[str, Scope] = {prefix + method: scope for method, scope in closable.items()}

    def service(self, handler_call_details: Any) -> Any:
        """Return the method's handler, or one that refuses."""
        method = handler_call_details.method
        handler = self._handlers.service(handler_call_details)
        if handler is None or method in self._open:
            return handler
        scope = self._scopes.get(method, "deploy")
        given = _authorizations(handler_call_details.invocation_metadata)
        try:
            self._admit(given, scope)
        except _REFUSED as error:
            return _refusal(error)
        if handler.request_streaming:
            return self._watched(handler, given, scope)
        return handler

    def _admit(self, given: list[Any], scope: Scope) -> None:
        if len(given) > 1:
            raise InvalidRequest("there are two authorization entries in the metadata: send one")
        self._access.decide(given[0] if given else None, scope)

    def _watched(self, handler: Any, given: list[Any], scope: Scope) -> Any:
        """Judge each request of a stream: it may outlive the key that it began with."""

        async def judged(requests: AsyncIterator[Any], refused: list[ServingError]) -> AsyncIterator[Any]:
            async for request in requests:
                try:
                    self._admit(given, scope)
                except _REFUSED as error:
                    refused.append(error)
                    return
                yield request

        async def stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            refused: list[ServingError] = []
            async for answer in handler.stream_stream(judged(requests, refused), context):
                yield answer
            if refused:
                await _abort(context, refused[0])

        return grpc.stream_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)


def deployer(access: Access, metadata: Any) -> str:
    """Return the name of who makes a call that requires `deploy`. Raises Unauthenticated or Forbidden."""
    given = _authorizations(metadata)
    return access.decide(given[0] if given else None, "deploy").name


def _authorizations(metadata: Any) -> list[Any]:
    return [value for name, value in metadata or () if name == "authorization"]


def _refusal(error: ServingError) -> Any:
    """Make a handler that refuses any kind of call without reading from it."""

    async def refuse(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await _abort(context, error)
        yield  # a generator, as streaming answers are

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _abort(context: Any, error: ServingError) -> None:
    await context.abort(status_of(error), error.message, trailers(error))
