"""The one way that every prediction over HTTP goes; lane and ASGI route are two thin doors to it.

A door hands over the path's target, the headers and the body, and a `finish` that is called exactly once, on the
event loop. Everything that each prediction needs (limits, deadline, metrics, encoding, errors) happens here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from serving.engine.model import Model
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, ServingError, SignatureMismatch
from serving.http_api.answer import (
    GZIP_FROM,
    HeaderList,
    Headers,
    accepts_gzip,
    compressed,
    error_body,
    error_headers,
    header,
    outcome_of,
    reason_of,
    status_of,
)
from serving.http_api.codec import INLINE_BYTES, Codec, Decoded
from serving.metrics import ModelMetrics

log = logging.getLogger("serving.prediction")

Finish: TypeAlias = Callable[[int, HeaderList, bytes], None]

_decoders = ThreadPoolExecutor(1, thread_name_prefix="decode")


class Target:
    """A prediction path, with all that can be decided at load: model, dialect, metrics, deadline."""

    __slots__ = ("codec", "deadline", "loop", "metrics", "model", "protocol", "template")

    def __init__(
        self,
        model: Model,
        codec: Codec,
        *,
        template: str,
        metrics: ModelMetrics | None,
        deadline: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.model = model
        self.codec = codec
        self.protocol = codec.protocol
        self.template = template
        self.metrics = metrics
        self.deadline = deadline
        self.loop = loop


class Call:
    """One prediction from body to answer. `cancel` tells that the caller has left."""

    __slots__ = ("_began", "_decoded", "_finish", "_gzip", "_left", "_request", "_target")

    def __init__(self, target: Target, headers: Headers, body: bytes | bytearray, finish: Finish) -> None:
        self._target = target
        self._finish = finish
        self._began = time.monotonic()
        self._request: Request | None = None
        self._left = False
        self._gzip = accepts_gzip(header(headers, b"accept-encoding"))
        if len(body) > INLINE_BYTES:
            decoding = target.loop.run_in_executor(_decoders, _decode, target.codec, headers, body)
            decoding.add_done_callback(lambda done: self._submit(done.result()))
        else:
            self._submit(_decode(target.codec, headers, body))

    def cancel(self) -> None:
        """Tell that the caller has left: rows that still wait are not run, and `finish` is never called."""
        self._left = True
        request = self._request
        if request is not None and not request.gone:
            request.gone = True
            if self._target.metrics:
                self._target.metrics.predicted(self._target.protocol, "gone", 0, time.monotonic() - self._began)

    def _submit(self, decoded: Decoded | ServingError) -> None:
        if self._left:
            return
        if isinstance(decoded, ServingError):
            self._refuse(decoded)
            return
        self._decoded = decoded
        request = Request(decoded.inputs, decoded.rows, self._began + self._target.deadline, self._reply)
        self._request = request
        try:
            self._target.model.submit(request)
        except ServingError as error:
            self._refuse(error)

    def _reply(self, outcome: Outcome) -> None:
        if isinstance(outcome, ServingError):
            self._refuse(outcome)
            return
        target = self._target
        try:
            body = target.codec.encode(outcome, self._decoded)
        except Exception:  # one answer that can't be written must not take the batch's other answers along
            log.exception("an answer could not be encoded")
            self._refuse(InferenceFailed("the model's answer could not be written"))
            return
        headers: HeaderList = []
        if len(body) >= GZIP_FROM:
            headers.append((b"vary", b"accept-encoding"))
            if self._gzip:
                body = compressed(body)
                headers.append((b"content-encoding", b"gzip"))
        if target.metrics:
            target.metrics.predicted(target.protocol, "ok", self._decoded.rows, time.monotonic() - self._began)
        self._request = None
        self._finish(200, headers, body)

    def _refuse(self, error: ServingError) -> None:
        target = self._target
        if target.metrics:
            outcome = outcome_of(error)
            target.metrics.predicted(target.protocol, outcome, 0, time.monotonic() - self._began)
            if outcome in ("rejected", "expired"):
                target.metrics.rejected(reason_of(error))
            if isinstance(error, SignatureMismatch):
                for detail in error.details:
                    if detail.feature:
                        target.metrics.invalid(detail.feature)
        self._request = None
        self._finish(status_of(error, target.protocol), error_headers(error), error_body(error))


def _decode(codec: Codec, headers: Headers, body: bytes | bytearray) -> Decoded | ServingError:
    try:
        return codec.decode(headers, body)
    except ServingError as error:
        return error
