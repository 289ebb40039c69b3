"""What one application serves with: made once from settings, kept at `app.state.serving`, asked for by each route."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from platform import python_version
from typing import TYPE_CHECKING, Annotated, Protocol

from fastapi import Depends
from starlette.requests import HTTPConnection

from serving import platforms
from serving.access.access import Access
from serving.access.rate_limits import Buckets, Rates
from serving.bodies.byte_budget import ByteBudget
from serving.bodies.codec_pool import CodecPool
from serving.capture.capture import Capture
from serving.deploy import channel
from serving.deploy.deployment import Deployment
from serving.deploy.fleet import Fleet
from serving.deploy.mirror import mirrored
from serving.engine.limits import Drift, Limits
from serving.heartbeat import Heartbeat
from serving.http_api.fast_path.state import FastPathState
from serving.http_api.prediction_paths import prediction_paths
from serving.http_api.public_url import Prefix
from serving.in_process import predictor
from serving.metrics.metrics import Metrics
from serving.monitoring.monitoring import Monitoring
from serving.monitoring.shared import SharedDocuments
from serving.platforms import Platform
from serving.prediction.endpoints import EndpointTable
from serving.prediction.request_log import RequestLog
from serving.prediction.tracing import Tracing
from serving.repository.state_directory import state_folder, subfolder
from serving.repository.traffic_store import TrafficStore
from serving.settings import Settings
from serving.timeouts import Timeouts

if TYPE_CHECKING:  # what needs an extra is imported where it is wanted
    from serving.jobs.jobs import Jobs
    from serving.jobs.runner import Runner

log = logging.getLogger("serving.server")

MEMORY_BYTES, MEMORY_FACTOR = 1 << 30, 128
"""What reading a long body may take, at least and for each byte of JSON: the worst take some 100 bytes a byte."""
UPLOADS = 4
"""Models that may be published at a time."""


class Companion(Protocol):
    """Another server over the same fleet, with the application's life: gRPC."""

    async def start(self) -> None:
        """Take calls; models are loaded by then."""

    async def stop(self) -> None:
        """Take no more calls and finish those in progress; a second call waits for the same end."""

    def cut_short(self) -> None:
        """Refuse what is still in progress."""


@dataclass(frozen=True, slots=True)
class Services:
    """All that one application serves with.

    max_model_bytes, extension_ops, strict, cors_origins, fast_path: as in the settings. endpoints: by the path of a
    prediction; in_process: for this process's own code. bodies: bytes that are held. log: of requests. shared: of all
    connections. deployment: where this application coordinates itself. runner: does pieces of jobs. platform: whose
    paths are answered too; platform_model: as in the settings.
    """

    max_model_bytes: int
    extension_ops: bool
    strict: bool
    cors_origins: tuple[str, ...]
    fast_path: bool
    public: Prefix
    fleet: Fleet
    access: Access
    metrics: Metrics | None
    endpoints: EndpointTable
    in_process: EndpointTable
    pool: CodecPool
    bodies: ByteBudget
    log: RequestLog | None
    monitoring: Monitoring
    capture: Capture | None
    shared: FastPathState
    deployment: Deployment | None
    companion: Companion | None = None
    jobs: Jobs | None = None
    runner: Runner | None = None
    platform: Platform | None = None
    platform_model: str | None = None
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS))
    one_gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))


def services_of(connection: HTTPConnection) -> Services:
    """Give what the application that got a request serves with. Raises RuntimeError where it serves nothing."""
    found = getattr(connection.app.state, "serving", None)
    if found is None:
        raise RuntimeError("no models are loaded: give the application serving.lifespan(...), and have it started")
    services: Services = found
    return services


LiveServices = Annotated[Services, Depends(services_of)]


async def live_fleet(services: LiveServices) -> Fleet:
    """Give the fleet of the application that got the request."""
    return services.fleet


LiveFleet = Annotated[Fleet, Depends(live_fleet)]


