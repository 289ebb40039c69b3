"""What can be asked about the server and its models: lists, metadata, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse

from serving.deploy import description
from serving.deploy.fleet import Fleet
from serving.engine.model import Model
from serving.errors import NotReady
from serving.http_api.compression import compressed
from serving.http_api.openapi import documents, readable
from serving.http_api.own_route import OwnRoute
from serving.http_api.security import may, requires
from serving.http_api.services import LiveFleet, LiveServices, Services
from serving.monitoring.report import Drift
from serving.protocols.headers import header, weights
from serving.protocols.strict_json import dumps

router = APIRouter(route_class=OwnRoute, dependencies=[Depends(requires("predict"))])
health_router = APIRouter(route_class=OwnRoute)
metrics_router = APIRouter(route_class=OwnRoute, dependencies=[Depends(requires("metrics"))])


def json_answer(value: Any, status: int = 200) -> Response:
    """Answer with JSON as every answer here is written."""
    return Response(dumps(value), status, media_type="application/json")


@router.get(
    "/v1/models",
    tags=["models"],
    summary="Every model and version, and what is not served and why",
    response_model=documents.ModelList,
)
async def list_models(fleet: LiveFleet) -> Response:
    """List the models by name, as KServe V1 does, with versions, labels and the problems of the folder."""
    return json_answer(
        {
            "models": sorted(fleet.models),
            "details": [
                {
                    "name": served.name,
                    "default_version": served.default.version,
                    "versions": list(served.versions),
                    "labels": {label: model.version for label, model in served.labels.items()},
                }
                for served in fleet.models.values()
            ],
            "problems": [{"name": p.name, "version": p.version, "reason": p.reason} for p in fleet.problems],
        }
    )


@router.get(
    "/v1/models/{model}",
    tags=["models"],
    summary="One model: versions, state, features",
    response_model=documents.ModelDescription,
)
async def describe_model(model: str, fleet: LiveFleet) -> Response:
    """Answer as KServe V1 (`name`, `ready`) and TF Serving (`model_version_status`) do, and with the signature."""
    live = fleet.get(model)
    versions = fleet.models[model].versions.values()
    return json_answer(_described(live, [_status(version) for version in versions]))


@router.get(
    "/v1/models/{model}/versions/{version}",
    tags=["models"],
    summary="One version of a model",
    response_model=documents.ModelDescription,
)
async def describe_version(model: str, version: str, fleet: LiveFleet) -> Response:
    """Answer for one version as for the model."""
    live = fleet.get(model, version)
    return json_answer(_described(live, [_status(live)]))


@router.get(
    "/v1/models/{model}/metadata",
    tags=["models"],
    summary="A model's signature, as TensorFlow Serving says it",
    response_model=documents.TensorFlowMetadata,
)
async def model_signature(model: str, fleet: LiveFleet) -> Response:
    """Describe what `:predict` takes and gives, in the words of TensorFlow Serving."""
    return json_answer(description.signature_def(fleet.get(model)))


@router.get(
    "/v1/models/{model}/versions/{version}/metadata",
    tags=["models"],
    summary="A version's signature",
    response_model=documents.TensorFlowMetadata,
)
async def version_signature(model: str, version: str, fleet: LiveFleet) -> Response:
    """Describe one version as the model."""
    return json_answer(description.signature_def(fleet.get(model, version)))


@router.get(
    "/v1/models/{model}/labels/{label}",
    tags=["models"],
    summary="The version that has a label",
    response_model=documents.ModelDescription,
)
async def describe_label(model: str, label: str, fleet: LiveFleet) -> Response:
    """Answer for the version that has a label as for the model."""
    live = fleet.get(model, label=label)
    return json_answer(_described(live, [_status(live)]))


@router.get(
    "/v1/models/{model}/labels/{label}/metadata",
    tags=["models"],
    summary="The signature of the version that has a label",
    response_model=documents.TensorFlowMetadata,
)
async def label_signature(model: str, label: str, fleet: LiveFleet) -> Response:
    """Describe the version that has a label as the model."""
    return json_answer(description.signature_def(fleet.get(model, label=label)))


@router.get(
    "/v1/models/{model}/drift",
    tags=["models"],
    summary="Whether the rows that a model gets are as those it was made for",
    response_model=Drift,
)
async def model_drift(model: str, services: LiveServices) -> Response:
    """Compare the last window of rows with the reference: histograms, PSI, Jensen-Shannon distance, p-value."""
    return await _drift(services, services.fleet.get(model))


@router.get(
    "/v1/models/{model}/versions/{version}/drift",
    tags=["models"],
    summary="Whether the rows that a version gets are as those it was made for",
    response_model=Drift,
)
async def version_drift(model: str, version: str, services: LiveServices) -> Response:
    """Answer for one version as for the model."""
    return await _drift(services, services.fleet.get(model, version))


async def _drift(services: Services, model: Model) -> Response:
    found = await asyncio.to_thread(services.monitoring.drift.report, model.name, model.version, model.limits.drift)
    return json_answer(found.model_dump())


def _status(model: Model) -> dict[str, Any]:
    return {
        "version": model.version,
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }


def _described(model: Model, statuses: list[dict[str, Any]]) -> dict[str, Any]:
    signature = model.signature
    return {
        "name": model.name,
        "ready": True,
        "version": model.version,
        "sha256": model.sha256,
        "model_version_status": statuses,
        "task": signature.task,
        "description": signature.description,
        "inputs": [spec.model_dump() for spec in signature.inputs],
        "outputs": [spec.model_dump() for spec in signature.outputs],
        "layout": signature.layout,
        "batch": signature.batch,
        "label": signature.label,
        "scores": signature.scores,
        "features": [readable.described(feature) for feature in signature.features],
        "classes": signature.classes,
        "metrics": signature.metrics,
        "parity": signature.parity.model_dump() if signature.parity else None,
        "example": readable.example(signature),
    }


@router.get(
    "/v2",
    tags=["open inference protocol"],
    summary="The server's name, version and extensions",
    response_model=documents.ServerMetadata,
)
async def server_metadata() -> Response:
    """Describe the server (Open Inference Protocol)."""
    return json_answer(description.server())


@health_router.head("/v2/health/live", include_in_schema=False)
@health_router.get(
    "/v2/health/live", tags=["open inference protocol"], summary="The process answers", response_model=documents.Live
)
async def live() -> Response:
    """Answer 200 as long as the event loop turns."""
    return json_answer({"live": True})


@health_router.head("/v2/health/ready", include_in_schema=False)
@health_router.get(
    "/v2/health/ready",
    tags=["open inference protocol"],
    summary="This worker should get requests",
    response_model=documents.Ready,
    responses={503: {"model": documents.Ready, "description": "It should not"}},
)
async def ready(request: Request, fleet: LiveFleet) -> Response:
    """Answer 200 once models are loaded and until draining.

    Who may predict also learns what could not be loaded, and the generation of each model's traffic state: the one that
    this worker serves, the one that the folder asks for, and the lag between them; and `lag_s`, for how many seconds
    this worker has not acknowledged what its parent told it: 0 but for a worker that hangs; `coordinator_silent_s`, for
    how many seconds it has heard nothing of its parent: 0 but for a parent that hangs; and `folder_gone`, why the
    models folder can't be followed now, which is empty where it can.
    """
    told: dict[str, Any] = {"ready": fleet.ready}
    if may(request, "predict"):
        told["not_served"] = [f"{p.name} {p.version}".strip() for p in fleet.problems if p.name]
        told["folder_gone"] = fleet.folder_gone
        told["generations"] = fleet.generations()
        told["lag_s"] = fleet.lag
        told["coordinator_silent_s"] = fleet.coordinator_silent_s
    return json_answer(told, 200 if fleet.ready else 503)


@router.get(
    "/v2/models/{model}",
    tags=["open inference protocol"],
    summary="A model's tensors",
    response_model=documents.ModelMetadata,
)
async def model_metadata(model: str, fleet: LiveFleet) -> Response:
    """Describe inputs and outputs (Open Inference Protocol)."""
    return json_answer(description.metadata(fleet, model))


@router.get(
    "/v2/models/{model}/versions/{version}",
    tags=["open inference protocol"],
    summary="A version's tensors",
    response_model=documents.ModelMetadata,
)
async def version_metadata(model: str, version: str, fleet: LiveFleet) -> Response:
    """Describe one version's inputs and outputs."""
    return json_answer(description.metadata(fleet, model, version))


