"""One prediction over gRPC, from message bytes to message bytes: what `http_api.prediction` is for HTTP."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

from serving.access.access import Access
from serving.bodies.codec_pool import CodecPool, Job
from serving.deploy.canary_selection import CanarySelection
from serving.deploy.fleet import Fleet
from serving.deploy.shadow import Shadow
from serving.engine.model import Model
from serving.engine.request import Outcome, Request
from serving.errors import InferenceFailed, ServingError
from serving.grpc_api.call import Call
from serving.grpc_api.security import caller_of
from serving.grpc_api.status import FAULT
from serving.http2.hpack import Headers
from serving.metrics.metrics import Metrics
from serving.metrics.recorders import ModelMetrics
from serving.protocols.infer_codec import InferCodec, RawRequest, cut_up, decode_long, encode_long, opening_of, parsed
from serving.protocols.infer_tensors import Decoded
from serving.protocols.protobuf_wire import Parts
from serving.tensor_bytes import Buffer
from serving.tensors import Tensors

log = logging.getLogger("serving.grpc")

PROTOCOL = "grpc"
SMALL_BYTES = 2048
"""Messages up to it cost so little that nobody counts them."""
INLINE_BYTES = 64 * 1024
"""Messages with more typed contents or strings than this are read in the codec process, so that the loop turns."""
RAW_INLINE_BYTES = 2 * 1024 * 1024
"""Raw tensors of numbers above it are looked at on a thread: a look at each of so many takes half a millisecond."""
INLINE_ANSWER_BYTES = 64 * 1024
"""Outputs above it are written in the codec process where their contents are typed, or strings."""
RAW_INLINE_ANSWER_BYTES = 1024 * 1024
"""Raw numbers above it are sent as they lie."""
_MOST_NAMES = 1024

_raw_decoders = ThreadPoolExecutor(1, thread_name_prefix="grpc-decode")

Finish: TypeAlias = Callable[["bytes | Parts | ServingError"], None]


class Prepared(NamedTuple):
    """What calls need of one version of a model, kept on it."""

    wire: InferCodec
    metrics: ModelMetrics | None


class Prediction(Request):
    """Rows on their way; `finish` gets the response or the error, once, unless `cancel` came before.

    call: what it came by. allowed: seconds that its caller gives it; None: as many as its model does. seconds: how long
    it may take, from `began`. feature: decides, from the rows as `model` reads
    them, whether the candidate of a canary answers instead. shadow: gets a copy of what is answered.
    """

    __slots__ = (
        "allowed",
        "began",
        "call",
        "caller",
        "decoded",
        "feature",
        "finish",
        "finished",
        "identity",
        "job",
        "metrics",
        "model",
        "pool",
        "seconds",
        "shadow",
        "wire",
    )

    decoded: Decoded
    model: Model
    wire: InferCodec
    seconds: float

    def __init__(self, finish: Finish, call: Call, allowed: float | None, pool: CodecPool) -> None:
        self.began = time.monotonic()
        self.call = call
        self.caller: Hashable = None
        self.allowed = allowed
        self.finish = finish
        self.finished = False
        self.gone = False
        self.identity = b""
        self.metrics: ModelMetrics | None = None
        self.feature: CanarySelection | None = None
        self.pool = pool
        self.job: Job | None = None
        self.shadow: Shadow | None = None

    @property
    def sender(self) -> int:  # noqa: D102
        return id(self.call.connection)  # no reference: who is remembered may have gone

    def by(self, model: Model) -> None:
        """Let a version answer."""
        self.model = model
        seconds = model.limits.deadline_s
        self.seconds = seconds if self.allowed is None else min(seconds, self.allowed)
        self.wire, self.metrics = model.codecs[PROTOCOL]

    def read(self, reading: Callable[[InferCodec], Decoded]) -> Decoded:
        """Read the rows as the version that answers wants them. Raises ServingError."""
        decoded = reading(self.wire)
        split = self.feature
        if split is not None and split.feature is not None and split.takes(split.feature(decoded.inputs)):
            self.shadow = None
            self.by(split.candidate)
            decoded = reading(self.wire)
        return decoded

    def submit(self, decoded: Decoded) -> None:
        """Queue the rows; they are dropped where they still wait when their time is over. Raises ServingError."""
        self.decoded = decoded
        self.inputs, self.rows, _, _, timeout, self.priority = decoded
        self.deadline = self.began + (self.seconds if timeout is None else min(self.seconds, timeout))
        self.model.submit(self)

    def reply(self, outcome: Outcome) -> None:
        """Encode and finish."""
        if isinstance(outcome, ServingError):
            self.refuse(outcome)
            return
        size = sum([array.nbytes for array in outcome])
        if size > INLINE_ANSWER_BYTES and self.wire.slow_answer(self.decoded):
            given = (outcome, self.identity, self.decoded._replace(inputs=()))
            self.job = self.pool.submit(
                self,
                self.wire,
                encode_long,
                given,
                lambda made: self._answer(made if isinstance(made, ServingError) else [made], outcome),
            )
            return
        self._answer(self._encoded(outcome, in_parts=size > RAW_INLINE_ANSWER_BYTES), outcome)

    def _encoded(self, outputs: Tensors, *, in_parts: bool) -> bytes | Parts | ServingError:
        """Write the answer; an error, and a line in the log, where it can't be."""
        try:
            encode = self.wire.encode_in_parts if in_parts else self.wire.encode
            return encode(outputs, self.identity, self.decoded)
        except Exception:  # the reason is for the log: a caller learns nothing of our insides
            log.exception("an answer could not be encoded")
            return ServingError(FAULT)

    def _answer(self, response: bytes | Parts | ServingError, outputs: Tensors) -> None:
        if self.gone:
            return
        if isinstance(response, ServingError):
            unwritable = type(response) is ServingError
            self.refuse(InferenceFailed("the model's answer could not be written") if unwritable else response)
            return
        if self.metrics is not None:
            self.metrics.answered(PROTOCOL, self.rows, time.monotonic() - self.began)
        self.finished = True
        self.finish(response)
        if self.shadow is not None:
            self.shadow.offer(self.inputs, self.rows, outputs)

    def refuse(self, error: ServingError) -> None:
        """Count and finish."""
        if self.metrics is not None:
            self.metrics.refused(PROTOCOL, error, time.monotonic() - self.began)
        self.finished = True
        self.finish(error)

    def cancel(self) -> None:
        """Tell that the caller has left: rows that still wait are not run."""
        if not (self.gone or self.finished):
            self.gone = True
            if self.job is not None:
                self.pool.cancel(self.job)
            if self.metrics is not None:
                self.metrics.failed(PROTOCOL, "gone", time.monotonic() - self.began)

    def step(self, step: Callable[..., None], *given: Any) -> None:
        """Go on with what comes next, unless the caller has left; what fails is the answer."""
        if self.gone:
            return
        try:
            step(self, *given)
        except ServingError as error:
            self.refuse(error.bare())  # a step on a thread leaves it in its future, and its frames hold the request
        except Exception:  # a fault of ours must be answered, or the caller hangs
            log.exception("a request could not be read")
            self.refuse(ServingError(FAULT))


