"""What is told of single requests: a line of the log for a share of them and for those that were slow, spans, a header.

Who asked which model, how it ended and where the time went; what was asked only where settings allow it.
"""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from serving.errors import ServingError
from serving.metrics.recorders import outcome_of
from serving.prediction.logged_row import row_of
from serving.prediction.spans import Described
from serving.prediction.tracing import Tracing, traceparent
from serving.protocols.headers import Headers

if TYPE_CHECKING:
    from serving.prediction.prediction import Prediction

log = logging.getLogger("serving.requests")

# Of gRPC, those that its conventions count as the server's own failures.
_FAILED = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


class Ended(NamedTuple):
    """What a transport knows of a request that has ended; size: bytes of the answer's body.

    route: the path template, or the method of gRPC. method: of HTTP, None over gRPC.
    """

    identity: bytes
    route: str
    status: int | str
    size: int
    method: str | None = "POST"


class _Chosen(NamedTuple):
    """A request of which something is told. began, now: monotonic seconds. context: of its spans. due: a line tells."""

    began: float
    headers: Headers
    now: float
    context: Any
    due: bool


class RequestLog:
    """Tells of requests.

    share: of all, from 0 to 1, get a line. slow_s: seconds from which on each gets one. features: lines have them.
    """

    def __init__(
        self, share: float, slow_s: float | None, tracing: Tracing | None = None, *, features: bool = False
    ) -> None:
        self._features = features
        self._share = share
        self._slow_s = slow_s if slow_s is not None else float("inf")
        self._tracing = tracing
        self._logs = bool(share) or slow_s is not None
        log.setLevel(logging.INFO)  # who asks for these lines gets them, whatever else is logged

    @classmethod
    def wanted(cls, share: float, slow_s: float | None, tracing: Tracing | None, *, features: bool) -> Self | None:
        """Make one where there is something to tell."""
        if not share and slow_s is None and tracing is None:
            return None
        return cls(share, slow_s, tracing, features=features)

    def ended(self, prediction: Prediction, error: ServingError | None, *, gone: bool = False) -> None:
        """Tell of a prediction, unless its transport does; error: what it ended in. gone: the caller left before."""
        prediction.outcome = "gone" if gone else "ok" if error is None else outcome_of(error)[0]
        chosen = self._chosen(prediction.began, prediction.headers)
        if chosen is not None and (ended := prediction.ended(error, gone=gone)) is not None:
            self._tell(ended, chosen, prediction)

    def asked(
        self,
        ended: Ended,
        began: float,
        headers: Headers,
        *,
        prediction: Prediction | None,
        model: str | None,
        caller: str | None,
    ) -> None:
        """Tell of any other request, or one whose transport knows more.

        began: monotonic seconds. caller: their name, where one was asked for.
        """
        chosen = self._chosen(began, headers)
        if chosen is not None:
            self._tell(ended, chosen, prediction, model, caller)

    def _chosen(self, began: float, headers: Headers) -> _Chosen | None:
        context = self._tracing.sampled(headers) if self._tracing is not None else None
        if context is None and not self._logs:
            return None
        now = time.monotonic()
        due = now - began >= self._slow_s or random.random() < self._share  # noqa: S311  which ones is no secret
        return _Chosen(began, headers, now, context, due) if due or context is not None else None

    def _tell(
        self,
        ended: Ended,
        chosen: _Chosen,
        prediction: Prediction | None,
        model: str | None = None,
        caller: str | None = None,
    ) -> None:
        version = outcome = None
        stages: list[tuple[str, float, float]] = []
        if prediction is not None:
            model, version = prediction.endpoint.model.name, prediction.endpoint.model.version
            caller, outcome = prediction.caller.name, prediction.outcome
            stages = stages_of(prediction, chosen.now)
        given = traceparent(chosen.headers)
        trace_id, span_id = given.split("-")[1] if given else None, None
        if chosen.context is not None and self._tracing is not None:
            facts = {"model.name": model, "model.version": version, "outcome": outcome, "principal": caller}
            trace_id, span_id = self._tracing.record(
                chosen.context,
                lambda: _described(ended, facts),
                began=chosen.began,
                ended=chosen.now,
                stages=stages,
                run=prediction.ran if prediction is not None else None,
            )
        if not chosen.due:
            return
        seconds = chosen.now - chosen.began
        fields: dict[str, object] = {
            "request_id": ended.identity.decode("latin-1"),
            "trace_id": trace_id,
            "span_id": span_id,
            "route": ended.route,
            "model": model,
            "version": version,
            "status": ended.status,
            "outcome": outcome,
            "ms": round(1000 * seconds, 3),
            "bytes": ended.size,
            "principal": caller,
        }
        fields |= {f"{stage}_ms": round(1000 * (end - start), 3) for stage, start, end in stages}
        if self._features and prediction is not None and getattr(prediction, "inputs", None) and prediction.rows == 1:
            fields["features"] = row_of(prediction.endpoint.model, prediction.inputs)
        if seconds < self._slow_s:
            log.info("request", extra={"fields": fields})
        else:
            log.warning("slow request", extra={"fields": fields})

    def close(self) -> None:
        """Export the spans that wait; for a thread, since it may take seconds."""
        if self._tracing is not None:
            self._tracing.close()


def _described(ended: Ended, facts: dict[str, str | None]) -> Described:
    """Describe a request by OpenTelemetry's conventions, and what they have no word for below `serving.`."""
    attributes: dict[str, str | int] = {"serving.request_id": ended.identity.decode("latin-1")}
    status = ended.status
    if isinstance(status, str):
        failed = status in _FAILED
        name = f"inference.GRPCInferenceService/{ended.route}"
        attributes |= {"rpc.system.name": "grpc", "rpc.method": name, "rpc.response.status_code": status}
    else:
        failed = status >= 500
        method = ended.method or ""
        attributes |= {"http.request.method": method, "http.route": ended.route, "http.response.status_code": status}
        name = f"{method} {ended.route}"
    if failed:
        attributes["error.type"] = str(status)
    attributes |= {f"serving.{fact}": value for fact, value in facts.items() if value is not None}
    return Described(name, attributes, failed)


def stages_of(prediction: Prediction, now: float) -> list[tuple[str, float, float]]:
    """Return the stages that it has come to, and when each began and ended: decode, queue, inference, encode.

    Monotonic seconds; the last ends `now`. Their sum is the whole, where it ran.
    """
    queued_at: float | None = getattr(prediction, "queued_at", None)  # not where a cache answered, or it was refused
    ran = prediction.ran
    stages = [] if queued_at is None else [("decode", prediction.began, queued_at)]
    if ran is not None:
        if queued_at is not None:
            stages.append(("queue", queued_at, ran.started))
        stages += [("inference", ran.started, ran.ended), ("encode", ran.ended, now)]
    return stages


def server_timing(prediction: Prediction) -> tuple[bytes, bytes]:
    """Return the header that tells of a prediction's stages, and all its time until now (W3C, Server Timing)."""
    now = time.monotonic()
    stages = [*stages_of(prediction, now), ("total", prediction.began, now)]
    told = ", ".join(f"{stage};dur={round(1000 * (end - start), 3)}" for stage, start, end in stages)
    return b"server-timing", told.encode()
