"""One way to ask one model: all that can be decided when it is loaded, so that a request costs one look-up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from serving.access.access import Access
from serving.bodies.codec_pool import CodecPool
from serving.capture.capture import Tap
from serving.deploy.canary_selection import CanarySelection
from serving.deploy.shadow import Shadow
from serving.engine.model import Model, Recorder
from serving.engine.request import Request
from serving.metrics.recorders import ModelMetrics
from serving.prediction.request_log import RequestLog
from serving.protocols.codec import Codec, Spare

if TYPE_CHECKING:  # which asks endpoints itself
    from serving.prediction.explanation import Explainer


class CanarySplit(NamedTuple):
    """Two endpoints of one name, neither split again, and what decides between them."""

    selection: CanarySelection
    stable: Endpoint
    candidate: Endpoint


@dataclass(slots=True, eq=False)
class Endpoint:
    """A version of a model as one protocol asks it.

    route: the path template, or the method. access: who may predict; None where anyone may, or where that was asked
    before. deadline: seconds. pool: for long bodies and answers. max_text_bytes: of one body of JSON, or of its JSON;
    max_body_bytes: of one with raw tensors. canary: two versions share the name. shadow: gets copies of what is
    answered here. log: of requests, None for none. timing: whether answers over HTTP say where their time went.
    """

    model: Model
    codec: Codec
    route: str
    metrics: ModelMetrics | None
    access: Access | None
    deadline: float
    loop: asyncio.AbstractEventLoop
    pool: CodecPool
    max_text_bytes: int
    max_body_bytes: int
    canary: CanarySplit | None = None
    shadow: Shadow | None = None
    log: RequestLog | None = None
    timing: bool = False
    told: bool = field(init=False)
    """Whether anything is told of single requests."""
    tap: Tap | None = field(init=False)
    """Keeps a share of requests."""
    protocol: str = field(init=False)
    submit: Callable[[Request], None] = field(init=False)
    spare: Spare = field(init=False)
    recorder: Recorder | None = field(init=False)
    explainer: Explainer | None = field(init=False, default=None)
    """Made when somebody first asks for it."""

    def __post_init__(self) -> None:
        self.protocol = self.codec.protocol
        self.told = self.timing or self.log is not None
        self.tap = self.model.tap
        self.recorder = self.model.recorder
        self.spare = self.pool.may_work_here
        # Without a call between: this is done for each request.
        self.submit = self.model.submit if self.model.cache is not None else self.model.batcher.submit
