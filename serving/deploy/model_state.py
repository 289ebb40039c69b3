"""What the coordinator knows of one model: what is served, what is asked for, and the change in progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving.deploy.channel import Channel
from serving.deploy.plan import Plan
from serving.repository.repository import ModelVersion, Problem


@dataclass(slots=True)
class Change:
    """A plan on its way to the workers."""

    plan: Plan
    queued: list[Channel]
    """Workers that prepare it when others have."""
    at_once: int
    """How many may do so at the same time."""
    waiting: set[Channel] = field(default_factory=set)
    """Workers that were told to prepare or to commit it, and have yet to say that they have."""
    failed: tuple[str, str] | None = None
    """A version that a worker could not load, and why; no version where the plan does not fit those that it could."""
    committing: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A plan that could not be served, so that it is not tried again and again, and why."""

    plan: Plan
    reason: str
    invalid: bool
    """Whether it asks for what the versions do not have."""


@dataclass(slots=True)
class ModelState:
    """What is known of one model."""

    served: Plan | None = None
    change: Change | None = None
    refusal: Refusal | None = None
    problems: tuple[Problem, ...] = ()
    error: str = ""
    """Why the state that the folder asks for is not served; empty where it is."""
    asked: int = 0
    """Generation of the state that the folder asks for."""
    pending: bool = False
    """Whether the gate has yet to examine some of it."""
    missing_since: float | None = None
    """Monotonic seconds of the first scan that did not find its folder."""
    diverged: bool = False
    """Whether a worker that came could not load what the others serve."""

    @property
    def reference(self) -> ModelVersion | None:
        """The version that serves now, with which the gate compares."""
        if self.served is None:
            return None
        stable = self.served.roles.stable
        return next((item for item in self.served.versions if item.version == stable), None)

    def standing(self) -> dict[str, Any]:
        """Return the fields of `worker_agent.Standing`."""
        served, refusal = self.served, self.refusal
        return {
            "asked": self.asked,
            "serving": served.traffic.generation if served else None,
            "stable": served.roles.stable if served else None,
            "error": self.error,
            "invalid": refusal is not None and refusal.invalid and self.error == refusal.reason,
            "busy": self.pending or self.change is not None,
            "versions": [*(v.version for v in served.versions), *served.unloaded] if served else [],
            "alone": {v: b.reason for v, b in served.batching.items() if not b.together} if served else {},
        }
