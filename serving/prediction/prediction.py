"""The one way of every prediction, whatever its transport: from a body to an answer.

A transport derives from `Prediction`, and says how an answer and an error leave. All that every prediction needs
(authorization, canary, limits, deadline, decoding, encoding, metrics, shadow) happens here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from serving.access.principal import ANYONE, Principal
from serving.bodies.codec_pool import Job
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, RateLimited, ServingError
from serving.prediction.authorization import authorize
from serving.prediction.endpoint import CanarySplit, Endpoint
from serving.prediction.explanation import Explainer, explained
from serving.prediction.request_id import request_id
from serving.prediction.request_log import Ended
from serving.prediction.request_options import DEFAULTS, RequestOptions
from serving.prediction.socket_loan import SocketLoan
from serving.protocols.codec import Decoded, Elsewhere, Later
from serving.protocols.headers import Headers, header
from serving.tensors import Array, Tensors

log = logging.getLogger("serving.prediction")

FAULT = "the server failed on this request; its log has the reason"
UNWRITABLE = InferenceFailed("the model's answer could not be written")

_raw_decoders = ThreadPoolExecutor(1, thread_name_prefix="decode")
"""For long raw tensors of numbers, which take no interpreter but are looked at."""

Then: TypeAlias = Callable[[Decoded | ServingError], None]


class Prediction(Request):
    """One prediction from body to answer: the request itself, so that it costs one object.

    `answer` or `refuse` is called once, on the event loop, unless `cancel` came before.
    """

    __slots__ = ("began", "caller", "context", "endpoint", "headers", "job", "loan", "options", "outcome", "size")

    endpoint: Endpoint
    headers: Headers
    options: RequestOptions
    caller: Principal
    began: float
    size: int
    """Bytes of the answer's body, where they are logged."""
    outcome: str
    """How it ended, as it is counted, where that is logged."""
    context: Any
    loan: SocketLoan | None
    """What the model's thread may answer with: see `DirectPrediction`."""
    job: Job | None
    """What the codec process has to do for it, or has done."""

    @abstractmethod
    def answer(self, response: Any) -> None:
        """Send what the codec of the endpoint made."""

    @abstractmethod
    def refuse(self, error: ServingError) -> None:
        """Send an error."""

    def ended(self, error: ServingError | None, *, gone: bool) -> Ended | None:
        """Say for the log how it ended; None where whoever started it logs it. See `RequestLog.ended`."""
        return None

    def request_id(self) -> bytes:
        """What the request is called; its caller's name for it, where there is one."""
        return request_id(header(self.headers, b"x-request-id"))

    def start(self, endpoint: Endpoint, headers: Headers, body: Any, options: RequestOptions = DEFAULTS) -> None:
        """Decode and submit. A bad request, or a stranger's, is answered before this returns."""
        self.headers = headers
        self.options = options
        self.caller = ANYONE
        self.done = False
        self.job = None
        self.loan = None
        self.ran = None
        self.began = time.monotonic()
        if endpoint.access is None and endpoint.canary is None:
            self.endpoint = endpoint
            self._decode(endpoint, body, self._submit)
        else:
            self._begin(endpoint, body)

    def _begin(self, endpoint: Endpoint, body: Any) -> None:
        self.endpoint = endpoint
        if endpoint.access is not None:
            try:
                limits = endpoint.model.limits
                self.caller = authorize(endpoint.access, self.headers, "predict", limits.callers)
                if self.caller.limit is not None:
                    self.caller.limit.take_request()
            except RateLimited as error:
                self._fail(error)
                return
            except ServingError as error:  # a stranger's: no count of the model's moves
                self.done = True
                self.refuse(error)
                if endpoint.log is not None:
                    endpoint.log.ended(self, error)
                return
        if endpoint.canary is not None:
            self._choose(endpoint.canary, body)
        else:
            self._decode(endpoint, body, self._submit)

    def _choose(self, canary: CanarySplit, body: Any) -> None:
        """Go on with one of two versions: by header before anything is decoded, by feature after."""
        selection, stable = canary.selection, canary.stable
        key_of = selection.feature
        if key_of is None:
            key = header(self.headers, selection.header) if selection.header is not None else None
            self._begin(canary.candidate if selection.takes(key) else stable, body)
            return
        self.endpoint = stable

        def decoded(found: Decoded | ServingError) -> None:
            if isinstance(found, ServingError) or not selection.takes(key_of(found.inputs)):
                self._submit(found)
            elif not self.done:
                self._begin(canary.candidate, body)

        self._decode(stable, body, decoded)

    def _decode(self, endpoint: Endpoint, body: Any, then: Then) -> None:
        """Read the body, here where that is quick; `then` gets what it is, or what is wrong with it."""
        codec = endpoint.codec
        try:
            found = codec.begin(self.headers, body, endpoint.spare, endpoint.max_text_bytes)
            if isinstance(found, Elsewhere):
                self._decode_elsewhere(endpoint, found, then)
                return
            if isinstance(found, Later):
                endpoint.pool.work_later(self, lambda: self._decode(endpoint, body, then))
                return
        except ServingError as error:
            then(error.bare())
            return
        except Exception:  # a fault of ours must be answered, or the caller hangs
            log.exception("a request could not be decoded")
            then(ServingError(FAULT))
            return
        then(found)

    def _decode_elsewhere(self, endpoint: Endpoint, decoding: Elsewhere, then: Then) -> None:
        if decoding.on_thread:
            reading = endpoint.loop.run_in_executor(_raw_decoders, decoding.work, endpoint.codec, *decoding.given)
            reading.add_done_callback(lambda done: then(_outcome(done)))
            return
        seconds = endpoint.deadline if self.options.timeout is None else min(endpoint.deadline, self.options.timeout)
        self.job = endpoint.pool.submit(
            self, endpoint.codec, decoding.work, decoding.given, then, deadline=self.began + seconds
        )

    def cancel(self) -> None:
        """Tell that the caller has left: rows that still wait are not run, and nothing is sent."""
        if not self.done:
            self.done = True
            endpoint = self.endpoint
            if self.job is not None:
                endpoint.pool.cancel(self.job)
            if endpoint.metrics is not None:
                endpoint.metrics.failed(endpoint.protocol, "gone", time.monotonic() - self.began)
            if endpoint.log is not None:
                endpoint.log.ended(self, None, gone=True)

    def _submit(self, decoded: Decoded | ServingError) -> None:
        if self.done:
            return
        if isinstance(decoded, ServingError):
            self._fail(decoded)
            return
        self.inputs, self.rows, self.context, timeout, priority, explain = decoded
        seconds = self.endpoint.deadline
        options = self.options
        self.priority = options.priority if priority is None else priority
        if timeout is not None:
            seconds = min(seconds, timeout)
        if options.timeout is not None:
            seconds = min(seconds, options.timeout)
        self.deadline = self.began + seconds
        try:
            if explain:
                self._explain()
                return
            if self.caller.limit is not None:
                self.caller.limit.take_rows(self.rows)
            self.endpoint.submit(self)
        except ServingError as error:
            self._fail(error)

    def _explain(self) -> None:
        """Answer with what features contribute, behind all other requests. Raises InvalidRequest."""
        endpoint = self.endpoint
        if endpoint.explainer is None:
            endpoint.explainer = Explainer(endpoint.model.signature)

        def finished(task: asyncio.Task[tuple[Tensors, Array]]) -> None:
            if self.done or task.cancelled():
                return
            error = task.exception()
            if error is None:
                outputs, contributions = task.result()
                self._encode((*outputs, contributions), outputs)
                return
            if not isinstance(error, ServingError):
                log.error("a prediction could not be explained", exc_info=error)
            self._fail(error if isinstance(error, ServingError) else ServingError(FAULT))

        endpoint.loop.create_task(explained(self, endpoint.explainer)).add_done_callback(finished)

    def key(self) -> str:
        """Return what the caller may call it by later: the id in the request itself, or the one that its answer has."""
        own = getattr(self.context, "identity", None)
        if own:
            return own if isinstance(own, str) else str(own, errors="replace")
        return self.request_id().decode("latin-1")

    def recover(self) -> bool:
        """Take back what was lent; return whether the answer is written."""
        return False

    def reply(self, outcome: Outcome) -> None:
        """Encode and send, unless the model's thread has done so."""
        if self.loan is not None and self.recover():
            return
        if isinstance(outcome, ServingError):
            self._fail(outcome)
            return
        self._encode(outcome, outcome)

    def _encode(self, shown: Tensors, outcome: Tensors) -> None:
        """Send an answer. shown: the outputs, with what features contribute where that was asked for."""
        endpoint = self.endpoint
        try:
            made = endpoint.codec.begin_answer(shown, self.context, self.headers, endpoint.spare)
        except Exception:  # one answer that can't be written must not take the batch's other answers along
            log.exception("an answer could not be encoded")
            made = UNWRITABLE
        if type(made) is tuple:  # as most are
            self.answer(made)
            self.answered(outcome)
        elif isinstance(made, Later):
            endpoint.pool.work_later(self, lambda: self._encode(shown, outcome))
        elif isinstance(made, Elsewhere):
            self.job = endpoint.pool.submit(
                self,
                endpoint.codec,
                made.work,
                made.given,
                lambda found: self._answer(UNWRITABLE if type(found) is ServingError else found, outcome),
            )
        else:
            self._answer(made, outcome)

    def _answer(self, response: Any, outputs: Tensors) -> None:
        if self.done:
            return
        if isinstance(response, ServingError):
            self._fail(response)
            return
        self.answer(response)
        self.answered(outputs)

    def answered(self, outputs: Tensors) -> None:
        """Count it among those that were answered, and let a shadow have what was asked."""
        self.done = True
        endpoint = self.endpoint
        metrics = endpoint.metrics
        if metrics is not None:
            now = time.monotonic()
            seconds = now - self.began
            metrics.answered(endpoint.protocol, self.rows, seconds)
            if self.ran is not None:  # else a cache answered
                metrics.stages(self.queued_at - self.began, now - self.ran.ended)
            if seconds > metrics.slowest:
                metrics.slow(seconds, header(self.headers, b"traceparent"))
        if endpoint.shadow is not None:
            endpoint.shadow.offer(self.inputs, self.rows, outputs)
        if endpoint.tap is not None and endpoint.tap.wants():
            endpoint.tap.take(self.request_id(), self.caller.name, self.inputs, self.rows, outputs)
        if endpoint.recorder is not None:
            endpoint.recorder.keep(self.key(), outputs, self.rows)
        if endpoint.log is not None:
            endpoint.log.ended(self, None)

    def _fail(self, error: ServingError) -> None:
        self.done = True
        endpoint = self.endpoint
        metrics = endpoint.metrics
        if metrics is not None:
            seconds = time.monotonic() - self.began
            metrics.refused(endpoint.protocol, error, seconds)
            if seconds > metrics.slowest:
                metrics.slow(seconds, header(self.headers, b"traceparent"))
        self.refuse(error)
        if endpoint.log is not None:
            endpoint.log.ended(self, error)


def _outcome(decoding: asyncio.Future[Decoded]) -> Decoded | ServingError:
    """Return what a thread read, or what is wrong with it."""
    try:
        return decoding.result()
    except ServingError as error:
        return error.bare()  # its frames hold the request
    except Exception:
        log.exception("a request could not be decoded")
        return ServingError(FAULT)
