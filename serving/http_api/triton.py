"""Triton's extensions of the Open Inference Protocol beside predictions: repository, statistics, configuration.

Sources: extension_model_repository, extension_statistics and extension_model_configuration of Triton's documentation.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from serving.deploy import description
from serving.errors import InvalidRequest, ModelNotFound
from serving.http_api.metadata import json_answer
from serving.http_api.openapi import documents
from serving.http_api.own_route import OwnRoute
from serving.http_api.route import read_body
from serving.http_api.security import Deployer, requires
from serving.http_api.services import LiveFleet, LiveServices
from serving.protocols import strict_json
from serving.repository import transitions

router = APIRouter(route_class=OwnRoute, tags=["open inference protocol"], dependencies=[Depends(requires("predict"))])
changes_router = APIRouter(route_class=OwnRoute, tags=["open inference protocol"])

_MOST_BYTES = 64 * 1024
_SHARED_MEMORY = "shared memory that clients choose is not offered: send tensors in the request"
_TRACE = "tracing is not set by requests"
_NOT_OFFERED = {
    "/v2/systemsharedmemory/{rest:path}": _SHARED_MEMORY,
    "/v2/cudasharedmemory/{rest:path}": _SHARED_MEMORY,
    "/v2/logging": "logging is set when the server starts, not by requests: see `serving run --help`",
    "/v2/trace/setting": _TRACE,
    "/v2/models/{model}/trace/setting": _TRACE,
}


def _takes(properties: dict[str, Any]) -> dict[str, Any]:
    """Describe a body that may be left out, for the OpenAPI document."""
    return {"requestBody": {"content": {"application/json": {"schema": {"type": "object", "properties": properties}}}}}


@router.get("/v2/models/stats", summary="What every model did", response_model=documents.Statistics)
async def all_statistics(services: LiveServices) -> Response:
    """Count and time predictions of every version, over all workers, since the server started."""
    return json_answer({"model_stats": await description.statistics(services.fleet, services.metrics)})


@router.get("/v2/models/{model}/stats", summary="What a model did", response_model=documents.Statistics)
async def model_statistics(model: str, services: LiveServices) -> Response:
    """Count and time the predictions of each version of a model."""
    return json_answer({"model_stats": await description.statistics(services.fleet, services.metrics, model)})


@router.get(
    "/v2/models/{model}/versions/{version}/stats", summary="What a version did", response_model=documents.Statistics
)
async def version_statistics(model: str, version: str, services: LiveServices) -> Response:
    """Count and time the predictions of one version."""
    return json_answer({"model_stats": await description.statistics(services.fleet, services.metrics, model, version)})


@router.get("/v2/models/{model}/config", summary="How a model is run", response_model=documents.ModelConfig)
async def model_config(model: str, fleet: LiveFleet) -> Response:
    """Describe how a model is run, in the words of Triton's model configuration."""
    return json_answer(description.config(fleet, model))


@router.get(
    "/v2/models/{model}/versions/{version}/config", summary="How a version is run", response_model=documents.ModelConfig
)
async def version_config(model: str, version: str, fleet: LiveFleet) -> Response:
    """Describe how one version is run."""
    return json_answer(description.config(fleet, model, version))


@router.post(
    "/v2/repository/index",
    summary="Every version in the repository and its state",
    response_model=documents.RepositoryIndex,
    openapi_extra=_takes({"ready": {"type": "boolean", "default": False}}),
)
async def repository_index(request: Request, fleet: LiveFleet) -> Response:
    """List versions; `{"ready": true}` leaves out those that can't answer. The body may be empty."""
    document = await _document(request)
    ready = document.get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidRequest(f"/ready: is {strict_json.kind(ready)}: send true or false")
    return json_answer(description.index(fleet, ready=ready))


@changes_router.post(
    "/v2/repository/models/{model}/load",
    summary="Load a model, or load it anew",
    response_model=documents.Done,
    openapi_extra=_takes({"parameters": {"type": "object", "additionalProperties": False}}),
)
async def load_model(request: Request, model: str, fleet: LiveFleet, caller: Deployer) -> Response:
    """Load the versions of a model that the folder holds."""
    await _no_parameters(request, ())
    await fleet.changes.make(model, transitions.load, who=caller.name, what="load")
    return json_answer({})


@changes_router.post(
    "/v2/repository/models/{model}/unload",
    summary="Stop serving a model",
    response_model=documents.Done,
    openapi_extra=_takes(
        {
            "parameters": {
                "type": "object",
                "properties": {"unload_dependents": {"type": "boolean"}},
                "additionalProperties": False,
            }
        }
    ),
)
async def unload_model(request: Request, model: str, fleet: LiveFleet, caller: Deployer) -> Response:
    """Stop serving a model after its last request; its files stay."""
    await _no_parameters(request, ("unload_dependents",))
    await fleet.changes.make(model, transitions.unload, who=caller.name, what="unload")
    return json_answer({})


def _refuse(path: str, reason: str) -> None:
    @router.api_route(path, methods=["GET", "POST"], include_in_schema=False)
    async def refuse() -> Response:
        raise ModelNotFound(reason)


# Each has let requests write files or memory in other servers.
for _path, _reason in _NOT_OFFERED.items():
    _refuse(_path, _reason)


async def _no_parameters(request: Request, harmless: tuple[str, ...]) -> None:
    document = await _document(request)
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"/parameters: is {strict_json.kind(parameters)}: send an object")
    for name in parameters:
        if name not in harmless:
            raise InvalidRequest("/parameters: files and configurations are not taken from requests: leave them out")


async def _document(request: Request) -> dict[str, Any]:
    body = bytes(await read_body(request.scope["headers"], request.receive, _MOST_BYTES))
    document = strict_json.loads(body) if body.strip() else {}
    if not isinstance(document, dict):
        raise InvalidRequest(f"the body is {strict_json.kind(document)}: send an object or nothing")
    return document
