"""`/docs`, `/redoc` and `/openapi.json`: each loaded model with its own features, and no asset from the internet."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from serving.access.access import Access
from serving.deploy.fleet import Fleet, Served
from serving.engine.model import Model
from serving.engine.rows import Rows
from serving.engine.signature import Signature
from serving.http_api.compression import compressed
from serving.http_api.public_url import Prefix
from serving.http_api.readable import example, readable
from serving.http_api.security import BEARER, may
from serving.protocols.strict_json import dumps
from serving.tensors import HALVES

log = logging.getLogger("serving.docs")

# What every model's operations share is written once: with hundreds of models it would be most of the document.
_FAILURES = {
    "400": "Malformed",
    "401": "Needs a key",
    "403": "The key lacks the scope",
    "404": "No such model, version or label",
    "413": "Body over the limit",
    "415": "Unknown Content-Encoding",
    "422": "Rows break the signature; every bad cell is listed",
    "429": "Queue full; see Retry-After",
    "503": "Known, and not ready",
    "504": "Deadline passed",
}
_INFER_RESPONSE = {
    "type": "object",
    "required": ["model_name", "outputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "outputs": {"type": "array", "items": {"type": "object"}},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "string"},
        "details": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "path": {"type": "string", "description": "JSON pointer to the bad place"},
                    "message": {"type": "string"},
                },
            },
        },
    },
}

# Redoc would fetch a logo from its maker.
_OFFLINE = {"content-security-policy": "default-src 'self' 'unsafe-inline' data: blob:"}

# Made here and not by FastAPI, for the key: the document names the models only to who may predict, so that the page
# fetches it again once it has been given one.
_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>serving</title>
<link rel="stylesheet" href="docs/assets/swagger-ui.css">
<link rel="icon" href="docs/assets/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/assets/swagger-ui-bundle.js"></script>
<script>
let key = null;
const anew = (change) => (original, system) => (given) => {
  const done = original(given);
  key = change(given);
  system.specActions.download();
  return done;
};
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  deepLinking: true,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: -1,
  requestInterceptor: (request) => {
    if (request.loadSpec && key) request.headers.Authorization = "Bearer " + key;
    return request;
  },
  plugins: [{statePlugins: {auth: {wrapActions: {
    authorize: anew((given) => given.bearer ? given.bearer.value : null),
    logout: anew(() => null),
  }}}}],
});
</script>
</body>
</html>
"""

# To be read; it asks without a key, and shows what anyone may know of.
_READING_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>serving</title>
<link rel="icon" href="docs/assets/favicon.png">
<style>body { margin: 0; }</style>
</head>
<body>
<div id="redoc"></div>
<script src="docs/assets/redoc.standalone.js"></script>
<script>Redoc.init("openapi.json", {disableSearch: false, hideLogo: true}, document.getElementById("redoc"));</script>
</body>
</html>
"""


def add(app: FastAPI, prefix: Prefix) -> None:
    """Add the documentation routes and their assets to the application; all they name is relative but the server."""
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]), name="docs-assets")

    access: Access = app.state.access
    made: dict[bool, tuple[object, bytes]] = {}

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        whole = may(request, "predict")
        # Swaps by number: holding the models themselves would keep those alive that have gone.
        state = (app.state.fleet.swaps, access.closed)
        if whole not in made or made[whole][0] != state:
            # On a thread: it takes as long as hundreds of predictions.
            made[whole] = state, await asyncio.to_thread(lambda: dumps(document(app, models=whole)))
        body = made[whole][1]
        if path := prefix.of(request):
            body = b'{"servers":[{"url":"%b"}],' % path.encode() + body[1:]
        return await compressed(request, body, "application/json")

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return Response(_PAGE, headers=_OFFLINE, media_type="text/html; charset=utf-8")

    @app.get("/redoc", include_in_schema=False)
    async def reading_page() -> Response:
        return Response(_READING_PAGE, headers=_OFFLINE, media_type="text/html; charset=utf-8")


def document(app: FastAPI, *, models: bool = True) -> dict[str, Any]:
    """Make the OpenAPI document of the routes and, for who may know of them, of every live model."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = made.setdefault("components", {})
    components.setdefault("schemas", {}).update(Error=_ERROR, InferResponse=_INFER_RESPONSE)
    components["responses"] = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _FAILURES.items()
    }
    fleet: Fleet = app.state.fleet
    paths: dict[str, Any] = {}
    for served in fleet.models.values() if models else ():
        try:
            found = {path: {"post": operation} for path, operation in operations(served)}
            dumps(found)
        except Exception:  # others' documentation does not go with it
            log.exception("the documentation of model %s can't be made", served.name)
        else:
            paths |= found
    made["paths"] = {**paths, **made["paths"]}
    closed = app.state.access.closed
    for methods in made["paths"].values():
        for operation in methods.values():
            asked = operation.get("security", [])
            if asked and closed.isdisjoint(scope for one in asked for scopes in one.values() for scope in scopes):
                operation["security"] = [{}, *asked]  # a key is taken and not needed
    return made


