"""What is told of single requests: a line of the log for a share of them and for those that were slow, or a header.

Who asked which model, how it ended and where the time went; never what was asked or answered.
"""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING, NamedTuple, Self

from serving.errors import ServingError

if TYPE_CHECKING:
    from serving.prediction.prediction import Prediction

log = logging.getLogger("serving.requests")


class Ended(NamedTuple):
    """What a transport knows of a request that has ended; size: bytes of the answer's body."""

    identity: bytes
    route: str
    status: int | str
    size: int


class RequestLog:
    """share: of all requests, from 0 to 1, get a line. slow_s: seconds from which on each gets one, with its stages."""

    def __init__(self, share: float, slow_s: float | None) -> None:
        self._share = share
        self._slow_s = slow_s if slow_s is not None else float("inf")
        log.setLevel(logging.INFO)  # who asks for these lines gets them, whatever else is logged

    @classmethod
    def wanted(cls, share: float, slow_s: float | None) -> Self | None:
        """Make one where there is something to log."""
        return cls(share, slow_s) if share or slow_s is not None else None

    def ended(self, prediction: Prediction, error: ServingError | None, *, gone: bool = False) -> None:
        """Log a prediction, unless its transport does; error: what it ended in. gone: the caller left before that."""
        seconds = time.monotonic() - prediction.began
        if self._due(seconds) and (ended := prediction.ended(error, gone=gone)) is not None:
            self._write(ended, seconds, prediction, None, None)

    def asked(
        self, ended: Ended, seconds: float, prediction: Prediction | None, model: str | None, caller: str | None
    ) -> None:
        """Log any other request, or one whose transport knows more. caller: their name, where one was asked for."""
        if self._due(seconds):
            self._write(ended, seconds, prediction, model, caller)

    def _due(self, seconds: float) -> bool:
        return seconds >= self._slow_s or random.random() < self._share  # noqa: S311  which ones is no secret

    def _write(
        self, ended: Ended, seconds: float, prediction: Prediction | None, model: str | None, caller: str | None
    ) -> None:
        version = None
        if prediction is not None:
            model, version = prediction.endpoint.model.name, prediction.endpoint.model.version
            caller = prediction.caller.name
        fields: dict[str, object] = {
            "request_id": ended.identity.decode("latin-1"),
            "route": ended.route,
            "model": model,
            "version": version,
            "status": ended.status,
            "ms": round(1000 * seconds, 3),
            "bytes": ended.size,
            "principal": caller,
        }
        if seconds < self._slow_s:
            log.info("request", extra={"fields": fields})
        else:
            stages = stages_of(prediction) if prediction is not None else {}
            log.warning("slow request", extra={"fields": fields | {f"{name}_ms": ms for name, ms in stages.items()}})


def stages_of(prediction: Prediction) -> dict[str, float]:
    """Return how many milliseconds each stage took that it has come to: decode, queue, inference."""
    stages: dict[str, float] = {}
    queued_at: float | None = getattr(prediction, "queued_at", None)  # not where a cache answered, or it was refused
    if queued_at is not None:
        stages["decode"] = round(1000 * (queued_at - prediction.began), 3)
    if prediction.ran is not None:
        started, ended = prediction.ran
        if queued_at is not None:
            stages["queue"] = round(1000 * (started - queued_at), 3)
        stages["inference"] = round(1000 * (ended - started), 3)
    return stages


def server_timing(prediction: Prediction) -> tuple[bytes, bytes]:
    """Return the header that tells of a prediction's stages, and all its time until now (W3C, Server Timing)."""
    stages = stages_of(prediction) | {"total": round(1000 * (time.monotonic() - prediction.began), 3)}
    return b"server-timing", ", ".join(f"{name};dur={ms}" for name, ms in stages.items()).encode()
