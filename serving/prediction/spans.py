"""Spans of OpenTelemetry, made of what requests have left behind: many at a time, on the thread that exports them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from serving.engine.request import Run

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext, TraceState

Ids: TypeAlias = tuple[int, int]
"""Of a trace, and of a span in it."""
_HTTP = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_LOCAL, _REMOTE = 0x100, 0x300
"""Flags of OTLP: whether a parent is of another process, which is known in either case."""


class Described(NamedTuple):
    """What a request was: its span's name, attributes and kind, and whether the server failed on it."""

    name: str
    attributes: dict[str, str | int]
    failed: bool
    kind: str = "SERVER"


@dataclass(slots=True, eq=False)
class Record:
    """What the spans of a request are made of; `context` is what a processor asks of a span that it is given.

    own: the request's span; above: its parent, if it has one. describe: called by a thread.
    """

    context: SpanContext
    own: Ids
    above: SpanContext | None
    describe: Callable[[], Described]
    began: float
    ended: float
    stages: Sequence[tuple[str, float, float]]
    run: Run | None
    first: bool
    """Whether it is the first of its batch, and brings the batch's span."""


class Span(NamedTuple):
    """One span, whoever writes it. start, end: monotonic seconds."""

    name: str
    own: Ids
    parent: Ids | None
    start: float
    end: float
    state: TraceState | None = None
    attributes: Mapping[str, str | int] = {}
    link: Ids | None = None
    kind: str = "INTERNAL"
    failed: bool = False
    is_remote: bool = False
    """Whether its parent is of another process."""


def spans_of(record: Record) -> Iterator[Span]:
    """Give the spans of a request: of its batch where it is the first there, its stages, its own."""
    name, attributes, failed, kind = record.describe()
    above, run, own = record.above, record.run, record.own
    state = above.trace_state if above is not None else None
    batch = run.span if run is not None else None
    if run is not None and batch is not None and record.first:
        facts = {key: value for key, value in attributes.items() if key.startswith("serving.model.")}
        facts |= {"serving.batch.rows": run.rows, "serving.batch.requests": run.requests}
        yield Span("batch", batch, None, run.started, run.ended, None, facts, own)
    for stage, since, until in record.stages:
        link = batch if stage == "inference" else None
        yield Span(stage, (own[0], random.getrandbits(64)), own, since, until, state, link=link)
    parent = (above.trace_id, above.span_id) if above is not None else None
    times = record.began, record.ended
    yield Span(name, own, parent, *times, state, attributes, kind=kind, failed=failed, is_remote=parent is not None)


