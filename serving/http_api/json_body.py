"""JSON that a route is sent, which the route reads itself: read, checked by a model, and described by it.

As a parameter of the route FastAPI would read it, whatever its size, before it asks who sends it, and only where it is
called JSON, which curl does not do.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from serving.errors import DETAILS_SHOWN, Detail, InvalidRequest, ServingError
from serving.http_api.route import read_body
from serving.protocols.strict_json import pointer
from serving.repository.traffic import sentence

M = TypeVar("M", bound=BaseModel)

MOST_BYTES = 64 * 1024


async def read_json(
    request: Request, kind: type[M], *, most: int = MOST_BYTES, wrong: type[ServingError] = InvalidRequest
) -> M:
    """Read a body of `most` bytes at the most; nothing is an object without members.

    Raises InvalidRequest where it is not JSON, `wrong` where it is not of this kind, PayloadTooLarge,
    UnsupportedMediaType.
    """
    body = bytes(await read_body(request.scope["headers"], request.receive, most))
    try:
        return await asyncio.to_thread(kind.model_validate_json, body if body.strip() else b"{}")
    except ValidationError as error:
        raise refusal(error, wrong) from None


def refusal(error: ValidationError, wrong: type[ServingError] = InvalidRequest) -> ServingError:
    """Say of each field what is wrong with it."""
    found = error.errors(include_url=False)
    if found[0]["type"] == "json_invalid":
        return InvalidRequest(f"the body {sentence(found[0])}")
    details = [Detail(pointer(*one["loc"]), sentence(one)) for one in found]
    said = "; ".join(dict.fromkeys(detail.message for detail in details))
    return wrong(said[:1000], details[:DETAILS_SHOWN])


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """Describe a body of this kind for the OpenAPI document, as `openapi_extra` of its route.

    Its schema is written whole, without definitions, for which there is no place inside of an operation.
    """
    whole = kind.model_json_schema()
    definitions = whole.pop("$defs", {})

    def inlined(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                others = {key: value for key, value in part.items() if key != "$ref"}
                return inlined({**definitions[part["$ref"].rsplit("/", 1)[1]], **others})
            return {key: inlined(value) for key, value in part.items()}
        return [inlined(value) for value in part] if isinstance(part, list) else part

    return {"requestBody": {"content": {"application/json": {"schema": inlined(whole)}}}}
