"""The one way that every prediction over HTTP goes; lane and ASGI route are two thin doors to it.

A door derives from `Call` and says in `finish` how an answer leaves. Everything that each prediction needs (limits,
deadline, metrics, encoding, errors) happens here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

from serving.access.access import Access
from serving.engine.model import Model
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, ServingError
from serving.fleet.shadow import Shadow
from serving.fleet.split import Split
from serving.http_api.answer import (
    BINARY,
    COMPRESS_FROM,
    JSON,
    HeaderList,
    Headers,
    accepted_coding,
    compressed,
    error_body,
    error_headers,
    header,
    status_of,
)
from serving.http_api.asks import NOTHING, Asks
from serving.http_api.codec import (
    INLINE_ANSWER_BYTES,
    INLINE_BYTES,
    LENGTH,
    RAW_INLINE_BYTES,
    Blobs,
    Codec,
    Decoded,
    Mixed,
)
from serving.http_api.security import admit
from serving.metrics.gathered import ModelMetrics
from serving.tensor_bytes import Buffer
from serving.tensors import Tensors

log = logging.getLogger("serving.prediction")

NO_HEADERS: HeaderList = []

_decoders = ThreadPoolExecutor(1, thread_name_prefix="decode")
_encoders = ThreadPoolExecutor(1, thread_name_prefix="encode")
Encoded: TypeAlias = tuple[bytes | Blobs, HeaderList, bytes]
"""Body, headers and content type of an answer."""


class Fork(NamedTuple):
    """Two targets of one path, neither forked again, and what decides between them."""

    split: Split
    stable: Target
    candidate: Target


class Target:
    """A prediction path, with all that can be decided at load: model, dialect, metrics, deadline in seconds.

    fork: two versions share the path. shadow: gets copies of what is answered here. access: who
    may predict; None where anyone may, whatever becomes of the keys.
    """

    __slots__ = (
        "access",
        "codec",
        "deadline",
        "fork",
        "loop",
        "metrics",
        "model",
        "protocol",
        "shadow",
        "submit",
        "template",
    )

    def __init__(
        self,
        model: Model,
        codec: Codec,
        *,
        template: str,
        metrics: ModelMetrics | None,
        access: Access | None,
        deadline: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.model = model
        self.fork: Fork | None = None
        self.shadow: Shadow | None = None
        self.submit = model.submit
        self.codec = codec
        self.protocol = codec.protocol
        self.template = template
        self.metrics = metrics
        self.access = access
        self.deadline = deadline
        self.loop = loop


class Call(Request):
    """One prediction from body to answer: the request itself, so that it costs one object."""

    __slots__ = ("asks", "began", "context", "headers", "target")

    asks: Asks
    target: Target
    headers: Headers
    began: float
    context: Any

    @abstractmethod
    def finish(self, status: int, headers: HeaderList, body: bytes | Blobs, kind: bytes = JSON) -> None:
        """Send the answer of content type `kind`; called once, on the event loop, unless `cancel` came before."""

    def start(self, target: Target, headers: Headers, body: Buffer, asks: Asks = NOTHING) -> None:
        """Decode and submit. A bad request, or a stranger's, is answered before this returns."""
        self.asks = asks
        self.target = target
        self.headers = headers
        self.gone = False
        self.began = time.monotonic()
        if target.access is not None:
            try:
                admit(target.access, headers, "predict")
            except ServingError as error:  # a stranger's: no count of the model's moves
                self.finish(status_of(error, target.protocol), error_headers(error), error_body(error))
                return
        if target.fork is not None:
            self._choose(target.fork, headers, body)
            return
        size = len(body)
        if size > INLINE_BYTES and (
            size > RAW_INLINE_BYTES or target.codec.slow_bytes or header(headers, LENGTH) is None
        ):
            decoding = target.loop.run_in_executor(_decoders, _decode, target.codec, headers, body)
            decoding.add_done_callback(lambda done: self._submit(done.result()))
            return
        self._submit(_decode(target.codec, headers, body))

    def _choose(self, fork: Fork, headers: Headers, body: Buffer) -> None:
        """Go on with one of two versions: by header before anything is decoded, by feature after."""
        split, stable = fork.split, fork.stable
        key_of = split.feature
        if key_of is None:
            key = header(headers, split.header) if split.header is not None else None
            self.start(fork.candidate if split.takes(key) else stable, headers, body, self.asks)
            return
        self.target = stable

        def decoded(found: Decoded | ServingError) -> None:
            if isinstance(found, ServingError) or not split.takes(key_of(found.inputs)):
                self._submit(found)
            elif not self.gone:
                self.start(fork.candidate, headers, body, self.asks)

        if len(body) > INLINE_BYTES:
            decoding = stable.loop.run_in_executor(_decoders, _decode, stable.codec, headers, body)
            decoding.add_done_callback(lambda done: decoded(done.result()))
            return
        decoded(_decode(stable.codec, headers, body))

    def cancel(self) -> None:
        """Tell that the caller has left: rows that still wait are not run, and `finish` is never called."""
        if not self.gone:
            self.gone = True
            if self.target.metrics:
                self.target.metrics.failed(self.target.protocol, "gone", time.monotonic() - self.began)

    def _submit(self, decoded: Decoded | ServingError) -> None:
        if self.gone:
            return
        if isinstance(decoded, ServingError):
            self._refuse(decoded)
            return
        self.inputs, self.rows, self.context, timeout, priority = decoded
        seconds = self.target.deadline
        asks = self.asks
        self.priority = asks.priority if priority is None else priority
        if timeout is not None or asks is not NOTHING:
            seconds = min(seconds, timeout or seconds, asks.timeout or seconds)
        self.deadline = self.began + seconds
        try:
            self.target.submit(self)
        except ServingError as error:
            self._refuse(error)

    def reply(self, outcome: Outcome) -> None:
        """Encode and finish."""
        if isinstance(outcome, ServingError):
            self._refuse(outcome)
            return
        if sum([array.nbytes for array in outcome]) > INLINE_ANSWER_BYTES and (
            self.target.codec.slow_answer(self.context) or header(self.headers, b"accept-encoding") is not None
        ):
            writing = self.target.loop.run_in_executor(_encoders, self._encoded, outcome)
            writing.add_done_callback(lambda done: self._answer(done.result(), outcome))
            return
        self._answer(self._encoded(outcome), outcome)

    def _encoded(self, outputs: Tensors) -> Encoded | None:
        """Write the answer, compressed for who wants that; None, and a line in the log, where it can't be."""
        try:
            made = self.target.codec.encode(outputs, self.context)
            if isinstance(made, bytes):
                if len(made) < COMPRESS_FROM:
                    return made, NO_HEADERS, JSON
            elif isinstance(made, Mixed) and isinstance(made.body, bytes) and len(made.body) < COMPRESS_FROM:
                return made.body, made.headers, BINARY
            return self._dressed(made)
        except Exception:  # one answer that can't be written must not take the batch's other answers along
            log.exception("an answer could not be encoded")
            return None

    def _dressed(self, made: bytes | Blobs | Mixed) -> Encoded:
        headers: HeaderList = []
        body: bytes | Blobs
        if isinstance(made, Mixed):
            headers += made.headers
            kind, body = BINARY, made.body
        else:
            kind, body = JSON, made
        if (body.size if isinstance(body, Blobs) else len(body)) >= COMPRESS_FROM:
            headers.append((b"vary", b"accept-encoding"))
            coding = accepted_coding(header(self.headers, b"accept-encoding"))
            if coding is not None:
                parts = compressed(body.pieces() if isinstance(body, Blobs) else [body], coding)
                body = Blobs(sum(map(len, parts)), parts)
                headers.append((b"content-encoding", coding))
        return body, headers, kind

    def _answer(self, encoded: Encoded | None, outputs: Tensors) -> None:
        if self.gone:
            return
        if encoded is None:
            self._refuse(InferenceFailed("the model's answer could not be written"))
            return
        target = self.target
        if target.metrics is not None:
            target.metrics.answered(target.protocol, self.rows, time.monotonic() - self.began)
        self.finish(200, encoded[1], encoded[0], encoded[2])
        if target.shadow is not None:
            target.shadow.offer(self.inputs, self.rows, outputs)

    def _refuse(self, error: ServingError) -> None:
        target = self.target
        if target.metrics:
            target.metrics.refused(target.protocol, error, time.monotonic() - self.began)
        self.finish(status_of(error, target.protocol), error_headers(error), error_body(error))


def _decode(codec: Codec, headers: Headers, body: Buffer) -> Decoded | ServingError:
    try:
        return codec.decode(headers, body)
    except ServingError as error:
        return error.bare()
    except Exception:  # a fault of ours must be answered, or the caller hangs
        log.exception("a request could not be decoded")
        return ServingError("the server failed on this request; its log has the reason")
