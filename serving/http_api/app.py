"""The FastAPI application: everything works on it, under any ASGI server and under TestClient."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from importlib.metadata import version as package_version
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from serving.access.access import Access
from serving.errors import ServingError
from serving.http_api import admin, feedback, jobs_api, metadata, platform_routes, repository_api, route, triton
from serving.http_api.metrics_middleware import Observed
from serving.http_api.openapi import docs
from serving.http_api.own_route import error_response, http_error, unforeseen
from serving.http_api.public_url import redirect_relatively
from serving.http_api.route_names import RouteNames
from serving.http_api.services import Services, make_services
from serving.metrics.metrics import Metrics
from serving.monitoring.monitoring import Monitoring
from serving.platforms import Platform
from serving.prediction.endpoint import Endpoint
from serving.protocols.http_codec import LENGTH
from serving.settings import Settings

log = logging.getLogger("serving.app")

router = APIRouter()
"""Everything that is served over HTTP but the documentation; what it serves with is its application's."""
for _part in (
    route.router,
    triton.router,  # before: its /v2/models/stats is no model called stats
    metadata.router,
    feedback.router,
    admin.router,
    repository_api.router,
    jobs_api.router,
):
    router.include_router(_part)


def create_app(settings: Settings, **given: Any) -> FastAPI:
    """Make the application that serves `settings.models`; `given`: see `make_services`."""
    services = make_services(settings, **given)
    app = application(lambda: services, services.platform)
    app.state.serving = services
    return app


def application(make: Callable[[], Services], platform: Platform | None = None) -> FastAPI:
    """Make an application of this server's routes, and a platform's; `make` is called each time that it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with serve(app, make()):
            yield

    app = FastAPI(
        title="serving",
        version=package_version("serving"),
        description="Predictions from every model in the folder, by feature name or by tensor.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
    )
    if platform is not None:
        app.include_router(platform_routes.router(platform))
    app.include_router(router)
    docs.add(app)
    redirect_relatively(app.router)
    app.add_exception_handler(ServingError, error_response)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unforeseen)
    return app


@asynccontextmanager
async def serve(app: FastAPI, services: Services) -> AsyncIterator[None]:
    """Serve with an application while this is open: load the models, and stop them when what was accepted is answered.

    Raises ModelInvalid where the settings are strict and a model can't be loaded.
    """
    fleet, access, metrics = services.fleet, services.access, services.metrics
    app.state.serving = services
    if ServingError not in app.exception_handlers:
        log.warning(
            "what callers send wrong to a serving.Predictor is answered with 500: add "
            "app.add_exception_handler(serving.ServingError, serving.error_response)"
        )
    inner = app.middleware_stack or app.build_middleware_stack()
    app.middleware_stack = _around(inner, app, services)
    if services.deployment is not None:
        services.deployment.start()
    tasks: list[asyncio.Task[None]] = []
    try:
        await fleet.start(strict=services.strict)
        await run_in_threadpool(int)  # it imports its backend at the first use, for which a client would wait
        _build_routes(app)
        if services.companion is not None:
            await services.companion.start()
        if access.configured:
            tasks.append(asyncio.create_task(_reread(access)))
        if metrics is not None:
            tasks.append(asyncio.create_task(_fold(metrics)))
        tasks.append(asyncio.create_task(_monitor(services.monitoring, metrics)))
        async with services.runner or nullcontext():
            yield
    finally:
        fleet.draining = True
        if services.companion is not None:
            await services.companion.stop()
        if services.deployment is not None:
            await asyncio.to_thread(services.deployment.stop)  # what it waits for may need this loop
        await fleet.close()
        await services.pool.close()
        if services.log is not None:
            await asyncio.to_thread(services.log.close)
        if services.capture is not None:
            await asyncio.to_thread(services.capture.close)
        for task in tasks:
            task.cancel()
        await asyncio.to_thread(services.monitoring.close)
        if metrics is not None:
            metrics.flush()
        app.middleware_stack = inner


def _around(inner: Any, app: FastAPI, services: Services) -> Observed:
    """Put this server's own middleware around an application's, so that what the latter answers is counted too.

    An application that has begun its life takes no more middleware by `add_middleware`.
    """
    names = RouteNames(app)
    prefix = names.plain_prefix()
    paths: dict[bytes, Endpoint] = {}
    endpoints, shared, metrics = services.endpoints, services.shared, services.metrics
    if prefix is not None:
        endpoints.below(prefix)
        paths = endpoints.paths
        if services.fast_path:
            shared.paths = paths
        if metrics is not None:
            shared.routes = {template: metrics.route(template, "POST") for template in endpoints.routes.values()}
    if services.cors_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=list(services.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=[
                *("x-request-id", "x-model-version", "retry-after", "www-authenticate", "etag", "server-timing"),
                LENGTH.decode(),
            ],
        )
    return Observed(inner, services, names=names, paths=paths)


def _build_routes(app: FastAPI) -> None:
    """Have routers make of their routes what they need, which they put off until something is to be matched.

    It takes as long as hundreds of predictions, all of which would wait if it came with the first order to deploy.
    """
    for each in app.routes:
        each.matches({"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []})


async def _reread(access: Access) -> None:
    while True:
        await asyncio.sleep(1)
        await asyncio.to_thread(access.refresh)


async def _fold(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        for _ in range(10):
            due = loop.time() + 0.1
            await asyncio.sleep(0.1)
            metrics.loop_lag(loop.time() - due)
        await asyncio.to_thread(metrics.flush)


async def _monitor(monitoring: Monitoring, metrics: Metrics | None) -> None:
    while True:
        await asyncio.sleep(1)
        try:
            counted = await asyncio.to_thread(monitoring.tick)
        except Exception:  # predictions go on, and so does the next second
            log.exception("what models are asked could not be looked at")
            continue
        if metrics is not None:
            metrics.last_window = monitoring.gauges
            metrics.count(counted)
