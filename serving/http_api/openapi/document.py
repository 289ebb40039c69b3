"""The OpenAPI document: FastAPI's own of the routes, and of every live model its prediction paths.

It says what is really sent: what is refused is refused with `Error`, and which statuses a route has follows from what
it takes.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import iter_route_contexts
from pydantic.json_schema import models_json_schema

from serving.deploy.fleet import Served
from serving.http_api.openapi import prediction_schemas, streams
from serving.http_api.openapi.documents import Error, InferResponse
from serving.http_api.openapi.prediction_schemas import SCHEMAS, infer_operation, predict_operation
from serving.http_api.own_route import OwnRoute
from serving.http_api.services import Services
from serving.protocols.strict_json import dumps

log = logging.getLogger("serving.docs")

# What many operations share is written once: with hundreds of models it would be most of the document.
FAILURES = {
    "400": "Malformed",
    "401": "Needs a key",
    "403": "The key lacks the scope",
    "404": "No such model, version, label or job",
    "413": "Body over the limit",
    "415": "Unknown Content-Encoding; or rows in bulk of a type that is not read",
    "422": "Rows break the signature, and every bad cell is listed; or the model refuses them",
    "429": "Queue full; see Retry-After",
    "503": "Known, and not ready",
    "504": "Deadline passed",
}
_PARAMETERS = {
    "Timeout": {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds until the answer is worth nothing: 429 or 504 then",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
    "Priority": {
        "name": "X-Request-Priority",
        "in": "header",
        "description": "1: before others, 2: as others, 3: after them",
        "schema": {"type": "integer", "minimum": 1, "maximum": 3},
    },
    "RequestId": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "Comes back as it was sent",
        "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
    },
}


def document(app: FastAPI, services: Services, *, models: bool = True) -> dict[str, Any]:
    """Make the OpenAPI document of the routes and, for who may know of them, of every live model."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= models_json_schema([(InferResponse, "serialization")], ref_template=SCHEMAS)[1]["$defs"]
    schemas |= streams.schemas()
    components["responses"] = {status: _failure(status) for status in FAILURES}
    components["parameters"] = _PARAMETERS
    own = {c.path for c in iter_route_contexts(app.routes) if isinstance(c.original_route, OwnRoute)}
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            if path in own:
                _tell_failures(path, method, operation)
    paths: dict[str, Any] = {}
    for served in services.fleet.models.values() if models else ():
        try:
            found = {path: {"post": operation} for path, operation in operations(served).items()}
            of_versions = [prediction_schemas.schemas(model) for model in (served.default, *served.versions.values())]
            dumps([found, of_versions])
        except Exception:  # others' documentation does not go with it
            log.exception("the documentation of model %s can't be made", served.name)
        else:
            paths |= found
            for those in of_versions:
                schemas |= those
    made["paths"] = {**paths, **made["paths"]}
    closed = services.access.closed
    for methods in made["paths"].values():
        for operation in methods.values():
            asked = operation.get("security", [])
            if asked and closed.isdisjoint(scope for one in asked for scopes in one.values() for scope in scopes):
                operation["security"] = [{}, *asked]  # a key is taken and not needed
    return made


def operations(served: Served) -> dict[str, dict[str, Any]]:
    """Describe each prediction path of a model, with an example where one was answered."""
    name, default = served.name, served.default
    labelled = f"/v1/models/{name}/labels/{{label}}:predict"
    made = {
        f"/v1/models/{name}:predict": predict_operation(default, f"Predict with {name}", f"predict_{name}"),
        f"/v2/models/{name}/infer": infer_operation(default, f"Infer with {name} (tensors)", f"infer_{name}"),
        labelled: predict_operation(default, "Predict with the version of a label", f"label_predict_{name}"),
    }
    labels = {"name": "label", "in": "path", "required": True, "schema": {"enum": sorted(served.labels)}}
    made[labelled]["parameters"].append(labels)
    for version, model in served.versions.items() if len(served.versions) > 1 else ():
        made[f"/v1/models/{name}/versions/{version}:predict"] = predict_operation(
            model, f"Predict with version {version}", f"version_{version}_predict_{name}"
        )
        made[f"/v2/models/{name}/versions/{version}/infer"] = infer_operation(
            model, f"Infer with version {version} (tensors)", f"version_{version}_infer_{name}"
        )
    for path, operation in made.items():
        operation["parameters"] += [{"$ref": f"#/components/parameters/{key}"} for key in _PARAMETERS]
        statuses = [status for status in FAILURES if status != "422" or path.startswith("/v1")]
        operation["responses"] |= {status: _reference(status) for status in statuses}
    return made


def _failure(status: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "description": FAILURES[status],
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{Error.__name__}"}}},
    }
    if status == "429":
        made["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}}
    return made


def _reference(status: str) -> dict[str, str]:
    return {"$ref": f"#/components/responses/{status}"}


def _tell_failures(path: str, method: str, operation: dict[str, Any]) -> None:
    """Name the statuses of errors that a route has: by its key, its model and its body."""
    responses = operation["responses"]
    del responses["4XX"]
    statuses: list[str] = []
    if operation.get("security"):
        statuses += ["400", "401", "403"]
    if "{model}" in path:
        statuses += ["404"] if method != "put" else []
        statuses.append("503")
    if path.startswith("/v1/jobs"):
        statuses += ["404", "503"]
    if "requestBody" in operation:
        statuses += ["413", "415"]
    for status in statuses:
        responses.setdefault(status, _reference(status))
