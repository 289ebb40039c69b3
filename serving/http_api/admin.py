"""Deploying over HTTP: a model's traffic, its history, and the orders that change it, under a generation check.

Sources: RFC 9110, sections 8.8.3 (ETag) and 13.1.1 (If-Match).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastapi import APIRouter, Depends, Header, Query, Response

from serving.errors import InvalidRequest, ModelNotFound, ServingError
from serving.fleet.changes import Changes
from serving.fleet.fleet import Fleet
from serving.fleet.orders import ORDERS, Order
from serving.fleet.repository import VERSION
from serving.fleet.traffic import Traffic
from serving.fleet.trial import figures, trial_of
from serving.http_api.metadata import LiveFleet, json_answer
from serving.metrics import Metrics

PREFIX = "/v1/repository/models/{model}"
_TAG = re.compile(r'\s*(?:W/)?"?(\d{1,18})"?\s*')


class Named(Protocol):
    """Who sends a request, as far as the history is concerned."""

    @property
    def name(self) -> str:
        """A name for the history."""


def router(
    root: Path,
    changes: Changes,
    metrics: Metrics | None,
    *,
    deployer: Callable[..., Named | Awaitable[Named]],
    reader: Sequence[Any] = (),
) -> APIRouter:
    """Make the routes.

    deployer: the dependency that lets only those in who may deploy, and names them. reader: dependencies of what only
    reads.
    """
    made = APIRouter(prefix=PREFIX, tags=["deploy"])
    ledger = changes.ledger

    @made.get("", summary="Who gets a model's traffic, and how it goes", dependencies=list(reader))
    async def state(model: str, fleet: LiveFleet) -> Response:
        """Answer with what is asked for, what this server serves, and figures of a trial. ETag: the generation."""
        traffic = await asyncio.to_thread(ledger.read, model)
        versions = await asyncio.to_thread(ledger.versions, model)
        return _answer(traffic, {"name": model, "versions": versions, **_served(fleet, metrics, model)})

    @made.get("/history", summary="Who changed it, when, how and why", dependencies=list(reader))
    async def history(model: str, limit: int = Query(100, ge=1, le=10_000)) -> Response:
        """Answer with the last changes, oldest first: when, who, what, why, generation, before, after."""
        return json_answer({"name": model, "history": await asyncio.to_thread(ledger.history, model, limit)})

    @made.get("/report/{version}", summary="What the gate found out about a version", dependencies=list(reader))
    async def report(model: str, version: str) -> Response:
        """Answer with the report that is kept with a version."""
        if version not in await asyncio.to_thread(ledger.versions, model) or not VERSION.fullmatch(version):
            raise ModelNotFound(f"model {model!r} has no version {version[:16]!a} in the folder")
        return json_answer(await asyncio.to_thread(_report, root / model / version / "gate.json"))

    for order in ORDERS:
        made.add_api_route(
            f"/{order.verb}",
            _endpoint(order, changes, deployer),
            methods=["POST"],
            summary=(inspect.getdoc(order) or "").rstrip("."),
            responses={
                412: {"description": "Somebody's change came first: `current` has the state"},
                503: {"description": "A worker could not serve it: nothing is changed, and the error says why"},
            },
        )
    return made


def _endpoint(
    kind: type[Order], changes: Changes, deployer: Callable[..., Named | Awaitable[Named]]
) -> Callable[..., Awaitable[Response]]:
    async def change(model: str, order: Order, caller: Named, if_match: str | None) -> Response:
        step = await asyncio.to_thread(order.step, changes.ledger, model)
        after = await changes.make(
            model, step, who=caller.name, what=order.what, why=order.why, if_generation=_generation(if_match)
        )
        return _answer(after, {"name": model})

    # FastAPI reads a signature; that of a closure over `kind` can't be written down with it.
    change.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, annotation=str),
            inspect.Parameter("order", inspect.Parameter.KEYWORD_ONLY, annotation=kind),
            inspect.Parameter("caller", inspect.Parameter.KEYWORD_ONLY, default=Depends(deployer), annotation=Any),
            inspect.Parameter(
                "if_match",
                inspect.Parameter.KEYWORD_ONLY,
                default=Header(None, description='Generation that you have seen, such as "7": the ETag of the state'),
                annotation=str | None,
            ),
        ]
    )
    change.__name__ = kind.__name__
    change.__doc__ = (
        f"{inspect.getdoc(kind)} Answers when every worker serves it. With `If-Match`, only if nobody has changed the "
        f"model since that generation."
    )
    change.__annotations__ = {}
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


def _served(fleet: Fleet, metrics: Metrics | None, name: str) -> dict[str, Any]:
    """Say what this server serves of a model, and what was seen of a trial."""
    standing = fleet.member.standings.get(name)
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
    if metrics is not None and (beside or trial_of(served.traffic) is not None):
        of = list(dict.fromkeys((served.default.version, *beside)))
        totals = metrics.totals([(name, version) for version in of])
        found["figures"] = {version: figures(totals[name, version]) for version in of}
    return found


def _report(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelNotFound("there is no report for this version") from None
    except (OSError, ValueError):
        raise ServingError("the report of this version can't be read") from None
