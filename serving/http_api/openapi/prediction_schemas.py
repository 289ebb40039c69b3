"""The prediction operations of one version of a model, as OpenAPI describes them: made of its signature."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from serving.engine.model import Model
from serving.engine.rows import Rows
from serving.engine.signature import Signature, TensorSpec
from serving.errors import ServingError
from serving.http_api.openapi import streams
from serving.http_api.openapi.readable import example, readable
from serving.http_api.security import BEARER
from serving.tensors import FLOATS, HALVES, INTEGERS

SCHEMAS = "#/components/schemas/{model}"
"""Where a schema stands in the document."""
_EXPLAIN = "say too what each feature contributes, for a few rows"
_EXPLANATIONS = "where it was asked to explain: of each row, what adds up to its number, or to its class's score"


def schemas(model: Model) -> dict[str, Any]:
    """Make the schemas of one version, by their names among the document's components."""
    made = {"rows": _rows(model), **_answers(model.signature), "tensors": _tensors(model)}
    return {_name(model, what): schema for what, schema in made.items()}


def predict_operation(model: Model, summary: str, identity: str) -> dict[str, Any]:
    """Describe `:predict`: rows or columns by feature name, and streams of rows."""
    row = example_row(model)
    given = None if row is None else {"instances": [row]}
    content = _json({"anyOf": [_reference(model, "predictions"), _reference(model, "columns")]}) | streams.answers()
    made = _operation(model, summary, identity, "rows", given, content)
    made["requestBody"]["content"] |= streams.rows(row)
    return made


def _rows(model: Model) -> dict[str, Any]:
    rows = Rows(model.signature, model.name)
    by_position = _array({}) | {"description": "values in feature order"}
    forms = [_schema(rows.named), by_position if rows.single is None else _schema(rows.single)]
    return {
        "type": "object",
        "properties": {
            "instances": _array({"anyOf": forms}) | {"minItems": 1},
            "inputs": {
                "description": "columns by feature name, instead of instances",
                **_schema(rows.columns),
            },
            **({"explain": {"type": "boolean", "description": _EXPLAIN}} if model.signature.background else {}),
        },
        "additionalProperties": False,
    }


def _answers(signature: Signature) -> dict[str, Any]:
    """Describe the answers to rows, and to columns."""
    who = {"model_name": {"type": "string"}, "model_version": {"type": "string"}}
    row, columns = _predictions(signature)
    made = {
        "predictions": _object({**who, "predictions": _array(row)}),
        "columns": _object({**who, "outputs": columns}),
    }
    if signature.background:
        number = {"type": ["number", "null"]}
        contributions = _object({feature.name: number for feature in signature.features})
        told = _object({"base": number, "contributions": contributions})
        for answer in made.values():
            answer["properties"]["explanations"] = _array(told) | {"description": _EXPLANATIONS}
    return made


def _predictions(signature: Signature) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe what is answered for one row, and for columns."""
    if signature.answers_by_class:
        classes = signature.classes or ()
        booleans = any(spec.name == signature.label and spec.datatype == "BOOL" for spec in signature.outputs)
        label = {"type": "boolean"} if booleans else {"enum": list(classes)}
        number = {"type": ["number", "null"]}
        made = [
            _object({"label": one(label), signature.scores_key: _object({str(c): one(number) for c in classes})})
            for one in (lambda cell: cell, _array)
        ]
        return made[0], made[1]
    cells = {spec.name: _cell(spec, signature) for spec in signature.outputs}
    many = {name: _array(cell) for name, cell in cells.items()}
    if len(cells) == 1:
        return next(iter(cells.values())), next(iter(many.values()))
    return _object(cells), _object(many)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _cell(spec: TensorSpec, signature: Signature) -> dict[str, Any]:
    """Describe what one output says of one row. A dimension of 1 behind the rows is not written."""
    if not spec.shape:
        return {}  # its graph does not say how many dimensions it has, if any
    kind = "boolean" if spec.datatype == "BOOL" else "integer" if spec.datatype in INTEGERS else "string"
    made: dict[str, Any] = {"type": ["number", "null"] if spec.datatype in FLOATS else kind}
    dims = spec.shape if signature.batch == "none" else spec.shape[1:]
    if dims == (1,) and signature.batch != "none":
        return made
    scalar = made
    for _ in dims:
        made = _array(made)
    return {"anyOf": [scalar, made]} if dims == (-1,) else made


def infer_operation(model: Model, summary: str, identity: str) -> dict[str, Any]:
    """Describe `/infer`: tensors by input name."""
    signature = model.signature
    answered = model.example
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
    content = _json({"$ref": "#/components/schemas/InferResponse"})
    content["application/octet-stream"] = {
        "schema": {"type": "string", "format": "binary", "description": "where binary outputs were asked for"}
    }
    return _operation(model, summary, identity, "tensors", asked, content)


def _tensors(model: Model) -> dict[str, Any]:
    signature = model.signature
    tensor = _object(
        {
            "name": {"enum": [spec.name for spec in signature.inputs]},
            "datatype": {"enum": sorted({spec.datatype for spec in signature.inputs})},
            "shape": _array({"type": "integer", "minimum": 0}),
            "data": _array({}),
        }
    )
    outputs = _array(_object({"name": {"enum": [spec.name for spec in signature.outputs]}}))
    asked = _object({"inputs": _array(tensor)})
    asked["properties"] |= {"id": {"type": "string"}, "outputs": outputs | {"description": "all where it is left out"}}
    return asked


def example_row(model: Model) -> dict[str, Any] | None:
    """Return a row that the model has answered: the signature's own, or one that was made up; None without any."""
    signature = model.signature
    if signature.example is not None:
        return example(signature)
    sample = model.example
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
    row = {f.name: readable(cell, f.datatype) for f, cell in zip(signature.features, cells, strict=True)}
    try:
        Rows(signature, model.name).arrays([list(row.values())])
    except ServingError:  # lists do not show every shape that tensors may have
        return None
    return row


def _operation(  # noqa: PLR0917
    model: Model, summary: str, identity: str, takes: str, example: Any, content: dict[str, Any]
) -> dict[str, Any]:
    return {
        "tags": [model.name],
        "summary": summary,
        "description": model.signature.description,
        "operationId": identity,
        "security": [{BEARER.scheme_name: ["predict"]}],
        "parameters": [],
        "requestBody": {"required": True, "content": _json(_reference(model, takes), example=example)},
        "responses": {"200": {"description": "The answer, in row order", "content": content}},
    }


def _name(model: Model, what: str) -> str:
    return f"{model.name}_{model.version}_{what}"


def _reference(model: Model, what: str) -> dict[str, str]:
    return {"$ref": SCHEMAS.format(model=_name(model, what))}


def _json(schema: Any, **more: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema, **{k: v for k, v in more.items() if v is not None}}}


def _schema(kind: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(ref_template=SCHEMAS)
