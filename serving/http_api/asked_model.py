"""What is asked about a model: the same of the model, of one of its versions, and of the version that has a label."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from serving.engine.model import Model
from serving.http_api.own_route import OwnRoute
from serving.http_api.security import requires
from serving.http_api.services import LiveFleet


async def _model(model: str) -> None:
    """Declare what a path names, for the document."""


async def _version(model: str, version: str) -> None:
    """As above."""


async def _label(model: str, label: str) -> None:
    """As above."""


def routers(prefix: str, tag: str) -> tuple[APIRouter, APIRouter, APIRouter]:
    """Make the routers of what callers who may predict ask about models, about versions, and about labels."""
    made = [
        APIRouter(
            route_class=OwnRoute,
            prefix=f"{prefix}/{{model}}{place}",
            tags=[tag],
            dependencies=[Depends(requires("predict")), Depends(named)],
        )
        for place, named in (("", _model), ("/versions/{version}", _version), ("/labels/{label}", _label))
    ]
    return made[0], made[1], made[2]


async def asked_model(request: Request, fleet: LiveFleet) -> Model:
    """Give the version that the path of a request names. Raises ModelNotFound or NotReady."""
    named = request.path_params
    return fleet.get(named["model"], named.get("version"), named.get("label"))


AskedModel = Annotated[Model, Depends(asked_model)]


async def asked_names(request: Request) -> tuple[str, str | None]:
    """Give the names of the model and of the version, if any, that the path of a request has."""
    return request.path_params["model"], request.path_params.get("version")


AskedNames = Annotated[tuple[str, str | None], Depends(asked_names)]
