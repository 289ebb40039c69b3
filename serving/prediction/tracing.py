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
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Self

from serving.engine.request import Run
from serving.protocols.headers import Headers

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Link, SpanContext

log = logging.getLogger("serving.tracing")

FLUSH_S = 5.0
"""Seconds that a server which ends gives the receiver to take the last spans."""
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


class Tracing:
    """Makes the spans of requests that are sampled, and gives them to `processors`.

    They are made whole, past the SDK's tracer: a request has six, and starting and ending each costs as much as a small
    prediction. follow: who sends a `traceparent` has decided already. share: of the other requests, from 0 to 1, are
    sampled.
    """

    def __init__(self, processors: Sequence[SpanProcessor], resource: Resource, *, follow: bool, share: float) -> None:
        from opentelemetry import trace  # noqa: PLC0415  an extra
        from opentelemetry.context import Context  # noqa: PLC0415
        from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._trace = trace
        self._span = ReadableSpan
        self._scope = InstrumentationScope("serving", version("serving"))
        self._no_parent = Context()
        self._propagator = TraceContextTextMapPropagator()
        self._processors = processors
        self._resource = resource
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
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

            follow, share = _sampler()
            processors = [BatchSpanProcessor(_exporter(name.strip())()) for name in wanted.split(",")]
            return cls(processors, _resource(), follow=follow, share=share)
        except ImportError:
            log.error('the environment asks for traces (OTEL_*): pip install "serving[otel]", or there are none')
        except Exception as error:  # whatever it is, predictions matter more
            log.error("the environment asks for traces (OTEL_*), and there are none: %s", error)
        return None

    def sampled(self, headers: Headers) -> Context | None:
        """Return what the spans of a request hang on; None where it is to have none. Source: W3C Trace Context."""
        for name, _ in headers:
            if name == b"traceparent":
                return self._continued(headers)
        return self._no_parent if random.random() < self._share else None  # noqa: S311  which ones is no secret

    def _continued(self, headers: Headers) -> Context | None:
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
        parent = self._propagator.extract(carrier, self._no_parent)
        given = self._trace.get_current_span(parent).get_span_context()
        if self._follow and given.is_valid:
            return parent if given.trace_flags.sampled else None
        drawn = given.trace_id % 2**64 / 2**64 if given.is_valid else random.random()  # noqa: S311
        return parent if drawn < self._share else None

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
        trace = self._trace
        shift = time.time_ns() - int(time.monotonic() * 1e9)

        def made(
            name: str,
            own: SpanContext,
            parent: SpanContext | None,
            since: float,
            until: float,
            *,
            attributes: Mapping[str, str | int] | None = None,
            links: Sequence[Link] = (),
            kind: Any = trace.SpanKind.INTERNAL,
            status: Any = trace.StatusCode.UNSET,
        ) -> None:
            span = self._span(
                name,
                own,
                parent,
                self._resource,
                attributes,
                links=links,
                kind=kind,
                status=trace.Status(status),
                start_time=int(since * 1e9) + shift,
                end_time=int(until * 1e9) + shift,
                instrumentation_scope=self._scope,
            )
            for processor in self._processors:
                processor.on_end(span)

        above: SpanContext | None = trace.get_current_span(context).get_span_context()
        if above is None or not above.is_valid:
            above = None
        own = self._fresh(above)
        if run is not None and run.span is None:
            facts = {key: value for key, value in attributes.items() if key.startswith("serving.model.")}
            facts |= {"serving.batch.rows": run.rows, "serving.batch.requests": run.requests}
            run.span = self._fresh(None)
            made("batch", run.span, None, run.started, run.ended, attributes=facts, links=[trace.Link(own)])
        for stage, since, until in stages:
            links = [trace.Link(run.span)] if run is not None and stage == "inference" else ()
            made(stage, self._fresh(own), own, since, until, links=links)
        made(
            name,
            own,
            above,
            began,
            ended,
            attributes=attributes,
            kind=trace.SpanKind.SERVER,
            status=trace.StatusCode.ERROR if failed else trace.StatusCode.UNSET,
        )
        return f"{own.trace_id:032x}", f"{own.span_id:016x}"

    def _fresh(self, parent: SpanContext | None) -> SpanContext:
        """Return what a new span is known by, in its parent's trace or one of its own."""
        trace_id, state = (random.getrandbits(128), None) if parent is None else (parent.trace_id, parent.trace_state)
        sampled = self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED)
        return self._trace.SpanContext(trace_id, random.getrandbits(64), False, sampled, state)

    def close(self) -> None:
        """Export what is left, and give up after a while: a receiver that has gone must not hold up the end."""
        closing = [threading.Thread(target=each.shutdown, name="tracing", daemon=True) for each in self._processors]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(FLUSH_S)


def _resource() -> Resource:
    """Return who is traced, as the environment says it, or else by this server's name."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415

    class Known(Resource):
        """Hashed by identity: the exporter asks for each span, and its own hash writes all of it as JSON."""

        __hash__ = object.__hash__

    who: dict[str, str | int] = {
        "service.name": "serving",
        "service.version": version("serving"),
        "process.pid": os.getpid(),
    }
    return Known({**who, **OTELResourceDetector().detect().attributes})


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
