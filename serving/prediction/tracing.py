"""OpenTelemetry: which requests have spans, and what is taken down of these once they are answered.

Everything is set by the environment variables that OpenTelemetry defines; there are no options here. It comes with the
extra `serving[otel]`, whose only owners are this and `spans`.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Self

from serving.engine.request import Run
from serving.prediction.spans import Described, Record, SpanMaker
from serving.protocols.headers import Headers, header

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

log = logging.getLogger("serving.tracing")

FLUSH_S = 5.0
"""Seconds that a server which ends gives the receiver to take the last spans."""
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{16}([0-9a-f]{16})-(?!0{16})[0-9a-f]{16}-[0-9a-f]([0-9a-f])(?![^-])"
)
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def traceparent(headers: Headers) -> str | None:
    """Return what a caller says that its request is part of, as it is said (W3C Trace Context), where it does."""
    found = _TRACEPARENT.match(header(headers, b"traceparent") or b"")
    return found[0].decode() if found else None


class Tracing:
    """Takes down what the spans of sampled requests are made of, for `processors`, which have them made.

    follow: who sends a `traceparent` has decided already. share: of the other requests, from 0 to 1, are sampled.
    """

    def __init__(self, processors: Sequence[SpanProcessor], *, follow: bool, share: float) -> None:
        from opentelemetry import trace  # noqa: PLC0415  an extra
        from opentelemetry.context import Context  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        # Else it warns of each member of a `tracestate` that is none, with what the caller has written there.
        logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
        self._current_span = trace.get_current_span
        self._sampled = trace.SpanContext(1, 1, False, trace.TraceFlags(trace.TraceFlags.SAMPLED))
        self._no_parent = Context()
        self._propagator = TraceContextTextMapPropagator()
        self._processors = processors
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
            made: list[SpanProcessor] = []
            for name in wanted.split(","):
                exporter: Any = SpanMaker(_exporter(name.strip())())
                made.append(BatchSpanProcessor(exporter))
            return cls(made, follow=follow, share=share)
        except ImportError:
            log.error('the environment asks for traces (OTEL_*): pip install "serving[otel]", or there are none')
        except Exception as error:  # whatever it is, predictions matter more
            log.error("the environment asks for traces (OTEL_*), and there are none: %s", error)
        return None

    def sampled(self, headers: Headers) -> Context | None:
        """Return what the spans of a request hang on; None where it is to have none. Source: W3C Trace Context."""
        for name, value in headers:
            # Most are not sampled, and cost no more than a look: the library takes ten times as long over a header.
            if name == b"traceparent" and (found := _TRACEPARENT.match(value)) is not None:
                low, flags = found.groups()
                if not (int(flags, 16) & 1 if self._follow else int(low, 16) / 2**64 < self._share):
                    return None
                carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name[:5] == b"trace"}
                return self._propagator.extract(carrier, self._no_parent)
        return self._no_parent if random.random() < self._share else None  # noqa: S311  which ones is no secret

    def record(
        self,
        context: Context,
        describe: Callable[[], Described],
        *,
        began: float,
        ended: float,
        stages: Sequence[tuple[str, float, float]] = (),
        run: Run | None = None,
    ) -> tuple[str, str]:
        """Have the span of a request made, and one of each stage; return its trace's id and its own, in hexadecimal.

        context: as `sampled` returned it. Times are monotonic seconds. run: the batch that its rows ran in, which has
        one span for all that were in it; it is a trace of its own, since it belongs to none of them.
        """
        above = None if context is self._no_parent else self._current_span(context).get_span_context()
        if above is not None and not above.is_valid:
            above = None
        own = random.getrandbits(128) if above is None else above.trace_id, random.getrandbits(64)
        first = run is not None and run.span is None
        if run is not None and first:
            run.span = random.getrandbits(128), random.getrandbits(64)
        record: Any = Record(self._sampled, own, above, describe, began, ended, stages, run, first)
        for processor in self._processors:
            processor.on_end(record)
        return f"{own[0]:032x}", f"{own[1]:016x}"

    def close(self) -> None:
        """Export what is left, and give up after a while: a receiver that has gone must not hold up the end."""
        closing = [threading.Thread(target=each.shutdown, name="tracing", daemon=True) for each in self._processors]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(FLUSH_S)


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
