"""A plan: what every worker is to serve of one model; made by the coordinator, carried to the workers as JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import orjson

from serving.engine.batching import Batching
from serving.repository.repository import ModelVersion
from serving.repository.traffic import NOTHING, Roles, Traffic, parse, plan


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
        return {
            "name": self.name,
            "revision": self.revision,
            "traffic": self.traffic.document(),
            "versions": [found.dump() for found in self.versions],
            "unloaded": self.unloaded,
            "batching": {version: batching.dump() for version, batching in self.batching.items()},
        }

    @classmethod
    def read(cls, given: dict[str, Any]) -> Plan:
        """Return the plan that `dump` wrote."""
        return cls(
            given["name"],
            given["revision"],
            parse(orjson.dumps(given["traffic"])),
            tuple(ModelVersion.read(found) for found in given["versions"]),
            tuple(given["unloaded"]),
            {version: Batching.read(batching) for version, batching in given["batching"].items()},
        )
