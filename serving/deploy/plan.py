"""A plan: what every worker is to serve of one model; made by the coordinator, carried to the workers as JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from serving.engine.batching import Batching
from serving.repository.repository import ModelVersion
from serving.repository.traffic import NOTHING, Roles, Traffic, plan


@dataclass(frozen=True, slots=True)
class Plan:
    """What one model is to serve: versions to hold, in order, and who gets the requests. No versions: nothing.

    revision: the coordinator's own count of plans, so that a late word about an older one is known as such.
    """

    name: str
    revision: int
    traffic: Traffic
    versions: tuple[ModelVersion, ...]
    unloaded: tuple[str, ...]
    """Versions that are in the folder, and not loaded."""
    batching: dict[str, Batching]
    """How the requests of each version that is held run."""

    def same(self, other: Plan | None) -> bool:
        """Tell whether both ask the workers for the same."""
        return other is not None and replace(self, revision=other.revision) == other

    @property
    def roles(self) -> Roles:
        """Say what each version does."""
        return plan(self.traffic, [found.version for found in self.versions]) if self.versions else NOTHING

    def dump(self) -> dict[str, Any]:
        """Return it as JSON values."""
        dumped: dict[str, Any] = _JSON.dump_python(self, mode="json", exclude_unset=True)
        return dumped

    @classmethod
    def read(cls, given: dict[str, Any]) -> Plan:
        """Return the plan that `dump` wrote."""
        return _JSON.validate_python(given)


_JSON = TypeAdapter(Plan)
