"""The FastAPI application: everything works on it, under any ASGI server and under TestClient."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version as package_version
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from serving.access.access import Access
from serving.access.rate_limits import Buckets, Rates
from serving.bodies.byte_budget import ByteBudget
from serving.bodies.codec_pool import CodecPool
from serving.deploy import channel
from serving.deploy.deployment import Deployment
from serving.deploy.fleet import Fleet
from serving.engine.limits import Limits
from serving.errors import DETAILS_SHOWN, Detail, InvalidRequest, ServingError, shown
from serving.heartbeat import Heartbeat
from serving.http_api import admin, docs, metadata, repository_api, triton
from serving.http_api.answer import METHOD_TEXT, error_body, error_headers, status_of
from serving.http_api.connection_reaper import Timeouts
from serving.http_api.fast_path_state import FastPathState
from serving.http_api.metrics_middleware import Observed
from serving.http_api.parameters import taken
from serving.http_api.prediction_paths import CODECS, ROUTES
from serving.http_api.public_url import Prefix, redirect_relatively
from serving.http_api.route import prediction_routes
from serving.metrics.metrics import Metrics
from serving.prediction.endpoints import EndpointTable
from serving.protocols import strict_json
from serving.protocols.http_codec import LENGTH
from serving.repository.traffic import sentence
from serving.repository.traffic_store import TrafficStore
from serving.settings import Settings

MEMORY_BYTES, MEMORY_FACTOR = 1 << 30, 128
"""What reading a long body may take, at least and for each byte of JSON: the worst take some 100 bytes a byte."""


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
    memory_bytes: int | None = None,
    companion: Callable[[Fleet, Metrics | None, Access, ByteBudget, CodecPool], Companion] | None = None,
    link: socket.socket | None = None,
    heartbeat: Heartbeat | None = None,
    buckets: Buckets | None = None,
) -> FastAPI:
    """Make the application that serves `settings.models`.

    metrics: where to count; None makes a registry of this application's own, unless settings turn metrics off. threads:
    onnxruntime threads for each model. memory_bytes: what its runs may take where settings do not say. companion: makes
    what serves beside HTTP. link: to the coordinator of this worker's server; without one the application coordinates
    itself. heartbeat: where to note which model runs. buckets: where what callers take of their rates is counted,
    with other workers. The lifespan loads the models and raises ModelInvalid where
    `settings.strict` and one can't be. Raises AccessInvalid for bad keys.
    """
    access = Access(
        keys=settings.keys,
        jwks=settings.jwks,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        token_rates=Rates(settings.jwt_requests_per_s, settings.jwt_rows_per_s),
        buckets=buckets,
    )
    if metrics is None and settings.metrics:
        metrics = Metrics()
    limits = Limits(
        max_batch_rows=settings.max_batch_rows,
        max_queued_rows=settings.max_queued_rows,
        max_delay=settings.max_delay_ms / 1000,
        deadline_s=settings.deadline_s,
        instances=settings.instances,
        threads=threads,
        memory_bytes=settings.model_memory_bytes or memory_bytes,
    )
    app = FastAPI(
        title="serving",
        version=package_version("serving"),
        description="Predictions from every model in the folder, by feature name or by tensor.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=_lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    bodies = ByteBudget(settings.max_held_bytes)
    pool = app.state.pool = CodecPool(memory_bytes=max(MEMORY_BYTES, MEMORY_FACTOR * settings.max_json_bytes))
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.deployment = None
    if link is None:
        ours, link = channel.pair()
        app.state.deployment = Deployment(
            settings.models,
            metrics.totals if metrics is not None else None,
            state_dir=settings.state_dir,
            extension_ops=settings.extension_ops,
        )
        app.state.deployment.attach(ours)
    app.state.fleet = Fleet(
        settings.models,
        link,
        store=TrafficStore(settings.models, settings.state_dir),
        state_dir=settings.state_dir,
        limits=limits,
        metrics=metrics,
        heartbeat=heartbeat,
    )
    app.state.access = access
    app.state.companion = companion(app.state.fleet, metrics, access, bodies, pool) if companion is not None else None
    endpoints = EndpointTable(
        ROUTES,
        CODECS,
        metrics=metrics,
        access=access,
        pool=pool,
        max_text_bytes=min(settings.max_json_bytes, settings.max_body_bytes),
        max_body_bytes=settings.max_body_bytes,
    )
    endpoints.follow(app.state.fleet)
    routes = {t: metrics.route(t, "POST") for t in ROUTES.values()} if metrics is not None else {}
    paths = endpoints.paths if settings.fast_path else {}
    patience = Timeouts(
        head_s=settings.head_s,
        body_s=settings.body_s,
        body_bytes=settings.max_body_bytes,
        write_s=settings.write_s,
        idle_s=settings.keep_alive_s,
        min_rate=settings.min_bytes_per_s,
        head_bytes=settings.max_head_bytes,
        connections=settings.max_connections,
    )
    app.state.shared = FastPathState(patience, paths=paths, routes=routes, bodies=bodies)
    if metrics is not None:
        app.state.shared.cut = metrics.cut
    app.router.routes.extend(prediction_routes(app.state.fleet, endpoints, access, bodies))
    app.include_router(metadata.health_router)
    app.include_router(triton.router)  # before: its /v2/models/stats is no model called stats
    app.include_router(metadata.router)
    app.include_router(triton.changes_router)
    app.include_router(admin.router(settings.models, metrics, settings.state_dir))
    app.include_router(
        repository_api.router(
            settings.models,
            max_model_bytes=settings.max_model_bytes,
            state_dir=settings.state_dir,
            extension_ops=settings.extension_ops,
        )
    )
    if metrics is not None:
        app.include_router(metadata.metrics_router)
    docs.add(app, Prefix(settings.root_path, settings.trusted_proxies))
    redirect_relatively(app.router)
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
            expose_headers=["x-request-id", "retry-after", "www-authenticate", "etag", LENGTH.decode()],
        )
    app.add_middleware(
        Observed,
        metrics=metrics,
        paths=endpoints.paths,
        bodies=bodies,
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    fleet: Fleet = app.state.fleet
    deployment: Deployment | None = app.state.deployment
    if deployment is not None:
        deployment.start()
    companion: Companion | None = app.state.companion
    rereading = folding = None
    try:
        await fleet.start(strict=app.state.settings.strict)
        await run_in_threadpool(int)  # it imports its backend at the first use, for which a client would wait
        _build_routes(app)
        if companion is not None:
            await companion.start()
        if app.state.access.configured:
            rereading = asyncio.create_task(_reread(app.state.access))
        if app.state.metrics is not None:
            folding = asyncio.create_task(_fold(app.state.metrics))
        yield
    finally:
        fleet.draining = True
        if companion is not None:
            await companion.stop()
        if deployment is not None:
            await asyncio.to_thread(deployment.stop)  # what it waits for may need this loop
        await fleet.close()
        await app.state.pool.close()
        if rereading is not None:
            rereading.cancel()
        if folding is not None:
            folding.cancel()
            app.state.metrics.flush()


def _build_routes(app: FastAPI) -> None:
    """Have routers make of their routes what they need, which they put off until something is to be matched.

    It takes as long as hundreds of predictions, all of which would wait if it came with the first order to deploy.
    """
    for route in app.routes:
        route.matches({"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []})


async def _reread(access: Access) -> None:
    while True:
        await asyncio.sleep(1)
        await asyncio.to_thread(access.refresh)


async def _fold(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(1)
        await asyncio.to_thread(metrics.flush)


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
        405: METHOD_TEXT,
    }
    text = texts.get(error.status_code, str(error.detail))
    return _answer(InvalidRequest(text), error.status_code, dict(error.headers or {}))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    details = []
    for found in error.errors()[:DETAILS_SHOWN]:
        place: tuple[str | int, ...] = found["loc"] if found["type"] != "json_invalid" else ()
        below = 1 if place[:1] == ("body",) else 0
        text = sentence(found, below=below)
        if found["type"] == "extra_forbidden" and place[0] == "query":
            text = (
                f"{shown(str(place[1]))}: there is no such parameter; parameters: {', '.join(taken(request)) or 'none'}"
            )
        details.append(Detail(strict_json.pointer(*place[below:]), text))
    return _answer(InvalidRequest(f"the request is not valid: {details[0].message}; see /docs", details), 400)


async def _unforeseen(request: Request, error: Exception) -> Response:
    return _answer(ServingError("the server failed on this request; its log has the reason"), 500)


def from_environment() -> FastAPI:
    """Make the application from `SERVING_*` alone, for any ASGI server that takes a factory."""
    return create_app(Settings())
