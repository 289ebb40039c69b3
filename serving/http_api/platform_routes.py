"""The paths that a platform asks of its container: for predictions, for health, and for models that come by request.

Predictions take the one way of all of them (`serving.http_api.route`), in MLflow's dialect.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from serving.access.principal import ANYONE, Principal
from serving.deploy import adopted
from serving.errors import Conflict, InvalidRequest, ModelInvalid, ModelNotFound, NotReady, shown
from serving.http_api.json_body import read_json
from serving.http_api.metadata import json_answer
from serving.http_api.own_route import OwnRoute
from serving.http_api.route import PredictionResponse
from serving.http_api.security import requires
from serving.http_api.services import LiveFleet, LiveServices, Services, services_of
from serving.platforms import Platform
from serving.prediction.authorization import authorize
from serving.protocols import mlflow
from serving.repository import transitions
from serving.repository.repository import NAME


def router(platform: Platform) -> APIRouter:
    """Make the routes of a platform."""
    made = APIRouter(route_class=OwnRoute, include_in_schema=False)

    @made.post(platform.predict)
    async def predict(request: Request) -> Response:
        services = services_of(request)
        return PredictionResponse(mlflow.PROTOCOL, services, lambda: _only_model(services))

    @made.post(platform.named)
    async def predict_named(request: Request) -> Response:
        services, name = services_of(request), request.path_params["model"]
        return PredictionResponse(
            mlflow.PROTOCOL, services, (lambda: _loaded(services, name)) if platform.many else None
        )

    async def healthy(fleet: LiveFleet) -> Response:
        # Where models come by request, none need be there yet.
        is_ready = fleet.ready or (platform.many and fleet.started and not fleet.draining)
        return Response("\n", 200 if is_ready else 503, media_type="text/plain")

    for path in platform.healthy:
        made.add_api_route(path, healthy, methods=["GET", "HEAD"])
    if platform.version:

        @made.get("/version")
        async def own_version() -> Response:
            return Response(version("serving"), media_type="text/plain")

    if platform.many:
        made.include_router(_models)
    return made


def _only_model(services: Services) -> str:
    """Name the model that a request means which names none. Raises ModelNotFound, NotReady."""
    if services.platform_model is not None:
        return services.platform_model
    names = sorted(services.fleet.models)
    if not names:
        raise NotReady("no model is served")
    if len(names) > 1:
        raise ModelNotFound(f"there are {len(names)} models: the server must be told which is meant, by platform_model")
    return names[0]


class _Asked(BaseModel):
    """A model to be loaded, as SageMaker asks for it."""

    model_name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    """What requests will call it."""
    url: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=4096)]
    """Folder where it lies."""


async def _who_may_load(request: Request) -> Principal:
    """Let the platform in, which has no key to send: where none is set, its network is what keeps others away."""
    access = services_of(request).access
    return authorize(access, request.scope["headers"], "deploy") if access.configured else ANYONE


@asynccontextmanager
async def _alone(services: Services) -> AsyncIterator[None]:
    """Wait until nobody else loads or unloads, in whatever worker: what one has taken, another would drop."""
    async with services.one_gate:
        with await asyncio.to_thread(adopted.lock, services.fleet.changes.store.root):
            yield


_Loader = Annotated[Principal, Depends(_who_may_load)]
_models = APIRouter(route_class=OwnRoute)


@_models.post("/models")
async def load_model(request: Request, services: LiveServices, caller: _Loader) -> Response:
    """Load a model from its folder: 409 where it is loaded, 507 where memory or disk does not suffice."""
    asked = await read_json(request, _Asked)
    name, fleet = asked.model_name, services.fleet
    async with _alone(services):
        if name in fleet.models:
            raise Conflict(f"model {name!r} is loaded already")
        try:
            await asyncio.to_thread(adopted.take, services.fleet.changes.store.root, name, asked.url)
            await fleet.changes.make(name, transitions.load, who=caller.name, what="load")
            if name not in fleet.models:
                raise ModelInvalid("; ".join(p.reason for p in fleet.problems if p.name == name) or "it is not loaded")
        except (ModelInvalid, NotReady, OSError) as error:
            reason = error.strerror or "" if isinstance(error, OSError) else error.message
            await asyncio.to_thread(adopted.drop, services.fleet.changes.store.root, name)
            if isinstance(error, OSError) or "memory" in reason:
                return json_answer({"error": f"model {name!r} can't be loaded: {reason.lower()}"}, 507)
            raise InvalidRequest(f"model {name!r} can't be loaded: {reason}") from None
    return json_answer(_said(services, name))


@_models.delete("/models/{model}")
async def unload_model(model: str, services: LiveServices, caller: _Loader) -> Response:
    """Stop serving a model after its last request."""
    async with _alone(services):
        _loaded(services, model)
        await services.fleet.changes.make(model, transitions.unload, who=caller.name, what="unload")
        await asyncio.to_thread(adopted.drop, services.fleet.changes.store.root, model)
    return json_answer({})


@_models.get("/models", dependencies=[Depends(requires("predict"))])
async def list_models(services: LiveServices) -> Response:
    """List the models that are loaded, all on one page."""
    return json_answer({"models": [_said(services, name) for name in sorted(services.fleet.models)]})


@_models.get("/models/{model}", dependencies=[Depends(requires("predict"))])
async def get_model(model: str, services: LiveServices) -> Response:
    """Describe a model that is loaded."""
    return json_answer(_said(services, _loaded(services, model)))


def _loaded(services: Services, name: str) -> str:
    """Return a model's name. Raises ModelNotFound: what was unloaded is not there either, to who loads by request."""
    if name not in services.fleet.models:
        raise ModelNotFound(f"no model {shown(name)!r} is loaded")
    return name


def _said(services: Services, name: str) -> dict[str, str]:
    return {"modelName": name, "modelUrl": adopted.taken_from(services.fleet.changes.store.root, name)}
