"""What a route takes in its query string: a model for each, so that a misspelt parameter is refused and not ignored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeAlias

from fastapi import Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict


class Parameters(BaseModel):
    """Base of what changes something may be given; a name that is not in it is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


NoParameters: TypeAlias = Annotated[Parameters, Query()]
"""The type of a parameter of a route that takes none."""


def taken(request: Request) -> Iterable[str]:
    """Return the names of the parameters that a request's route takes."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute):
        return ()
    models = [field.field_info.annotation for field in route.dependant.query_params]
    return [name for model in models if isinstance(model, type(Parameters)) for name in model.model_fields]
