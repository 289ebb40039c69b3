"""How much one model may take, and how it runs: what the server's settings say, and what one model has of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import ConfigDict

from serving.documented import Documented
from serving.engine.providers import Provider

LEAST_MODEL_MEMORY = 1024 * 1024
"""Least that a model may be given to run in, in bytes."""


class _Frozen(Documented):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheSize(_Frozen):
    """How much a response cache of one version holds in one worker: so many answers, or so many bytes."""

    entries: int | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.entries} entries" if self.bytes is None else f"{self.bytes} bytes"


class Drift(_Frozen):
    """How rows are compared with the reference. learn_rows: the first so many are the reference."""

    enabled: bool = True
    window_rows: int = 1000
    learn_rows: int | None = None

    def __str__(self) -> str:
        if not self.enabled:
            return "off"
        learned = f", by the first {self.learn_rows} rows" if self.learn_rows else ""
        return f"in windows of {self.window_rows} rows{learned}"


COMPARED = Drift()


class Feedback(_Frozen):
    """How predictions are kept for outcomes that come later: the last `keep` rows; quality is that of `window`.

    largest_error: of a regressor, from which on it is wholly wrong; None: that is not asked.
    """

    keep: int = 100_000
    window: int = 1000
    largest_error: float | None = None

    def __str__(self) -> str:
        return f"for {self.keep} rows, quality of {self.window} outcomes"


class Overrides(_Frozen):
    """What one model has of its own of `Limits`, by the same names. None: as the server's settings say."""

    max_batch_rows: int | None = None
    max_queued_rows: int | None = None
    max_delay: float | None = None
    deadline_s: float | None = None
    instances: int | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    warm_rows: int | None = None
    providers: tuple[Provider, ...] | None = None
    cache: CacheSize | None = None
    drift: Drift | None = None
    feedback: Feedback | None = None
    callers: frozenset[str] | None = None
    capture_share: float | None = None
    sensitive: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one model may take, and how it runs; rows, seconds, threads and bytes.

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

    def of(self, own: Overrides) -> Limits:
        """Return those of a model with settings of its own."""
        given = {name: value for name, value in own if value is not None}
        return replace(self, **given, exact_threads=own.threads is not None)

    def same_session(self, other: Limits) -> bool:
        """Tell whether a session that was loaded with these does for others too."""
        return (self.threads, self.exact_threads, self.memory_bytes, self.providers) == (
            other.threads,
            other.exact_threads,
            other.memory_bytes,
            other.providers,
        )
