"""Telling what turned out to be true, and asking how good a model is by that."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import ConfigDict, Field

from serving.documented import Documented
from serving.errors import InvalidRequest, SignatureMismatch
from serving.http_api.json_body import read_json, takes
from serving.http_api.openapi.documents import Error
from serving.http_api.own_route import OwnRoute
from serving.http_api.security import requires
from serving.http_api.services import LiveServices, Services
from serving.monitoring.feedback import LONGEST_KEY, LONGEST_LABEL, MOST_OUTCOMES, Quality
from serving.prediction.authorization import authorize

router = APIRouter(route_class=OwnRoute, dependencies=[Depends(requires("predict"))], tags=["models"])
_MOST_BYTES = 1024 * 1024
"""Of a body, with room for the most outcomes: whatever it has is read in one go, and nobody is served meanwhile."""


class _Strict(Documented):
    model_config = ConfigDict(extra="forbid", strict=True)


class RequestOutcomes(_Strict):
    """What turned out to be true for one request's rows."""

    id: Annotated[str, Field(min_length=1, max_length=LONGEST_KEY)]
    """The prediction's X-Request-Id, as sent or answered; over Open Inference the request's own `id`, if it had one."""
    outcomes: Annotated[
        list[Annotated[str, Field(max_length=LONGEST_LABEL)] | bool | int | float],
        Field(min_length=1, max_length=MOST_OUTCOMES),
    ]
    """Of its rows, in their order: the right label, by the name that predictions have, or the right number."""


class Outcomes(_Strict):
    """True outcomes of earlier predictions."""

    feedback: Annotated[list[RequestOutcomes], Field(min_length=1, max_length=MOST_OUTCOMES)]


class Accepted(Documented):
    """How much was taken; it is joined with its predictions within a few seconds."""

    accepted: int
    """Outcomes, one a row."""


def _permit(model: str, request: Request, services: Services) -> None:
    """Let in who may predict with this model. Raises ModelNotFound, NotReady, Unauthenticated or Forbidden."""
    callers = services.fleet.get(model).limits.callers
    if callers is not None:
        authorize(services.access, request.scope["headers"], "predict", callers)


@router.post(
    "/v1/models/{model}:feedback",
    summary="Tell what turned out to be true",
    responses={422: {"model": Error, "description": "An outcome is none that the model could give"}},
    openapi_extra=takes(Outcomes),
)
async def give_feedback(model: str, request: Request, services: LiveServices) -> Accepted:
    """Take true outcomes of earlier predictions, whichever worker or version made them.

    For models whose model.toml has [feedback].
    """
    _permit(model, request, services)
    told = await read_json(request, Outcomes, most=_MOST_BYTES, wrong=SignatureMismatch)
    rows = [(one.id, one.outcomes, f"/feedback/{i}/outcomes") for i, one in enumerate(told.feedback)]
    if sum(len(outcomes) for _, outcomes, _ in rows) > MOST_OUTCOMES:
        raise InvalidRequest(f"/feedback: has more than {MOST_OUTCOMES} outcomes: send them in parts")
    return Accepted(accepted=await asyncio.to_thread(services.monitoring.feedback.take, model, rows))


@router.get("/v1/models/{model}/feedback", summary="How good a model is, by what was true")
async def live_quality(model: str, request: Request, services: LiveServices) -> Quality:
    """Say of each loaded version how good its last predictions were, as far as their outcomes are known."""
    _permit(model, request, services)
    return await asyncio.to_thread(services.monitoring.feedback.report, model)
