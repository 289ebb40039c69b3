"""One live version of a model: its session, its batcher, its signature."""

from __future__ import annotations

import asyncio
import logging
import math
import weakref
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from serving.engine import golden
from serving.engine.batcher import Batcher, Observer
from serving.engine.batching import Batching
from serving.engine.executor import Seen
from serving.engine.limits import Limits
from serving.engine.request import Request
from serving.engine.response_cache import ResponseCache
from serving.engine.sensitive import veiled
from serving.engine.session import WARM_S, OnnxSession, sample_of
from serving.engine.signature import Described, Signature
from serving.errors import InferenceFailed, InvalidRequest, ModelInvalid
from serving.heartbeat import Heartbeat, unrecorded
from serving.tensors import Tensors

log = logging.getLogger("serving.model")


class Recorder(Protocol):
    """Whoever keeps answers until it is known what was true."""

    @property
    def judges(self) -> bool:
        """Whether it is said of each outcome how right the answer was."""

    def keep(self, key: str, outputs: Tensors, rows: int) -> None:
        """Keep an answer. key: what its caller calls the request."""


class Model:
    """A loaded, warm version: a session that `load` made, which is slow and runs off the event loop, and its batcher.

    limits: the server's; batching: how requests run here, with what this version has of its own. seen_by: is shown
    requests and their answers, on the model's thread. recorder: keeps answers for outcomes that come later.
    """

    def __init__(
        self,
        name: str,
        version: str,
        session: OnnxSession,
        *,
        sha256: str,
        limits: Limits,
        batching: Batching,
        loop: asyncio.AbstractEventLoop,
        observer: Observer,
        heartbeat: Heartbeat | None = None,
        seen_by: Seen | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.sha256 = sha256
        self.limits = limits.of(batching.own)
        self.signature: Signature = veiled(session.signature, self.limits.sensitive)
        self.session = session
        self.example = session.example
        """One row that it has answered, or one that is like it where what it has is sensitive."""
        if self.example is not None and self.signature.example != session.signature.example:
            self.example = sample_of(self.signature, 1)
        self.codecs: dict[str, Any] = {}
        """What each dialect prepared for this version, by protocol; must hold no reference to it."""
        self.tap: Any = None
        """Whoever keeps a share of its requests: see `serving.capture`."""
        self.batching = batching
        self.sensitive = self._sensitive()
        """Features that are left out of whatever keeps requests; None where that is not known: it keeps nothing."""
        self.batched = batching.together and self.signature.batch == "dynamic"
        """Whether requests of different callers run together."""
        self.recorder = recorder
        self.batcher = Batcher(
            session.run,
            name=f"{name}-{version}",
            batched=self.batched,
            one_by_one=self.signature.batch == "one",
            uniform=all(-1 not in spec.shape[1:] for spec in self.signature.inputs) and not self.signature.optional,
            max_rows=self.limits.max_batch_rows,
            max_queued_rows=self.limits.max_queued_rows,
            max_delay=self.limits.max_delay if self.batched else 0.0,
            instances=self.limits.instances,
            loop=loop,
            observer=observer,
            seen_by=seen_by,
            open_record=unrecorded if heartbeat is None else lambda: heartbeat.open(name, version),
        )
        cache = self.limits.cache
        self.cache = None if cache is None else ResponseCache(self.batcher, cache, loop=loop, observer=observer)
        """Has answers that are given again, where its settings ask for that."""
        # Nothing on the way to or from this model is counted: whoever may still give it a request holds a reference,
        # and with the last one its threads end and its memory goes.
        weakref.finalize(self, self.batcher.abandon).atexit = False

    def _sensitive(self) -> frozenset[str] | None:
        marked = self.limits.sensitive | {feature.name for feature in self.signature.features if feature.sensitive}
        unknown = sorted(marked - {feature.name for feature in self.signature.features})
        if not unknown:
            return marked
        # A misspelt name would give away what it is to protect.
        names = ", ".join(unknown)
        log.error(
            "%s %s: nothing of its requests is kept: privacy.sensitive has no such feature: %s",
            self.name,
            self.version,
            names,
        )
        return None

    @property
    def described(self) -> Described:
        """What a codec is made of."""
        return Described(self.name, self.version, self.signature, self.batched)

    def submit(self, request: Request) -> None:
        """Queue a request for this version. Raises QueueFull, PayloadTooLarge or NotReady."""
        if self.cache is None:
            self.batcher.submit(request)
        else:
            self.cache.submit(request)

    def expire(self, now: float) -> None:
        """Answer those whose deadline passed while they wait; `now` in monotonic seconds."""
        if self.cache is not None:
            self.cache.expire(now)
        self.batcher.expire(now)


def load(path: Path, *, limits: Limits, prepared: Path | None = None, quiet: bool = False) -> OnnxSession:
    """Read, check and warm one ONNX file. Raises ModelInvalid; InvalidRequest where a provider can't run it, or answers
    its golden rows otherwise.

    prepared: the same model as `write_prepared` wrote it, which is loaded instead where it can be. quiet: others serve
    meanwhile, and have the processor first.
    """
    made = partial(
        OnnxSession,
        threads=limits.threads,
        exact_threads=limits.exact_threads,
        warm_rows=limits.warm_rows or limits.max_batch_rows,
        warm_s=WARM_S if limits.warm_rows is None else math.inf,
        quiet=quiet,
        memory_bytes=limits.memory_bytes,
        providers=limits.providers,
    )
    if prepared is not None and not limits.providers:  # its weights are packed for the processor
        try:
            return made(prepared, prepared=True)
        except ModelInvalid as error:  # it saves memory and time, and is never needed
            log.warning("a prepared form is not used: %s", error.message)
    if not limits.providers:
        return made(path)
    try:
        session = made(path)
        golden.check(session)  # the gate has compared what the processor answers
        return session
    except (ModelInvalid, InferenceFailed) as error:
        names = ", ".join(provider.name for provider in limits.providers)
        raise InvalidRequest(f"execution.providers: with {names} this model can't run: {error.message}") from None
