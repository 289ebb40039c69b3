"""Spans of OpenTelemetry, made of what a request has left behind once it is answered: its times, and how it ended.

Everything is set by the environment variables that OpenTelemetry defines; there are no options here. It comes with the
extra `serving[otel]`, and this is its only owner.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Self

from serving.engine.request import Run
from serving.protocols.headers import Headers, header

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("serving.tracing")

FLUSH_S = 5.0
"""Seconds that a server which ends gives the receiver to take the last spans."""
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


class Tracing:
    """Makes the spans of requests that are sampled. provider: exports every span that it is given.

    follow: who sends a `traceparent` has decided already. share: of the other requests, from 0 to 1, are sampled.
    """

    def __init__(self, provider: TracerProvider, *, follow: bool, share: float) -> None:
        from opentelemetry import trace  # noqa: PLC0415  an extra
        from opentelemetry.context import Context  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._trace = trace
        self._no_parent = Context()
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("serving", version("serving"))
        self._follow = follow
        self._share = share

    @classmethod
    def from_environment(cls) -> Self | None:
        """Make one where OTEL_TRACES_EXPORTER or an OTLP endpoint is set; what is wrong there is logged, no more."""
        env = os.environ.get
        otlp = env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env("OTEL_EXPORTER_OTLP_ENDPOINT")
        wanted = env("OTEL_TRACES_EXPORTER") or ("otlp" if otlp else "none")
        if wanted == "none" or env("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        try:
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415

            who: dict[str, str | int] = {
                "service.name": "serving",
                "service.version": version("serving"),
                "process.pid": os.getpid(),
            }
            provider = TracerProvider(
                sampler=ALWAYS_ON,  # `sampled` has decided before, without a span
                resource=Resource(who).merge(OTELResourceDetector().detect()),
                shutdown_on_exit=False,
            )
            for name in wanted.split(","):
                provider.add_span_processor(BatchSpanProcessor(_exporter(name.strip())()))
            follow, share = _sampler()
            return cls(provider, follow=follow, share=share)
        except ImportError:
            log.error('the environment asks for traces (OTEL_*): pip install "serving[otel]", or there are none')
        except Exception as error:  # whatever it is, predictions matter more
            log.error("the environment asks for traces (OTEL_*), and there are none: %s", error)
        return None

    def sampled(self, headers: Headers) -> Context | None:
        """Return what the spans of a request hang on; None where it is to have none. Source: W3C Trace Context."""
        parent = self._no_parent
        if header(headers, b"traceparent") is not None:
            carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
            parent = self._propagator.extract(carrier, parent)
            given = self._trace.get_current_span(parent).get_span_context()
            if given.is_valid:
                taken = given.trace_flags.sampled if self._follow else given.trace_id % 2**64 < self._share * 2**64
                return parent if taken else None
        return parent if random.random() < self._share else None  # noqa: S311  which ones is no secret

    def record(
        self,
        context: Context,
        name: str,
        attributes: Mapping[str, str | int],
        *,
        failed: bool,
        began: float,
        ended: float,
        stages: Iterable[tuple[str, float, float]] = (),
        run: Run | None = None,
    ) -> tuple[str, str]:
        """Make the span of a request and one of each stage; return its trace's id and its own, in hexadecimal.

        context: as `sampled` returned it. Times are monotonic seconds. run: the batch that its rows ran in, which has
        one span for all that were in it; it is a trace of its own, since it belongs to none of them.
        """
        trace, start = self._trace, self._tracer.start_span
        shift = time.time_ns() - int(time.monotonic() * 1e9)

        def at(seconds: float) -> int:
            return int(seconds * 1e9) + shift

        span = start(name, context, trace.SpanKind.SERVER, attributes, start_time=at(began))
        own = span.get_span_context()
        if run is not None and run.span is None:
            facts = {key: value for key, value in attributes.items() if key.startswith("serving.model.")}
            facts |= {"serving.batch.rows": run.rows, "serving.batch.requests": run.requests}
            batch = start(
                "batch", self._no_parent, attributes=facts, links=[trace.Link(own)], start_time=at(run.started)
            )
            batch.end(at(run.ended))
            run.span = batch.get_span_context()
        inside = trace.set_span_in_context(span, context)
        for stage, since, until in stages:
            links = [trace.Link(run.span)] if run is not None and stage == "inference" else None
            start(stage, inside, links=links, start_time=at(since)).end(at(until))
        if failed:
            span.set_status(trace.StatusCode.ERROR)
        span.end(at(ended))
        return f"{own.trace_id:032x}", f"{own.span_id:016x}"

    def close(self) -> None:
        """Export what is left, and give up after a while: a receiver that has gone must not hold up the end."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(FLUSH_S)


def _exporter(name: str) -> type:
    """Return the class of an exporter, as OTEL_TRACES_EXPORTER names it. Raises ValueError where there is none."""
    if name == "otlp":
        env = os.environ.get
        protocol = env("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or env("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
        name = _OTLP.get(protocol, protocol)
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        exporter: type = found.load()
        return exporter
    raise ValueError(f"no exporter is installed that is called {name}")


def _sampler() -> tuple[bool, float]:
    """Read OTEL_TRACES_SAMPLER: whether callers decide, and the share of what they leave open.

    Raises ValueError for one that is not of the specification's, or an argument that is no share.
    """
    name = os.environ.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    kind = name.removeprefix("parentbased_")
    share = float(os.environ.get("OTEL_TRACES_SAMPLER_ARG") or 1) if kind == "traceidratio" else 1.0
    if kind not in ("always_on", "always_off", "traceidratio") or not 0 <= share <= 1:
        raise ValueError(f"OTEL_TRACES_SAMPLER should be a known one, and its argument from 0 to 1, not {name} {share}")
    return kind != name, 0.0 if kind == "always_off" else share
