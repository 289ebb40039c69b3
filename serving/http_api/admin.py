"""Deploying over HTTP: a model's traffic, its history, and the orders that change it, under a generation check.

Sources: RFC 9110, sections 8.8.3 (ETag) and 13.1.1 (If-Match).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import Field

from serving.deploy.analysis import analysis_of
from serving.deploy.commands import ORDERS, Order
from serving.deploy.fleet import Fleet
from serving.deploy.rollout_figures import figures
from serving.errors import InvalidRequest, ModelNotFound, shown
from serving.gate import gate
from serving.gate.report import Report
from serving.gate.settings_check import with_settings
from serving.http_api.json_body import read_json, takes
from serving.http_api.metadata import json_answer
from serving.http_api.openapi.deploy_documents import ChangedMeanwhile, TrafficChanged, TrafficHistory, TrafficState
from serving.http_api.openapi.documents import Error
from serving.http_api.own_route import OwnRoute
from serving.http_api.parameters import NoParameters, Parameters
from serving.http_api.security import Deployer, requires
from serving.http_api.services import LiveFleet, LiveServices
from serving.metrics.metrics import Metrics
from serving.repository.state_directory import state_folder
from serving.repository.traffic import Traffic
from serving.repository.traffic_store import TrafficStore

_TAG = re.compile(r'\s*(?:W/)?"?(\d{1,18})"?\s*')


class _Asked(Parameters):
    """How much of a history is wanted."""

    limit: Annotated[int, Field(ge=1, le=10_000, description="The last so many changes.")] = 100


router = APIRouter(route_class=OwnRoute, prefix="/v1/repository/models/{model}", tags=["deploy"])
_READERS = [Depends(requires("predict"))]


@router.get(
    "", summary="Who gets a model's traffic, and how it goes", dependencies=_READERS, response_model=TrafficState
)
async def traffic_state(model: str, services: LiveServices) -> Response:
    """Answer with what is asked for, what this server serves, and figures of a trial. ETag: the generation."""
    store = services.fleet.changes.store
    traffic = await asyncio.to_thread(store.read, model)
    versions = await asyncio.to_thread(store.versions, model)
    return _answer(
        traffic, {"name": model, "versions": versions, **await _served(services.fleet, services.metrics, model)}
    )


@router.get("/history", summary="Who changed it, when, how and why", response_model=TrafficHistory)
async def traffic_history(model: str, fleet: LiveFleet, _: Deployer, asked: Annotated[_Asked, Query()]) -> Response:
    """Answer with the last changes and publications, oldest first: when, who, what, why, generation, before, after.

    Of publications the last three are null.
    """
    entries = await asyncio.to_thread(fleet.changes.store.events, model, asked.limit)
    return json_answer({"name": model, "history": entries})


@router.get(
    "/report/{version}",
    summary="What the gate found out about a version",
    dependencies=_READERS,
)
async def gate_report(model: str, version: str, fleet: LiveFleet) -> Report:
    """Answer with the report that is kept with a version."""
    return await asyncio.to_thread(_report, fleet.changes.store, model, version)


def _endpoint(kind: type[Order]) -> Callable[..., Awaitable[Response]]:
    async def change(
        request: Request,
        model: str,
        fleet: LiveFleet,
        caller: Deployer,
        _: NoParameters,
        if_match: str | None = Header(None, description='The generation that you have seen: the ETag, such as "7".'),
    ) -> Response:
        generation = _generation(if_match)
        order = await read_json(request, kind)
        fleet.changes.check()
        step = await asyncio.to_thread(order.step, fleet.changes.store, model)
        after, unknown = await fleet.changes.make(
            model,
            step.transition,
            who=caller.name,
            what=order.said,
            why=step.why,
            if_generation=generation,
            anyway=order.anyway,
        )
        told = {"name": model, "notes": step.notes, "unknown": unknown}
        answer = _answer(after, {key: value for key, value in told.items() if value})
        answer.status_code = 202 if unknown else 200
        return answer

    return change


def _generation(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    found = _TAG.fullmatch(if_match)
    if found is None:
        raise InvalidRequest('If-Match: should be a generation, such as "7": the ETag of the state')
    return int(found[1])


def _answer(traffic: Traffic, more: dict[str, Any]) -> Response:
    answer = json_answer({**more, "generation": traffic.generation, "traffic": traffic.document()})
    answer.headers["etag"] = f'"{traffic.generation}"'
    return answer


async def _served(fleet: Fleet, metrics: Metrics | None, name: str) -> dict[str, Any]:
    """Say what this server serves of a model, and what was seen of a trial."""
    standing = fleet.agent.standings.get(name)
    found: dict[str, Any] = {"serving": None, "problem": standing.error if standing is not None else ""}
    served = fleet.models.get(name)
    if served is None:
        return found
    found["serving"] = {
        "generation": served.traffic.generation,
        "stable": served.default.version,
        "canary": served.canary.candidate.version if served.canary is not None else None,
        "shadow": served.shadow.model.version if served.shadow is not None else None,
        "labels": {label: model.version for label, model in served.labels.items()},
        "loaded": list(served.versions),
    }
    beside = [v for v in (found["serving"]["canary"], found["serving"]["shadow"]) if v is not None]
    if metrics is not None and (beside or analysis_of(served.traffic) is not None):
        of = list(dict.fromkeys((served.default.version, *beside)))
        totals = await asyncio.to_thread(metrics.totals, [(name, version) for version in of])
        found["figures"] = {version: figures(totals[name, version]) for version in of}
    return found


def _report(store: TrafficStore, model: str, version: str) -> Report:
    if version not in store.versions(model):
        raise ModelNotFound(f"model {model!r} has no version '{shown(version)}' in the folder")
    report = None
    with contextlib.suppress(OSError):
        report = gate.report(state_folder(store.root, store.state_dir), store.root / model / version)
    if report is None:
        raise ModelNotFound("there is no report for this version")
    return with_settings(report, store.root / model)


for _order in ORDERS:
    _does = inspect.getdoc(_order) or ""
    router.add_api_route(
        f"/{_order.verb}",
        _endpoint(_order),
        methods=["POST"],
        name=_order.verb,
        summary=_does.rstrip("."),
        description=f"{_does} Answers when every worker of every server serves it. With `If-Match`, only if nobody "
        "has changed the model since that generation.",
        openapi_extra=takes(_order),
        response_model=TrafficChanged,
        responses={
            202: {
                "model": TrafficChanged,
                "description": "Some servers of the folder are silent: `unknown` names them, and the change stands",
            },
            412: {
                "model": ChangedMeanwhile,
                "description": "Somebody's change came first: `current` has the state",
            },
            503: {
                "model": Error,
                "description": "A worker could not serve it: nothing is changed, and the error says why",
            },
        },
    )
