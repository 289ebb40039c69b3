"""Who may, over HTTP: what a route requires is said on the route, and shown in the documentation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serving.access.principal import Principal, Scope
from serving.errors import ServingError
from serving.http_api.services import services_of
from serving.prediction.authorization import authorization, authorize

BEARER = HTTPBearer(
    scheme_name="bearer", description="A key made by `serving keys create`, or a token (JWT).", auto_error=False
)

CALLER = "serving.caller"
"""Where a scope has the Principal who was let in."""


def may(request: Request, scope: Scope) -> bool:
    """Tell whether the sender of a request could do what `scope` names, for answers that tell them more."""
    try:
        services_of(request).access.decide(authorization(request.scope["headers"]), scope, quiet=True)
    except ServingError:
        return False
    return True


def requires(scope: Scope) -> Callable[..., Awaitable[Principal]]:
    """Make the dependency of a route, or of all routes of a router, that only callers with `scope` may use.

    It yields the Principal.
    """

    # As a default and not in Annotated: an annotation is text until it is used, and would not find `scope` then.
    async def permitted(
        request: Request,
        _: HTTPAuthorizationCredentials | None = Security(BEARER, scopes=[scope]),  # noqa: B008
    ) -> Principal:
        caller = request.scope[CALLER] = authorize(services_of(request).access, request.scope["headers"], scope)
        return caller

    return permitted


Deployer = Annotated[Principal, Depends(requires("deploy"))]
"""The caller of a route that changes what is served; a parameter of this type closes the route to all others."""
