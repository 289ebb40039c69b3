"""Who may, over HTTP: what a route requires is said on the route, and shown in the documentation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serving.access.access import Access
from serving.access.principal import Principal, Scope
from serving.errors import InvalidRequest, ServingError
from serving.protocols.headers import Headers

BEARER = HTTPBearer(
    scheme_name="bearer", description="A key made by `serving keys create`, or a token (JWT).", auto_error=False
)


def authorization(headers: Headers) -> bytes | None:
    """Return the Authorization header. Raises InvalidRequest where there are two: a proxy may have judged the other."""
    given = None
    for name, value in headers:
        if name == b"authorization":
            if given is not None:
                raise InvalidRequest("there are two Authorization headers: send one")
            given = value
    return given


def admit(access: Access, headers: Headers, scope: Scope, among: frozenset[str] | None = None) -> Principal:
    """Return who sent a request. Raises Unauthenticated or Forbidden where they may not do what `scope` names.

    among: see `Access.decide`.
    """
    return access.decide(authorization(headers), scope, among=among)


def may(request: Request, scope: Scope) -> bool:
    """Tell whether the sender of a request could do what `scope` names, for answers that tell them more."""
    try:
        request.app.state.access.decide(authorization(request.scope["headers"]), scope, quiet=True)
    except ServingError:
        return False
    return True


def requires(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """Make the dependency of a route, or of all routes of a router, that only callers with `scope` may use.

    It yields the Caller.
    """

    # As a default and not in Annotated: an annotation is text until it is used, and would not find `scope` then.
    async def permitted(
        request: Request,
        _: HTTPAuthorizationCredentials | None = Security(BEARER, scopes=[scope]),  # noqa: B008
    ) -> Principal:
        return admit(request.app.state.access, request.scope["headers"], scope)

    return permitted


Deployer = Annotated[Principal, Depends(requires("deploy"))]
"""The caller of a route that changes what is served; a parameter of this type closes the route to all others."""
