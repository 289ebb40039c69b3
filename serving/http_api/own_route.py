"""The class of this server's own routes: their errors have its form in anybody's application, and nobody else's do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from serving.errors import DETAILS_SHOWN, Detail, InvalidRequest, ServingError, shown
from serving.http_api.answer import error_body, error_headers, status_of
from serving.http_api.openapi.documents import Error
from serving.http_api.parameters import taken
from serving.http_api.upload import ClientLeft
from serving.protocols import strict_json
from serving.repository.traffic import sentence

_NAMES = ("model", "version", "label")
"""Parameters of paths."""
_methods: defaultdict[str, set[str]] = defaultdict(set)
"""What is taken at each path: each method has a route of its own."""


class OwnRoute(APIRoute):
    """A route that answers errors as every route of this server does."""

    def __init__(self, *args: Any, responses: dict[int | str, dict[str, Any]] | None = None, **kwargs: Any) -> None:
        refused = {"model": Error, "description": "It is refused"}  # else FastAPI describes an error of its own
        super().__init__(*args, responses={"4XX": refused, **(responses or {})}, **kwargs)
        _methods[self.path] |= self.methods or set()

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match whole paths: Starlette's pattern lets a line end follow, which a proxy takes for another path.

        What is called a name ends before a colon: else `iris:predict` were a model too, for other methods than POST.
        """
        match, found = super().matches(scope)
        named = found.get("path_params", {})
        if scope["path"].endswith("\n") or any(":" in named.get(name, "") for name in _NAMES):
            return Match.NONE, {}
        return match, found

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for this path; one with another method is told all that the path takes."""
        if scope["method"] in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        allow = ", ".join(sorted(_methods[self.path]))
        refusal = InvalidRequest("this path does not take this method: see Allow")
        await _answer(refusal, 405, {"allow": allow})(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler, with all that it depends on."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except ServingError as error:
                return await error_response(request, error)
            except RequestValidationError as error:
                return _answer(_invalid(request, error), 400)
            except ClientLeft:
                return Response(status_code=499)  # nobody reads it

        return answer


async def error_response(request: Request, error: Exception) -> Response:
    """Answer a ServingError with its status and details; to be given to `app.add_exception_handler`."""
    assert isinstance(error, ServingError)  # noqa: S101  Starlette types every handler for Exception
    route = request.scope.get("route")
    protocol = "v2" if isinstance(route, OwnRoute) and route.path.startswith("/v2") else "v1"
    return _answer(error, status_of(error, protocol))


async def http_error(request: Request, error: Exception) -> Response:
    """Answer what Starlette refuses in this server's form; what an application's own routes raise in FastAPI's."""
    assert isinstance(error, HTTPException)  # noqa: S101
    route = request.scope.get("route")
    if route is not None and not isinstance(route, OwnRoute):
        return await http_exception_handler(request, error)
    text = "there is nothing at this path: see /docs" if error.status_code == 404 else str(error.detail)
    return _answer(InvalidRequest(text), error.status_code, dict(error.headers or {}))


async def unforeseen(request: Request, error: Exception) -> Response:
    """Answer for a fault in code."""
    return _answer(ServingError("the server failed on this request; its log has the reason"), 500)


def _answer(error: ServingError, status: int, headers: dict[str, str] | None = None) -> Response:
    extra = {k.decode(): v.decode() for k, v in error_headers(error)}
    return Response(error_body(error), status, headers={**extra, **(headers or {})}, media_type="application/json")


def _invalid(request: Request, error: RequestValidationError) -> InvalidRequest:
    details = []
    for found in error.errors()[:DETAILS_SHOWN]:
        text = sentence(found)
        if found["type"] == "extra_forbidden":
            name, known = shown(str(found["loc"][1])), ", ".join(taken(request)) or "none"
            text = f"{name}: there is no such parameter; parameters: {known}"
        details.append(Detail(strict_json.pointer(*found["loc"]), text))
    return InvalidRequest(f"the request is not valid: {details[0].message}; see /docs", details)
