"""What can be asked about the server and its models: lists, metadata, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse

from serving.deploy import description
from serving.errors import ModelNotFound, NotReady
from serving.http_api import asked_model
from serving.http_api.asked_model import AskedModel, AskedNames
from serving.http_api.compression import compressed
from serving.http_api.openapi import documents, readable
from serving.http_api.own_route import OwnRoute
from serving.http_api.security import may, requires
from serving.http_api.services import LiveFleet, LiveServices
from serving.monitoring.report import Drift
from serving.protocols.headers import header, weights
from serving.protocols.strict_json import dumps

INFERENCE_TAG = "open inference protocol"

router = APIRouter(route_class=OwnRoute)
_model, _version, _label = asked_model.routers("/v1/models", "models")
_tensor_model, _tensor_version, _ = asked_model.routers("/v2/models", INFERENCE_TAG)
_health = APIRouter(route_class=OwnRoute, prefix="/v2/health", tags=[INFERENCE_TAG])
_READERS = [Depends(requires("predict"))]


def json_answer(value: Any, status: int = 200) -> Response:
    """Answer with JSON as every answer here is written."""
    return Response(dumps(value), status, media_type="application/json")


@router.get(
    "/v1/models",
    tags=["models"],
    summary="Every model and version, and what is not served and why",
    dependencies=_READERS,
)
async def list_models(fleet: LiveFleet) -> documents.ModelList:
    """List the models by name, as KServe V1 does, with versions, labels and the problems of the folder."""
    served = [
        documents.ServedModel(
            name=served.name,
            default_version=served.default.version,
            versions=list(served.versions),
            labels={label: model.version for label, model in served.labels.items()},
        )
        for served in fleet.models.values()
    ]
    return documents.ModelList(models=sorted(fleet.models), details=served, problems=list(fleet.problems))


@_model.get("", summary="One model: versions, state, features", response_model=documents.ModelDescription)
@_version.get("", name="describe_version", summary="One version of a model", response_model=documents.ModelDescription)
@_label.get(
    "", name="describe_label", summary="The version that has a label", response_model=documents.ModelDescription
)
async def describe_model(request: Request, model: AskedModel, fleet: LiveFleet) -> Response:
    """Answer as KServe V1 (`name`, `ready`) and TF Serving (`model_version_status`) do, and with the signature."""
    only = request.path_params.keys() & {"version", "label"}
    versions = [model.version] if only else fleet.models[model.name].versions
    signature = model.signature
    kept = {
        "task",
        "description",
        "inputs",
        "outputs",
        "layout",
        "batch",
        "label",
        "scores",
        "classes",
        "metrics",
        "parity",
    }
    return json_answer(
        {
            "name": model.name,
            "ready": True,
            "version": model.version,
            "sha256": model.sha256,
            "model_version_status": [
                {"version": version, "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
                for version in versions
            ],
            **signature.model_dump(include=kept),
            "features": [readable.described(feature) for feature in signature.features],
            "example": readable.example(signature),
        }
    )


@_model.get("/metadata", summary="A model's signature, as TensorFlow Serving says it")
@_version.get("/metadata", name="version_signature", summary="A version's signature")
@_label.get("/metadata", name="label_signature", summary="The signature of the version that has a label")
async def model_signature(model: AskedModel) -> documents.TensorFlowMetadata:
    """Describe what `:predict` takes and gives, in the words of TensorFlow Serving."""
    return documents.TensorFlowMetadata(**description.signature_def(model))


@_model.get("/drift", summary="Whether the rows that a model gets are as those it was made for")
@_version.get(
    "/drift", name="version_drift", summary="Whether the rows that a version gets are as those it was made for"
)
async def model_drift(model: AskedModel, services: LiveServices) -> Drift:
    """Compare the last window of rows with the reference: histograms, PSI, Jensen-Shannon distance, p-value."""
    return await asyncio.to_thread(services.monitoring.drift.report, model.name, model.version, model.limits.drift)


@router.get(
    "/v2",
    tags=[INFERENCE_TAG],
    summary="The server's name, version and extensions",
    dependencies=_READERS,
)
async def server_metadata() -> documents.ServerMetadata:
    """Describe the server (Open Inference Protocol)."""
    return documents.ServerMetadata(**description.server())


@_health.head("/live", include_in_schema=False)
@_health.get("/live", summary="The process answers")
async def live() -> documents.Live:
    """Answer 200 as long as the event loop turns."""
    return documents.Live(live=True)


@_health.head("/ready", include_in_schema=False)
@_health.get(
    "/ready",
    summary="This worker should get requests",
    response_model_exclude_unset=True,
    responses={503: {"model": documents.Ready, "description": "It should not"}},
)
async def ready(request: Request, response: Response, fleet: LiveFleet) -> documents.Ready:
    """Answer 200 once models are loaded and until draining.

    Who may predict also learns what could not be loaded, and the generation of each model's traffic state: the one that
    this worker serves, the one that the folder asks for, and the lag between them; and `lag_s`, for how many seconds
    this worker has not acknowledged what its parent told it: 0 but for a worker that hangs; `coordinator_silent_s`, for
    how many seconds it has heard nothing of its parent: 0 but for a parent that hangs; and `folder_gone`, why the
    models folder can't be followed now, which is empty where it can.
    """
    told: dict[str, Any] = {}
    if may(request, "predict"):
        told["not_served"] = [f"{p.name} {p.version}".strip() for p in fleet.problems if p.name]
        told["folder_gone"] = fleet.folder_gone
        told["generations"] = fleet.generations()
        told["lag_s"] = fleet.lag
        told["coordinator_silent_s"] = fleet.coordinator_silent_s
    response.status_code = 200 if fleet.ready else 503
    return documents.Ready(ready=fleet.ready, **told)


@_tensor_model.get("", summary="A model's tensors")
@_tensor_version.get("", name="version_metadata", summary="A version's tensors")
async def model_metadata(asked: AskedNames, fleet: LiveFleet) -> documents.ModelMetadata:
    """Describe inputs and outputs (Open Inference Protocol)."""
    return documents.ModelMetadata(**description.metadata(fleet, *asked))


@_tensor_model.get("/ready", summary="A model can answer")
@_tensor_version.get("/ready", name="version_ready", summary="A version can answer")
async def model_ready(model: AskedModel, fleet: LiveFleet) -> documents.ModelReady:
    """Answer 200 where the model can predict, 503 with the reason where it can't, 404 where there is none."""
    if fleet.draining:
        raise NotReady("the server is draining")
    return documents.ModelReady(name=model.name, version=model.version, ready=True)


@router.get(
    "/metrics",
    tags=["operations"],
    summary="Prometheus metrics, summed over all workers",
    response_class=PlainTextResponse,
    dependencies=[Depends(requires("metrics"))],
)
async def metrics(request: Request, services: LiveServices) -> Response:
    """Expose the metrics in Prometheus's text format, or in OpenMetrics with exemplars where Accept names it first."""
    registry = services.metrics
    if registry is None:
        raise ModelNotFound("nothing is counted here: the server runs with --no-metrics")
    liked = weights(header(request.scope["headers"], b"accept"))
    wanted = liked.get(b"application/openmetrics-text", 0.0)
    openmetrics = wanted > 0 and wanted >= liked.get(b"text/plain", 0.0)
    # On a thread: with hundreds of models it takes as long as hundreds of predictions.
    return await compressed(request, *await asyncio.to_thread(registry.render, openmetrics=openmetrics))


for _part in (_health, _model, _version, _label, _tensor_model, _tensor_version):
    router.include_router(_part)
