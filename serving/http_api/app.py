"""The FastAPI application: everything works on it, under any ASGI server and under TestClient."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from serving.engine.admission import Bodies
from serving.engine.model import Limits
from serving.errors import InvalidRequest, ServingError
from serving.fleet.fleet import Fleet
from serving.http_api import docs, metadata, triton
from serving.http_api.answer import error_body, error_headers, status_of
from serving.http_api.guard import Patience
from serving.http_api.lane import Door
from serving.http_api.observed import Observed
from serving.http_api.route import prediction_routes
from serving.http_api.targets import TEMPLATES, Targets
from serving.metrics import Metrics
from serving.settings import Settings


class Companion(Protocol):
    """Another server over the same fleet, with the application's life: gRPC."""

    async def start(self) -> None:
        """Take calls; models are loaded by then."""

    async def stop(self) -> None:
        """Take no more calls and finish those in progress; a second call waits for the same end."""


def create_app(
    settings: Settings,
    *,
    metrics: Metrics | None = None,
    threads: int = 1,
    companion: Callable[[Fleet, Metrics | None, Bodies], Companion] | None = None,
) -> FastAPI:
    """Make the application that serves `settings.models`.

    metrics: where to count; None makes a registry of this application's own, unless settings turn metrics off.
    threads: onnxruntime threads for each model. companion: makes what serves beside HTTP. The lifespan loads the
    models and raises ModelInvalid where `settings.strict` and one can't be.
    """
    if metrics is None and settings.metrics:
        metrics = Metrics()
    limits = Limits(
        max_batch_rows=settings.max_batch_rows,
        max_queued_rows=settings.max_queued_rows,
        max_delay=settings.max_delay_ms / 1000,
        instances=settings.instances,
        threads=threads,
    )
    app = FastAPI(
        title="serving",
        version=package_version("serving"),
        description="Predictions from every model in the folder, by feature name or by tensor.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=_lifespan,
    )
    bodies = Bodies(settings.max_held_bytes)
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.fleet = Fleet(settings.models, limits=limits, metrics=metrics)
    app.state.companion = companion(app.state.fleet, metrics, bodies) if companion is not None else None
    app.state.targets = Targets(metrics, deadline=settings.deadline_s)
    routes = {t: metrics.route(t, "POST") for t in TEMPLATES.values()} if metrics is not None else {}
    paths = app.state.targets.paths if settings.lane else {}
    patience = Patience(
        head_s=settings.head_s,
        body_s=settings.body_s,
        write_s=settings.write_s,
        idle_s=settings.keep_alive_s,
        min_rate=settings.min_bytes_per_s,
        head_bytes=settings.max_head_bytes,
        connections=settings.max_connections,
    )
    app.state.door = Door(patience, paths=paths, max_body_bytes=settings.max_body_bytes, routes=routes, bodies=bodies)
    if metrics is not None:
        app.state.door.cut = metrics.cut
    app.router.routes.extend(
        prediction_routes(app.state.fleet, app.state.targets, max_body_bytes=settings.max_body_bytes, bodies=bodies)
    )
    app.include_router(metadata.router)
    app.include_router(triton.router)
    if metrics is not None:
        app.include_router(metadata.metrics_router)
    docs.add(app)
    app.add_exception_handler(ServingError, _serving_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unforeseen)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(
        Observed,
        metrics=metrics,
        paths=app.state.targets.paths,
        max_body_bytes=settings.max_body_bytes,
        bodies=bodies,
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    fleet: Fleet = app.state.fleet
    await fleet.start(strict=app.state.settings.strict)
    app.state.targets.bind(fleet, asyncio.get_running_loop())
    companion: Companion | None = app.state.companion
    if companion is not None:
        await companion.start()
    folding = asyncio.create_task(_fold(app.state.metrics)) if app.state.metrics is not None else None
    try:
        yield
    finally:
        fleet.draining = True
        if companion is not None:
            await companion.stop()
        await fleet.close()
        if folding is not None:
            folding.cancel()
            app.state.metrics.fold()


async def _fold(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(1)
        metrics.fold()


def _answer(error: ServingError, status: int, headers: dict[str, str] | None = None) -> Response:
    extra = {k.decode(): v.decode() for k, v in error_headers(error)}
    return Response(error_body(error), status, headers={**extra, **(headers or {})}, media_type="application/json")


async def _serving_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)  # noqa: S101  Starlette types every handler for Exception
    protocol = "v2" if request.url.path.startswith("/v2") else "v1"
    return _answer(error, status_of(error, protocol))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    texts = {
        404: "there is nothing at this path: see /docs",
        405: "this path does not take this method: see Allow",
    }
    text = texts.get(error.status_code, str(error.detail))
    return _answer(InvalidRequest(text), error.status_code, dict(error.headers or {}))


async def _validation_error(request: Request, error: Exception) -> Response:
    return _answer(InvalidRequest("the request's parameters are not valid: see /docs"), 400)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return _answer(ServingError("the server failed on this request; its log has the reason"), 500)


def from_environment() -> FastAPI:
    """Make the application from `SERVING_*` alone, for any ASGI server that takes a factory."""
    return create_app(Settings())
