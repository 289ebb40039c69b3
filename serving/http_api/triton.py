"""Triton's extensions of the Open Inference Protocol beside predictions: repository, statistics, configuration.

Sources: extension_model_repository, extension_statistics and extension_model_configuration of Triton's documentation.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, StrictBool, field_validator

from serving.deploy import description
from serving.errors import ModelNotFound
from serving.http_api import asked_model
from serving.http_api.asked_model import AskedNames
from serving.http_api.json_body import read_json, takes
from serving.http_api.metadata import INFERENCE_TAG
from serving.http_api.openapi import documents
from serving.http_api.own_route import OwnRoute
from serving.http_api.security import Deployer, requires
from serving.http_api.services import LiveFleet, LiveServices
from serving.repository import transitions

router = APIRouter(route_class=OwnRoute)
_repository = APIRouter(route_class=OwnRoute, prefix="/v2/repository", tags=[INFERENCE_TAG])
_READERS = [Depends(requires("predict"))]
_model, _version, _ = asked_model.routers("/v2/models", INFERENCE_TAG)

_SHARED_MEMORY = "shared memory that clients choose is not offered: send tensors in the request"
_TRACE = "tracing is not set by requests"
_NOT_OFFERED = {
    "/v2/systemsharedmemory/{rest:path}": _SHARED_MEMORY,
    "/v2/cudasharedmemory/{rest:path}": _SHARED_MEMORY,
    "/v2/logging": "logging is set when the server starts, not by requests: see `serving run --help`",
    "/v2/trace/setting": _TRACE,
    "/v2/models/{model}/trace/setting": _TRACE,
}


class IndexRequest(BaseModel):
    """Which versions are wanted."""

    ready: StrictBool = False


class ChangeRequest(BaseModel):
    """How to load or to unload: there is no choice."""

    parameters: dict[str, Any] = {}

    @field_validator("parameters")
    @classmethod
    def _harmless(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.keys() - {"unload_dependents"}:
            raise ValueError("files and configurations are not taken from requests: leave them out")
        return given


@router.get("/v2/models/stats", tags=[INFERENCE_TAG], summary="What every model did", dependencies=_READERS)
async def all_statistics(services: LiveServices) -> documents.Statistics:
    """Count and time predictions of every version, over all workers, since the server started."""
    return documents.Statistics(model_stats=await description.statistics(services.fleet, services.metrics))


@_model.get("/stats", summary="What a model did")
@_version.get("/stats", name="version_statistics", summary="What a version did")
async def model_statistics(asked: AskedNames, services: LiveServices) -> documents.Statistics:
    """Count and time the predictions of each version of a model, or of the one that is named."""
    return documents.Statistics(model_stats=await description.statistics(services.fleet, services.metrics, *asked))


@_model.get("/config", summary="How a model is run", response_model_exclude_unset=True)
@_version.get("/config", name="version_config", summary="How a version is run", response_model_exclude_unset=True)
async def model_config(asked: AskedNames, fleet: LiveFleet) -> documents.ModelConfig:
    """Describe how a model is run, in the words of Triton's model configuration."""
    return documents.ModelConfig(**description.config(fleet, *asked))


@_repository.post(
    "/index",
    summary="Every version in the repository and its state",
    dependencies=_READERS,
    openapi_extra=takes(IndexRequest),
)
async def repository_index(request: Request, fleet: LiveFleet) -> documents.RepositoryIndex:
    """List versions; `{"ready": true}` leaves out those that can't answer. The body may be empty."""
    asked = await read_json(request, IndexRequest)
    return documents.RepositoryIndex(description.index(fleet, ready=asked.ready))


@_repository.post("/models/{model}/load", summary="Load a model, or load it anew", openapi_extra=takes(ChangeRequest))
async def load_model(request: Request, model: str, fleet: LiveFleet, caller: Deployer) -> documents.Done:
    """Load the versions of a model that the folder holds."""
    await read_json(request, ChangeRequest)
    await fleet.changes.make(model, transitions.load, who=caller.name, what="load")
    return documents.Done()


@_repository.post("/models/{model}/unload", summary="Stop serving a model", openapi_extra=takes(ChangeRequest))
async def unload_model(request: Request, model: str, fleet: LiveFleet, caller: Deployer) -> documents.Done:
    """Stop serving a model after its last request; its files stay."""
    await read_json(request, ChangeRequest)
    await fleet.changes.make(model, transitions.unload, who=caller.name, what="unload")
    return documents.Done()


async def _refuse(request: Request) -> None:
    raise ModelNotFound(_NOT_OFFERED[request.scope["route"].path])


# Each has let requests write files or memory in other servers.
for _path in _NOT_OFFERED:
    router.add_api_route(_path, _refuse, methods=["GET", "POST"], include_in_schema=False, dependencies=_READERS)
for _part in (_repository, _model, _version):
    router.include_router(_part)