def make_services(
    settings: Settings,
    *,
    metrics: Metrics | None = None,
    threads: int = 1,
    memory_bytes: int | None = None,
    companion: Callable[[Services], Companion] | None = None,
    link: socket.socket | None = None,
    heartbeat: Heartbeat | None = None,
    buckets: Buckets | None = None,
    documents: SharedDocuments | None = None,
) -> Services:
    """Make what serves `settings.models`.

    metrics: where to count; None makes a registry of this application's own, unless settings turn metrics off. threads:
    onnxruntime threads for each model. memory_bytes: what its runs may take where settings do not say. companion: makes
    what serves beside HTTP. link: to the coordinator of this worker's server; without one the application coordinates
    itself. heartbeat: where to note which model runs. buckets: where what callers take of their rates is counted, with
    other workers. documents: what the workers show each other of drift. Raises AccessInvalid for bad keys.
    """
    if link is None:  # else the command has seen to it
        models, state_dir = mirrored(settings.models, settings.state_dir, say=log.error)
        settings = settings.model_copy(update={"models": models, "state_dir": state_dir})
    access = Access(
        keys=settings.keys,
        jwks=settings.jwks,
        audience=settings.jwt_audience,
        issuer=settings.jwt_issuer,
        token_rates=Rates(settings.jwt_requests_per_s, settings.jwt_rows_per_s),
        buckets=buckets,
    )
    if metrics is None and settings.metrics:
        metrics = Metrics(triton=settings.metrics_compat == "triton")
    bodies = ByteBudget(settings.max_held_bytes)
    pool = CodecPool(memory_bytes=max(MEMORY_BYTES, MEMORY_FACTOR * settings.max_json_bytes))
    deployment = None
    if link is None:
        ours, link = channel.pair()
        deployment = Deployment(
            settings.models,
            metrics.totals if metrics is not None else None,
            state_dir=settings.state_dir,
            extension_ops=settings.extension_ops,
        )
        deployment.coordinator.attach(ours)
    monitoring = Monitoring(
        documents or SharedDocuments(None, 0),
        lambda: state_folder(settings.models, settings.state_dir),
        settings.models,
    )
    fleet = Fleet(
        link,
        store=TrafficStore(settings.models, settings.state_dir),
        limits=_limits(settings, threads, memory_bytes),
        metrics=metrics,
        heartbeat=heartbeat,
        monitoring=monitoring,
    )
    capture = None
    if settings.capture_dir is not None:
        capture = Capture(settings.capture_dir, max_bytes=settings.capture_max_bytes)
        fleet.prepare.append(capture.attach)
    tracing = Tracing.from_environment()
    requests = RequestLog.wanted(settings.access_log, settings.slow_log_s, tracing, features=settings.log_features)
    platform = platforms.platform(settings.platform, os.environ)
    endpoints = EndpointTable(
        *prediction_paths(platform.named if platform is not None else None),
        metrics=metrics,
        access=access,
        pool=pool,
        max_text_bytes=min(settings.max_json_bytes, settings.max_body_bytes),
        max_body_bytes=settings.max_body_bytes,
        log=requests,
        timing=settings.server_timing,
    )
    endpoints.follow(fleet)
    in_process = EndpointTable(
        predictor.ROUTES,
        predictor.CODECS,
        metrics=metrics,
        access=None,
        pool=pool,
        max_text_bytes=settings.max_body_bytes,
        max_body_bytes=settings.max_body_bytes,
    )
    in_process.follow(fleet)
    shared = FastPathState(_timeouts(settings), bodies=bodies)
    if metrics is not None:
        shared.cut = metrics.cut
        metrics.describe((version("serving"), python_version(), version("onnxruntime")), settings.model_dump())
        metrics.follow("serving_held_bytes", lambda: bodies.held)
        metrics.follow("serving_codec_waiting", lambda: pool.waiting)
        metrics.follow("serving_codec_busy_seconds", lambda: pool.busy_s)
        metrics.follow("serving_connections", lambda: len(shared.taken), "http")
        if capture is not None:
            metrics.follow("serving_capture_dropped", lambda: capture.behind, "behind")
            metrics.follow("serving_capture_dropped", lambda: capture.unwritable, "unwritable")
    jobs, runner = (
        _jobs(settings, fleet, in_process, metrics, tracing) if settings.jobs_database_url is not None else (None, None)
    )
    services = Services(
        max_model_bytes=settings.max_model_bytes,
        extension_ops=settings.extension_ops,
        strict=settings.strict,
        cors_origins=settings.cors_origins,
        fast_path=settings.fast_path,
        public=Prefix(settings.root_path, settings.trusted_proxies),
        fleet=fleet,
        access=access,
        metrics=metrics,
        endpoints=endpoints,
        in_process=in_process,
        pool=pool,
        bodies=bodies,
        log=requests,
        monitoring=monitoring,
        capture=capture,
        shared=shared,
        deployment=deployment,
        jobs=jobs,
        runner=runner,
        platform=platform,
        platform_model=settings.platform_model,
    )
    return services if companion is None else replace(services, companion=companion(services))


def _jobs(
    settings: Settings, fleet: Fleet, endpoints: EndpointTable, metrics: Metrics | None, tracing: Tracing | None
) -> tuple[Jobs, Runner]:
    """Make what takes jobs, and what does them."""
    from serving.jobs.database import Database  # noqa: PLC0415  only where jobs are wanted
    from serving.jobs.inputs import Locations  # noqa: PLC0415
    from serving.jobs.jobs import Jobs  # noqa: PLC0415
    from serving.jobs.pieces import Pieces  # noqa: PLC0415
    from serving.jobs.results import Results  # noqa: PLC0415
    from serving.jobs.runner import Runner  # noqa: PLC0415

    state = state_folder(settings.models, settings.state_dir)
    database = Database(settings.jobs_database_url or "sqlite", state)
    results = Results(settings.jobs_folder or str(subfolder(state, "jobs")))
    locations = Locations(settings.jobs_inputs)
    jobs = Jobs(
        database,
        results,
        locations,
        fleet,
        max_upload_bytes=settings.jobs_max_upload_bytes,
    )
    runner = Runner(
        database,
        results,
        Pieces(database, results, locations, fleet, endpoints),
        asked=jobs.asked,
        metrics=metrics,
        running=settings.jobs_running,
        keep_s=settings.jobs_keep_days * 24 * 3600,
        keep_bytes=settings.jobs_keep_bytes,
        tracing=tracing,
    )
    return jobs, runner


def _limits(settings: Settings, threads: int, memory_bytes: int | None) -> Limits:
    return Limits(
        max_batch_rows=settings.max_batch_rows,
        max_queued_rows=settings.max_queued_rows,
        max_delay=settings.max_delay_ms / 1000,
        deadline_s=settings.deadline_s,
        instances=settings.instances,
        threads=threads,
        drift=Drift(enabled=settings.drift),
        memory_bytes=settings.model_memory_bytes or memory_bytes,
        capture_share=settings.capture_share,
    )


def _timeouts(settings: Settings) -> Timeouts:
    return Timeouts(
        head_s=settings.head_s,
        body_s=settings.body_s,
        body_bytes=settings.max_body_bytes,
        write_s=settings.write_s,
        idle_s=settings.keep_alive_s,
        min_rate=settings.min_bytes_per_s,
        head_bytes=settings.max_head_bytes,
        connections=settings.max_connections,
    )