@router.get(
    "/v2/models/{model}/ready",
    tags=["open inference protocol"],
    summary="A model can answer",
    response_model=documents.ModelReady,
)
async def model_ready(model: str, fleet: LiveFleet) -> Response:
    """Answer 200 where the model can predict, 503 with the reason where it can't, 404 where there is none."""
    return _ready(fleet, fleet.get(model))


@router.get(
    "/v2/models/{model}/versions/{version}/ready",
    tags=["open inference protocol"],
    summary="A version can answer",
    response_model=documents.ModelReady,
)
async def version_ready(model: str, version: str, fleet: LiveFleet) -> Response:
    """Answer for one version as for the model."""
    return _ready(fleet, fleet.get(model, version))


def _ready(fleet: Fleet, model: Model) -> Response:
    if fleet.draining:
        raise NotReady("the server is draining")
    return json_answer({"name": model.name, "version": model.version, "ready": True})


@metrics_router.get(
    "/metrics",
    tags=["operations"],
    summary="Prometheus metrics, summed over all workers",
    response_class=PlainTextResponse,
)
async def metrics(request: Request, services: LiveServices) -> Response:
    """Expose the metrics in Prometheus's text format, or in OpenMetrics with exemplars where Accept names it first."""
    registry = services.metrics
    if registry is None:
        raise HTTPException(404, "nothing is counted here")
    liked = weights(header(request.scope["headers"], b"accept"))
    wanted = liked.get(b"application/openmetrics-text", 0.0)
    openmetrics = wanted > 0 and wanted >= liked.get(b"text/plain", 0.0)
    # On a thread: with hundreds of models it takes as long as hundreds of predictions.
    return await compressed(request, *await asyncio.to_thread(registry.render, openmetrics=openmetrics))
