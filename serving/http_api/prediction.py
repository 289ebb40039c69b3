"""The one way that every prediction over HTTP goes; fast path and ASGI route are thin over it.

A transport derives from `Call` and says in `finish` how an answer leaves. Everything that each prediction needs
(limits, deadline, metrics, encoding, errors) happens here.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from abc import abstractmethod
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from serving.access.access import Access
from serving.access.principal import ANYONE
from serving.bodies.codec_pool import CodecPool, Job
from serving.deploy.canary_selection import CanarySelection
from serving.deploy.shadow import Shadow
from serving.engine.model import Model
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, ServingError
from serving.http_api.answer import error_body, error_headers, status_of
from serving.http_api.request_options import NOTHING, RequestOptions
from serving.http_api.security import admit
from serving.metrics.recorders import ModelMetrics
from serving.protocols.codec import (
    INLINE_ANSWER_BYTES,
    INLINE_BYTES,
    LENGTH,
    MOST_BRACKETS,
    RAW_INLINE_BYTES,
    SLOW_INLINE_BYTES,
    SMALL_ANSWER_BYTES,
    SMALL_BYTES,
    Blobs,
    Codec,
    Decoded,
    Encoded,
    decode,
    decode_long,
    encode,
    encode_long,
    too_much_json,
)
from serving.protocols.headers import JSON, HeaderList, Headers, header
from serving.tensor_bytes import Buffer
from serving.tensors import Tensors

log = logging.getLogger("serving.prediction")

_raw_decoders = ThreadPoolExecutor(1, thread_name_prefix="decode")
"""For long raw tensors of numbers, which take no interpreter but are looked at."""


UNWRITABLE = InferenceFailed("the model's answer could not be written")


class Fork(NamedTuple):
    """Two targets of one path, neither forked again, and what decides between them."""

    split: CanarySelection
    stable: Endpoint
    candidate: Endpoint


class Endpoint:
    """A prediction path, with all that can be decided at load: model, dialect, metrics, deadline in seconds.

    fork: two versions share the path. shadow: gets copies of what is answered here. access: who
    may predict; None where anyone may, whatever becomes of the keys. pool: for long bodies and answers.
    max_json_bytes: of one body, or of its JSON. max_body_bytes: of one with raw tensors.
    """

    __slots__ = (
        "access",
        "codec",
        "deadline",
        "fork",
        "loop",
        "max_body_bytes",
        "max_json_bytes",
        "metrics",
        "model",
        "pool",
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
        pool: CodecPool,
        max_json_bytes: int,
        max_body_bytes: int,
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
        self.pool = pool
        self.max_json_bytes = max_json_bytes
        self.max_body_bytes = max_body_bytes


class Call(Request):
    """One prediction from body to answer: the request itself, so that it costs one object."""

    __slots__ = ("asks", "began", "caller", "context", "headers", "job", "target")

    asks: RequestOptions
    target: Endpoint
    headers: Headers
    began: float
    context: Any
    job: Job | None
    """What the codec process has to do for it, or has done."""

    @abstractmethod
    def finish(self, status: int, headers: HeaderList, body: bytes | Blobs, kind: bytes = JSON) -> None:
        """Send the answer of content type `kind`; called once, on the event loop, unless `cancel` came before."""

    def start(self, target: Endpoint, headers: Headers, body: Buffer, asks: RequestOptions = NOTHING) -> None:
        """Decode and submit. A bad request, or a stranger's, is answered before this returns."""
        self.asks = asks
        self.headers = headers
        self.caller: Hashable = ANYONE
        self.gone = False
        self.job = None
        self.began = time.monotonic()
        self._go(target, body)

    def _go(self, target: Endpoint, body: Buffer) -> None:
        self.target = target
        headers = self.headers
        if target.access is not None:
            try:
                self.caller = admit(target.access, headers, "predict", target.model.limits.callers)
            except ServingError as error:  # a stranger's: no count of the model's moves
                self.finish(status_of(error, target.protocol), error_headers(error), error_body(error))
                return
        if target.fork is not None:
            self._choose(target.fork, body)
            return
        self._decode(target, body, self._submit)

    def _choose(self, fork: Fork, body: Buffer) -> None:
        """Go on with one of two versions: by header before anything is decoded, by feature after."""
        split, stable = fork.split, fork.stable
        key_of = split.feature
        if key_of is None:
            key = header(self.headers, split.header) if split.header is not None else None
            self._go(fork.candidate if split.takes(key) else stable, body)
            return
        self.target = stable

        def decoded(found: Decoded | ServingError) -> None:
            if isinstance(found, ServingError) or not split.takes(key_of(found.inputs)):
                self._submit(found)
            elif not self.gone:
                self._go(fork.candidate, body)

        self._decode(stable, body, decoded)

    def _decode(self, target: Endpoint, body: Buffer, then: Callable[[Decoded | ServingError], None]) -> None:
        """Read the body, here where that is quick; `then` gets what it is, or what is wrong with it."""
        if len(body) <= SMALL_BYTES:
            then(decode(target.codec, self.headers, body))
            return
        length = header(self.headers, LENGTH) if target.codec.raw_tensors else None
        text = len(body) if length is None else min(int(length[:12]), len(body)) if length.isdigit() else 0
        if text <= SLOW_INLINE_BYTES and length is not None and not target.codec.slow_bytes:
            if len(body) <= RAW_INLINE_BYTES:
                then(decode(target.codec, self.headers, body))
                return
            decoding = target.loop.run_in_executor(_raw_decoders, decode, target.codec, self.headers, body)
            decoding.add_done_callback(lambda done: then(done.result()))
            return
        if (found := _here(target, self.headers, body, text=length is None)) is not None:
            then(found)
            return
        seconds = min(target.deadline, self.asks.timeout or target.deadline)
        headers = [] if length is None else [(LENGTH, length)]
        try:
            if text > target.max_json_bytes:
                raise too_much_json(text, target.max_json_bytes)
            self.job = target.pool.submit(
                self,
                target.codec,
                decode_long,
                (headers, pickle.PickleBuffer(body)),
                then,
                deadline=self.began + seconds,
            )
        except ServingError as error:
            then(error)

    def cancel(self) -> None:
        """Tell that the caller has left: rows that still wait are not run, and `finish` is never called."""
        if not self.gone:
            self.gone = True
            if self.job is not None:
                self.target.pool.cancel(self.job)
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
        size = sum([array.nbytes for array in outcome])
        accepted = header(self.headers, b"accept-encoding") if size > SMALL_ANSWER_BYTES else None
        if (
            size > SMALL_ANSWER_BYTES
            and (accepted is not None or self.target.codec.slow_answer(self.context))
            and not (size <= INLINE_ANSWER_BYTES and self.target.pool.may_work_here(2 * size))
        ):
            given = (outcome, self.context, accepted)
            self.job = self.target.pool.submit(
                self,
                self.target.codec,
                encode_long,
                given,
                lambda made: self._answer(UNWRITABLE if type(made) is ServingError else made, outcome),
            )
            return
        self._answer(self._encoded(outcome), outcome)

    def _encoded(self, outputs: Tensors) -> Encoded | ServingError:
        try:
            return encode(self.target.codec, outputs, self.context, header(self.headers, b"accept-encoding"))
        except Exception:  # one answer that can't be written must not take the batch's other answers along
            log.exception("an answer could not be encoded")
            return UNWRITABLE

    def _answer(self, encoded: Encoded | ServingError, outputs: Tensors) -> None:
        if self.gone:
            return
        if isinstance(encoded, ServingError):
            self._refuse(encoded)
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


def _here(target: Endpoint, headers: Headers, body: Buffer, *, text: bool) -> Decoded | ServingError | None:
    """Read a body on the event loop where its bytes, brackets and company say that it takes little; else None."""
    size = len(body)
    if size > INLINE_BYTES:
        return None
    body = bytes(body)
    if body.count(b"{") + body.count(b"[") > MOST_BRACKETS:
        return None
    if text and target.pool.may_work_here(size):
        try:
            quick = target.codec.quick(body)
        except ServingError as error:
            return error.bare()
        if quick is not None:
            return quick
    # The long way takes up to eight times as long.
    if size <= SLOW_INLINE_BYTES and target.pool.may_work_here(8 * size):
        return decode(target.codec, headers, body)
    return None
