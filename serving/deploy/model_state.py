"""What the coordinator knows of one model: what is served, what is asked for, and the change that is on its way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from serving.deploy.plan import Plan
from serving.errors import ServingError
from serving.repository.repository import ModelVersion, Problem
from serving.repository.traffic import NOTHING, Roles, Traffic, plan

GONE_S = 2.0
"""Seconds for which a model's folder must be missing before it stops being served: a copy may replace it."""


@dataclass(slots=True)
class Change:
    """A plan on its way to the workers."""

    plan: Plan
    untold: list[int]
    """Workers that are to prepare it when others have."""
    at_once: int
    """How many may do so at the same time."""
    waiting: set[int] = field(default_factory=set)
    failed: tuple[str, str] | None = None
    """A version that a worker could not load, and why; no version where the plan does not fit those that it could."""
    committing: bool = False


@dataclass(slots=True)
class Known:
    """What is known of one model."""

    served: Plan | None = None
    change: Change | None = None
    problems: tuple[Problem, ...] = ()
    error: str = ""
    """Why the state that the folder asks for is not served; empty where it is."""
    asked: int = 0
    """Generation of the state that the folder asks for."""
    pending: bool = False
    """Whether the gate has yet to speak on it."""
    refused: Plan | None = None
    """What could not be served, so that it is not tried again and again; `reason` says why."""
    reason: str = ""
    unfit: bool = False
    """Whether it was refused because it asks for what the versions do not have."""
    missing_since: float | None = None
    uneven: bool = False
    """Whether a worker that came could not load what the others serve."""

    @property
    def reference(self) -> ModelVersion | None:
        """The version that serves now, with which the gate compares."""
        if self.served is None:
            return None
        stable = self.served.roles.stable
        return next((item for item in self.served.versions if item.version == stable), None)

    def may_come_back(self) -> bool:
        """Tell whether a model that is missing from the folder is to be kept a little longer."""
        now = time.monotonic()
        if self.missing_since is None:
            self.missing_since = now
        return now - self.missing_since < GONE_S

    def standing(self) -> dict[str, Any]:
        """Return where it stands, as `member.Standing` has it."""
        return {
            "asked": self.asked,
            "serving": self.served.traffic.generation if self.served else None,
            "stable": self.served.roles.stable if self.served else None,
            "error": self.error,
            "invalid": self.unfit and self.error == self.reason,
            "busy": self.pending or self.change is not None,
            "alone": {v: b.reason for v, b in self.served.batching.items() if not b.together} if self.served else {},
        }


def roles_of(
    asked: Traffic, traffic: Traffic, good: list[ModelVersion], refused: list[Problem], *, stays: bool
) -> tuple[Roles | None, str]:
    """Say what each version does, None where that can't be; and what is not as `asked`, where that is not in `refused`.

    traffic: what is to be served in place of `asked`, where that names what is in quarantine. stays: where nothing is
    good, what serves goes on: its files are there, and damaged or half copied.
    """
    if not good:
        return None if stays else NOTHING, ""
    try:
        roles = plan(traffic, [item.version for item in good])
    except ServingError as error:
        why = reasons(refused)
        return None, f"{error.message}{f' ({why})' if why else ''}"
    if traffic is asked:
        return roles, ""
    return roles, f"stable is version {asked.stable}, in quarantine: version {traffic.stable} answers instead"


def reasons(refused: list[Problem]) -> str:
    """Put why versions can't serve into one sentence."""
    return "; ".join(f"version {p.version}: {p.reason}" for p in refused)
