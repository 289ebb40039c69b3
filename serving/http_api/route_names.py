"""An application's routes by their whole templates, and where among them predictions may be answered past it."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.types import Scope

from serving.http_api.own_route import OwnRoute
from serving.http_api.prediction_paths import ROUTES


class RouteNames:
    """The routes of one application, as they are when it starts."""

    def __init__(self, app: FastAPI) -> None:
        self._plain = not app.user_middleware
        self._contexts = list(iter_route_contexts(app.routes))
        self._by_route: dict[int, list[RouteContext]] = {}
        for context in self._contexts:
            self._by_route.setdefault(id(context.original_route), []).append(context)

    def of(self, scope: Scope) -> str:
        """Return the template of the route that a request got, the prefixes of its routers and all."""
        route = scope.get("route")
        found = self._by_route.get(id(route), [])
        if len(found) > 1:  # a router that is included twice
            found = [context for context in found if context.path_regex.match(scope["path"])]
        path = found[0].path if found else getattr(route, "path", None)
        return path or "unknown"

    def plain_prefix(self) -> str | None:
        """Return below which path predictions may be answered without asking the application, None where nowhere.

        Its middleware, and dependencies that the routes were included with, may want to refuse; a route in front of
        them may be for the same path, and a limit of bodies is another one than this server's.
        """
        if not self._plain:
            return None
        first = next(iter(ROUTES.values()))
        for number, context in enumerate(self._contexts):
            original = context.original_route
            if not (isinstance(original, OwnRoute) and original.path == first):
                continue
            prefix = (context.path or "").removesuffix(first)
            if "{" in prefix or context.dependencies or getattr(context, "max_body_size", None) is not None:
                continue
            before = (each for each in self._contexts[:number] if not isinstance(each.original_route, OwnRoute))
            if not any(_may_take(each, prefix) for each in before):
                return prefix
        return None


def _may_take(context: RouteContext, prefix: str) -> bool:
    """Tell whether a route may be for a path of predictions below a prefix: in doubt it is."""
    methods = context.methods
    if methods and "POST" not in methods:
        return False
    start = (context.path or "").partition("{")[0]
    return any(start.startswith(ours) or ours.startswith(start) for ours in (f"{prefix}/v1/", f"{prefix}/v2/"))