class Predictor:
    """Answers ModelInfer for all models of a fleet. Made before the fleet starts."""

    def __init__(self, fleet: Fleet, metrics: Metrics | None, pool: CodecPool, access: Access) -> None:
        self._fleet = fleet
        self._access = access
        self._metrics = metrics
        self._pool = pool
        self._names: dict[bytes, tuple[str, str | None]] = {}
        fleet.prepare.append(self._prepare)

    def _prepare(self, model: Model) -> None:
        metrics = self._metrics.model(model.name, model.version) if self._metrics is not None else None
        model.codecs[PROTOCOL] = Prepared(InferCodec(model.described), metrics)

    def start(self, request: Buffer, call: Call, finish: Finish) -> Prediction:
        """Begin a prediction; a bad request is finished before this returns."""
        prediction = Prediction(finish, call, call.time_remaining(), self._pool)
        prediction.step(self._start, request)
        return prediction

    def _start(self, prediction: Prediction, request: Buffer) -> None:
        cut = cut_up(request)
        if cut is not None:
            prediction.identity = cut.identity
            named = self._names.get(cut.head)
            if named is not None:
                self._choose(prediction, *named)
                wire = prediction.wire
                plan = wire.plan(cut)
                if plan is not None and len(request) <= (INLINE_BYTES if wire.slow_bytes else RAW_INLINE_BYTES):
                    if prediction.feature is None:
                        prediction.submit(wire.planned(request, cut, plan))
                    else:
                        prediction.submit(prediction.read(lambda chosen: chosen.read(request, cut)))
                    return
        elif len(request) > SMALL_BYTES and not (
            len(request) <= INLINE_BYTES and self._pool.may_work_here(2 * len(request))
        ):
            name, version, prediction.identity = opening_of(request)
            self._choose(prediction, name, version or None)
            self._read_long(prediction, request)
            return
        message = parsed(request, cut)
        self._named(prediction, message, cut)
        if len(request) <= (INLINE_BYTES if prediction.wire.slow_bytes else RAW_INLINE_BYTES):
            prediction.submit(prediction.read(lambda wire: wire.decode(message, request, cut)))
        elif prediction.wire.slow_bytes:
            self._read_long(prediction, request)
        else:
            loop = asyncio.get_running_loop()
            read = loop.run_in_executor(_raw_decoders, prediction.read, lambda wire: wire.decode(message, request, cut))
            read.add_done_callback(lambda done: prediction.step(_submit, done))

    def _read_long(self, prediction: Prediction, request: Buffer) -> None:
        """Have the rows read in the codec process, and submit them."""
        prediction.job = self._pool.submit(
            prediction,
            prediction.wire,
            decode_long,
            (pickle.PickleBuffer(request),),
            lambda found: prediction.step(self._long_read, request, found),
            deadline=prediction.began + prediction.seconds,
        )

    def _long_read(self, prediction: Prediction, request: Buffer, found: Decoded | ServingError) -> None:
        """Submit rows that were read, once the version that answers has read them."""
        if isinstance(found, ServingError):
            raise found
        split = prediction.feature
        if split is not None and split.feature is not None and split.takes(split.feature(found.inputs)):
            prediction.shadow = prediction.feature = None
            prediction.by(split.candidate)
            self._read_long(prediction, request)
        else:
            prediction.submit(found)

    def _named(self, prediction: Prediction, message: Any, cut: RawRequest | None) -> None:
        """Find the model that a message names, and keep what its head says."""
        prediction.identity = message.id.encode()
        name, version = message.model_name, message.model_version or None
        self._choose(prediction, name, version)
        if cut is not None:
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            self._names[cut.head] = name, version

    def _choose(self, prediction: Prediction, name: str, version: str | None) -> None:
        """Find the version that answers; a canary by feature is decided when the rows are read."""
        model = self._fleet.get(name, version)
        limits = model.limits
        if limits.callers is not None or limits.cache is not None:
            prediction.caller = caller_of(self._access, prediction.call.head.headers, limits.callers)
        if version is None:
            served = self._fleet.models[name]
            split = served.canary
            prediction.shadow = served.shadow
            if split is not None:
                if split.feature is not None:
                    prediction.feature = split
                elif split.takes(_key(split, prediction.call.head.headers)):
                    prediction.shadow = None
                    model = split.candidate
        prediction.by(model)


def _key(split: CanarySelection, headers: Headers) -> bytes | None:
    """Return what tells callers apart: an entry of the metadata, where the canary goes by one."""
    name = split.header
    return next((value for found, value in headers if found == name), None) if name is not None else None


def _submit(prediction: Prediction, reading: asyncio.Future[Decoded]) -> None:
    prediction.submit(reading.result())