def operations(served: Served) -> list[tuple[str, dict[str, Any]]]:
    """Describe each prediction path of a model, with an example where one was answered."""
    name, default = served.name, served.default
    made = [
        (f"/v1/models/{name}:predict", _v1(default, f"Predict with {name}")),
        (f"/v2/models/{name}/infer", _v2(default, f"Infer with {name} (tensors)")),
    ]
    for version, model in served.versions.items():
        if len(served.versions) > 1:
            path = f"/v1/models/{name}/versions/{version}:predict"
            made.append((path, _v1(model, f"Predict with version {version}")))
            path = f"/v2/models/{name}/versions/{version}/infer"
            made.append((path, _v2(model, f"Infer with version {version} (tensors)")))
    return made


def _operation(model: Model, summary: str, request: Any, example: Any, answer: Any) -> dict[str, Any]:
    def content(schema: Any, **more: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schema, **{k: v for k, v in more.items() if v is not None}}}

    return {
        "tags": [model.name],
        "summary": summary,
        "description": model.signature.description,
        "security": [{BEARER.scheme_name: ["predict"]}],
        "requestBody": {"required": True, "content": content(request, example=example)},
        "responses": {
            "200": {"description": "The answer, in row order", "content": content(answer)},
            **{status: {"$ref": f"#/components/responses/{status}"} for status in _FAILURES},
        },
    }


def _v1(model: Model, summary: str) -> dict[str, Any]:
    rows = Rows(model.signature, model.name)
    named = _schema(rows.named)
    forms = [named, {"type": "array", "description": "values in feature order", "items": {}}]
    if rows.single is not None:
        forms[1] = _schema(rows.single)
    request = {
        "type": "object",
        "properties": {
            "instances": {"type": "array", "minItems": 1, "items": {"anyOf": forms}},
            "inputs": {
                "description": "columns by feature name, instead of instances",
                **_schema(rows.columns),
            },
        },
        "additionalProperties": False,
    }
    answer = {
        "type": "object",
        "required": ["predictions"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "predictions": {"type": "array", "items": _prediction(model)},
        },
    }
    row = example_row(model)
    return _operation(model, summary, request, None if row is None else {"instances": [row]}, answer)


def _prediction(model: Model) -> dict[str, Any]:
    signature = model.signature
    if signature.classes:
        number = {"type": ["number", "null"]}
        return {
            "type": "object",
            "properties": {
                "label": {"type": "boolean"} if _answers_booleans(signature) else {"enum": list(signature.classes)},
                "scores" if signature.scores == "scores" else "probabilities": {
                    "type": "object",
                    "properties": {str(c): number for c in signature.classes},
                },
            },
        }
    return {"description": f"outputs: {', '.join(o.name for o in signature.outputs)}"}


def _answers_booleans(signature: Signature) -> bool:
    return any(spec.name == signature.label and spec.datatype == "BOOL" for spec in signature.outputs)


def _v2(model: Model, summary: str) -> dict[str, Any]:
    signature = model.signature
    answered = model.session.example
    asked = None
    if answered is not None and HALVES.isdisjoint(spec.datatype for spec in signature.inputs):
        tensors = [
            {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": list(array.shape),
                "data": readable(array.ravel().tolist(), spec.datatype),
            }
            for spec, array in zip(signature.inputs, answered, strict=True)
        ]
        asked = {"inputs": tensors}
    tensor = {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": {"enum": [spec.name for spec in signature.inputs]},
            "datatype": {"enum": sorted({spec.datatype for spec in signature.inputs})},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "data": {"type": "array", "items": {}},
        },
    }
    request = {
        "type": "object",
        "required": ["inputs"],
        "properties": {"id": {"type": "string"}, "inputs": {"type": "array", "items": tensor}},
    }
    answer = {"$ref": "#/components/schemas/InferResponse"}
    return _operation(model, summary, request, asked, answer)


def example_row(model: Model) -> dict[str, Any] | None:
    """Return a row that the model has answered: the signature's own, or one that was made up; None without any."""
    signature = model.signature
    if signature.example is not None:
        return example(signature)
    sample = model.session.example
    if sample is None:
        return None
    if signature.layout == "matrix":
        cells = sample[0][0].tolist()
    else:
        cells = [
            array.ravel().tolist()[0]
            if not feature.shape
            else (array if signature.batch == "none" else array[0]).tolist()
            for feature, array in zip(signature.features, sample, strict=True)
        ]
    return {f.name: readable(cell, f.datatype) for f, cell in zip(signature.features, cells, strict=True)}


def _schema(kind: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")
