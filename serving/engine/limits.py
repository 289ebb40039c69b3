"""How much one model may take, and how it runs: what the server's settings say, and what one model has of its own."""

from __future__ import annotations

from pydantic import ConfigDict, Field, model_validator

from serving.documented import Documented
from serving.engine.providers import Provider

LEAST_MODEL_MEMORY = 1024 * 1024
"""Least that a model may be given to run in, in bytes."""


class _Frozen(Documented):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Table(Documented):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CacheSize(_Table):
    """`[cache]` of model.toml: how much a response cache of one version holds in one worker."""

    entries: int | None = Field(None, ge=1)
    """Answers that each version keeps in each worker; exactly one of both keys switches the cache on."""
    bytes: int | None = Field(None, ge=64 * 1024)
    """Bytes of requests and answers that it keeps instead."""

    @model_validator(mode="after")
    def _one(self) -> CacheSize:
        if (self.entries is None) == (self.bytes is None):
            raise ValueError("exactly one of entries and bytes")
        return self

    def __str__(self) -> str:
        return f"{self.entries} entries" if self.bytes is None else f"{self.bytes} bytes"


class Drift(_Table):
    """`[drift]` of model.toml: how rows are compared with the reference."""

    enabled: bool = True
    """Compare the model's rows with the reference, whatever the server's settings say."""
    window_rows: int = Field(1000, ge=100, le=10_000_000)
    """Rows, over all workers, that are compared at a time."""
    learn_rows: int | None = Field(None, ge=100, le=100_000)
    """Take the first so many rows for the reference, in place of the one in the file."""

    def __str__(self) -> str:
        if not self.enabled:
            return "off"
        learned = f", by the first {self.learn_rows} rows" if self.learn_rows else ""
        return f"in windows of {self.window_rows} rows{learned}"


COMPARED = Drift()


class Feedback(_Table):
    """`[feedback]` of model.toml; that it is there switches it on."""

    keep: int = Field(100_000, ge=100, le=10_000_000)
    """Rows predicted that are kept to be joined with their outcomes; the oldest go first."""
    window: int = Field(1000, ge=20, le=100_000)
    """Outcomes of a version from which its live quality is computed."""
    largest_error: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Of a regressor: so great an error is wholly wrong, half of it half, when a canary's outcomes are compared."""

    def __str__(self) -> str:
        return f"for {self.keep} rows, quality of {self.window} outcomes"


class Limits(_Frozen):
    """How much a model may take, and how it runs; rows, seconds, threads and bytes.

    What one model has of its own is one of these too: what is set in it, and nothing that has its default.

    deadline_s: of its predictions, where their callers ask for none that is shorter. memory_bytes: see `OnnxSession`.
    exact_threads: whether a small model gets all of `threads` too. warm_rows: the largest batch that warming up tries;
    None tries up to max_batch_rows, for as long as that is quick. providers: beside the processor, in order.
    cache: None answers each request anew. feedback: None keeps no predictions. callers: names of who may predict;
    None: whoever the server lets.
    capture_share: of its requests, from 0 to 1, are captured, but for its features that are sensitive.
    """

    max_batch_rows: int = 512
    max_queued_rows: int = 4096
    max_delay: float = 0.0
    deadline_s: float = 30.0
    instances: int = 1
    threads: int = 1
    exact_threads: bool = False
    memory_bytes: int | None = None
    warm_rows: int | None = None
    providers: tuple[Provider, ...] = ()
    cache: CacheSize | None = None
    drift: Drift = COMPARED
    feedback: Feedback | None = None
    callers: frozenset[str] | None = None
    capture_share: float = 0.0
    sensitive: frozenset[str] = frozenset()

    def of(self, own: Limits) -> Limits:
        """Return those of a model with settings of its own."""
        given = {name: getattr(own, name) for name in own.model_fields_set}
        return self.model_copy(update=given | {"exact_threads": "threads" in given})

    def same_session(self, other: Limits) -> bool:
        """Tell whether a session that was loaded with these does for others too."""
        loaded_with = ("threads", "exact_threads", "memory_bytes", "providers")
        return all(getattr(self, name) == getattr(other, name) for name in loaded_with)
