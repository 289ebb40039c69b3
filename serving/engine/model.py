"""One live version of a model: its session, its batcher, its signature."""

from __future__ import annotations

import asyncio
import logging
import weakref
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from serving.engine.batcher import Batcher, Observer
from serving.engine.batching import Batching
from serving.engine.request import Request
from serving.engine.session import OnnxSession
from serving.engine.signature import Described, Signature
from serving.errors import ModelInvalid
from serving.heartbeat import Heartbeat, unrecorded

log = logging.getLogger("serving.model")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one model may take; rows, seconds, threads and bytes.

    memory_bytes: see `OnnxSession`.
    """

    max_batch_rows: int = 512
    max_queued_rows: int = 4096
    max_delay: float = 0.0
    instances: int = 1
    threads: int = 1
    memory_bytes: int | None = None

    def of(self, batching: Batching) -> Limits:
        """Return those of a version with settings of its own."""
        return replace(
            self,
            max_batch_rows=batching.max_rows or self.max_batch_rows,
            max_delay=self.max_delay if batching.max_delay_s is None else batching.max_delay_s,
            instances=batching.instances or self.instances,
            memory_bytes=batching.memory_bytes or self.memory_bytes,
        )


class Model:
    """A loaded, warm version: a session that `load` made, which is slow and runs off the event loop, and its batcher.

    limits: the server's; batching: how requests run here, with what this version has of its own.
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
        box: Heartbeat | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.sha256 = sha256
        self.signature: Signature = session.signature
        self.session = session
        self.codecs: dict[str, Any] = {}
        """What each dialect prepared for this version, by protocol; must hold no reference to it."""
        self.batching = batching
        self.limits = limits.of(batching)
        self.batched = batching.together and self.signature.batch == "dynamic"
        """Whether requests of different callers run together."""
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
            open_record=unrecorded if box is None else lambda: box.open(name, version),
        )
        # Nothing on the way to or from this model is counted: whoever may still give it a request holds a reference,
        # and with the last one its threads end and its memory goes.
        weakref.finalize(self, self.batcher.abandon).atexit = False

    @property
    def described(self) -> Described:
        """What a codec is made of."""
        return Described(self.name, self.version, self.signature, self.batched)

    def submit(self, request: Request) -> None:
        """Queue a request for this version. Raises QueueFull, PayloadTooLarge or NotReady."""
        self.batcher.submit(request)


def load(path: Path, *, limits: Limits, prepared: Path | None = None, quiet: bool = False) -> OnnxSession:
    """Read, check and warm one ONNX file. Raises ModelInvalid.

    prepared: the same model as `write_prepared` wrote it, which is loaded instead where it can be. quiet: others serve
    meanwhile, and have the processor first.
    """
    made = partial(
        OnnxSession,
        threads=limits.threads,
        warm_rows=limits.max_batch_rows,
        quiet=quiet,
        memory_bytes=limits.memory_bytes,
    )
    if prepared is not None:
        try:
            return made(prepared, prepared=True)
        except ModelInvalid as error:  # it saves memory and time, and is never needed
            log.warning("a prepared form is not used: %s", error.message)
    return made(path)