class SpanMaker:
    """An exporter that makes spans of records, and has another one export them.

    Many at a time on the thread that exports: one by one on the event loop they cost three times as much. They are made
    whole, past the SDK's tracer, which costs as much again.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry import trace  # noqa: PLC0415  an extra
        from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415

        self._trace = trace
        self._span = ReadableSpan
        self._exporter = exporter
        self._resource = _resource()
        self._scope = InstrumentationScope("serving", version("serving"))
        self._flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        self._unset, self._error = trace.Status(), trace.Status(trace.StatusCode.ERROR)
        self.shutdown = exporter.shutdown
        self.force_flush = exporter.force_flush
        # The exporter's own encoder has the interpreter three times as long as ours, and predictions wait for it; its
        # client knows addresses, headers, certificates and how to try again.
        self._client: Any = getattr(exporter, "_client", None) if type(exporter).__module__ == _HTTP else None
        if self._client is not None:
            self._write = OtlpWriter(self.readable(Span("", (1, 1), None, 0, 0), 0))

    def export(self, records: Sequence[Record]) -> Any:
        """Export the spans of some requests."""
        # Spans have the time of day, and stages are measured by a clock that nobody sets.
        shift = time.time_ns() - int(time.monotonic() * 1e9)
        spans = [span for record in records for span in spans_of(record)]
        if self._client is not None:
            return self._client.export(self._write(spans, shift))
        return self._exporter.export([self.readable(span, shift) for span in spans])

    def readable(self, span: Span, shift: int) -> ReadableSpan:
        """Make a span as the SDK has it; shift: nanoseconds from the monotonic clock to that of the day."""
        trace = self._trace

        def context(ids: Ids, state: TraceState | None = None, *, is_remote: bool = False) -> SpanContext:
            made: SpanContext = trace.SpanContext(*ids, is_remote, self._flags, state)
            return made

        return self._span(
            span.name,
            context(span.own, span.state),
            context(span.parent, span.state, is_remote=span.is_remote) if span.parent is not None else None,
            self._resource,
            span.attributes,
            links=[trace.Link(context(span.link))] if span.link is not None else (),
            kind=trace.SpanKind[span.kind],
            instrumentation_scope=self._scope,
            status=self._error if span.failed else self._unset,
            start_time=int(span.start * 1e9) + shift,
            end_time=int(span.end * 1e9) + shift,
        )


class OtlpWriter:
    """Writes spans as OTLP's requests in protobuf, byte by byte as OpenTelemetry's own encoder does.

    like: a span of the same resource and scope.
    """

    def __init__(self, like: ReadableSpan) -> None:
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans  # noqa: PLC0415  an extra
        from opentelemetry.proto.common.v1 import common_pb2  # noqa: PLC0415
        from opentelemetry.proto.trace.v1 import trace_pb2  # noqa: PLC0415

        self._empty: Any = encode_spans([like])
        del self._empty.resource_spans[0].scope_spans[0].spans[:]
        self._key_value: Any = common_pb2.KeyValue
        self._value: Any = common_pb2.AnyValue
        self._known = lru_cache(1024)(self._attribute)  # most come again and again
        self._link: Any = trace_pb2.Span.Link
        self._kinds: Any = trace_pb2.Span.SpanKind
        self._unset, self._error = trace_pb2.Status(), trace_pb2.Status(code=trace_pb2.Status.STATUS_CODE_ERROR)

    def __call__(self, spans: Sequence[Span], shift: int) -> bytes:
        """Write a request; shift: see `SpanMaker.readable`."""
        request = type(self._empty)()
        request.CopyFrom(self._empty)
        add = request.resource_spans[0].scope_spans[0].spans.add
        for span in spans:
            add(
                name=span.name,
                start_time_unix_nano=int(span.start * 1e9) + shift,
                end_time_unix_nano=int(span.end * 1e9) + shift,
                parent_span_id=_bytes(span.parent)[1] if span.parent is not None else None,
                kind=self._kinds.Value(f"SPAN_KIND_{span.kind}"),
                attributes=[self._known(*pair) for pair in span.attributes.items()],
                links=[self._link(flags=_LOCAL, **_named(span.link))] if span.link is not None else (),
                status=self._error if span.failed else self._unset,
                flags=_REMOTE if span.is_remote else _LOCAL,
                **_named(span.own, span.state),
            )
        return bytes(request.SerializeToString())

    def _attribute(self, key: str, value: str | int) -> Any:
        made = self._value(int_value=value) if isinstance(value, int) else self._value(string_value=value)
        return self._key_value(key=key, value=made)


def _named(ids: Ids, state: TraceState | None = None) -> dict[str, Any]:
    trace, span = _bytes(ids)
    return {"trace_id": trace, "span_id": span, "trace_state": state.to_header() if state else ""}


def _bytes(ids: Ids) -> tuple[bytes, bytes]:
    return ids[0].to_bytes(16, "big"), ids[1].to_bytes(8, "big")


def _resource() -> Resource:
    """Return who is traced, as the environment says it, or else by this server's name."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415  an extra

    class Known(Resource):
        """Hashed by identity: the exporter asks for each span, and its own hash writes all of it as JSON."""

        __hash__ = object.__hash__

    who: dict[str, str | int] = {
        "service.name": "serving",
        "service.version": version("serving"),
        "process.pid": os.getpid(),
    }
    return Known({**who, **OTELResourceDetector().detect().attributes})
