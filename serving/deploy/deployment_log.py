"""A line in the log for each thing that happens to the folder, and to what is served of it: who did what, and when."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from serving.deploy.plan import Plan
from serving.errors import ModelInvalid, ServingError, shown
from serving.repository.repository import Contents, ModelVersion, Repository
from serving.repository.traffic import Traffic, parse
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import describe

log = logging.getLogger("serving.deployment")

_MOST_CHANGES = 20
"""Changes of one model between two scans that are logged one by one."""


class DeploymentLog:
    """Compares each state with the one before; what is there when the server starts is announced otherwise."""

    def __init__(self, repository: Repository, store: TrafficStore) -> None:
        self._repository = repository
        self._store = store
        self._contents: Contents | None = None
        self._plans: Mapping[str, Plan] | None = None

    def scanned(self, contents: Contents) -> None:
        """Say which versions have come, are damaged, or have vanished."""
        before, self._contents = self._contents, contents
        if before is None or before is contents:
            return
        old = {(item.name, item.version): item for item in before.found}
        new = {(item.name, item.version): item for item in contents.found}
        bad = {(problem.name, problem.version): problem.reason for problem in contents.problems}
        was_bad = {(problem.name, problem.version) for problem in before.problems}
        for key, item in new.items():
            if key in was_bad:
                log.info("%s %s is whole now", *key)
            elif key not in old:
                log.info("%s %s", item.name, self._came(item))
            elif old[key].content != item.content:
                log.warning("%s %s has been replaced: a version should never change", *key)
        for name, version in bad.keys() - was_bad:
            # One that was never whole may be on its way; what the gate has against it is logged when it says so.
            level = logging.INFO if version and (name, version) not in old else logging.WARNING
            log.log(level, "%s: %s", " ".join(filter(None, (name, version))) or "the folder", bad[name, version])
        for name, version in old.keys() - new.keys() - bad.keys():
            if any(entry["what"] == f"delete {version}" for entry in self._history(name, _MOST_CHANGES)):
                log.info("%s %s is deleted from the folder", name, version)
            else:
                log.warning("%s %s has vanished from the folder", name, version)

    def _history(self, name: str, limit: int) -> list[dict[str, Any]]:
        try:
            return self._store.history(name, limit)
        except (ServingError, OSError):  # the model has just gone
            return []

    def _came(self, item: ModelVersion) -> str:
        try:
            declared = self._repository.manifest(item)
        except ModelInvalid:
            declared = None
        if declared is None or declared.time is None:
            return f"{item.version} has come into the folder"
        note = f": {shown(declared.note)}" if declared.note else ""
        return f"{item.version} is published by {shown(declared.who) or 'somebody'}{note}"

    def served(self, plans: Mapping[str, Plan]) -> None:
        """Say what has changed in what is served, and on whose behalf."""
        before, self._plans = self._plans, plans
        for name, plan in plans.items():
            old = (before or {}).get(name)
            if old is None or old is plan:
                continue
            if plan.traffic.generation != old.traffic.generation:
                self._changed(name, old.traffic, plan.traffic)
            now, was = ({item.version for item in of.versions} for of in (plan, old))
            if was and not now:
                why = "as asked" if plan.traffic.unloaded else "nothing of it can be served any more"
                level = logging.INFO if plan.traffic.unloaded else logging.WARNING
                log.log(level, "%s is unloaded: %s", name, why)
                continue
            for version in sorted(now - was, key=int):
                log.info("%s %s is loaded in every worker", name, version)
            for version in sorted(was - now, key=int):
                log.info("%s %s is unloaded", name, version)

    def _changed(self, name: str, before: Traffic, after: Traffic) -> None:
        entries = self._history(name, max(1, min(_MOST_CHANGES, after.generation - before.generation)))
        entries = [entry for entry in entries if before.generation < entry["generation"] <= after.generation]
        for entry in entries:
            facts = describe(*(parse(json.dumps(entry[side])) for side in ("before", "after")))
            what, who, why = (shown(entry[part]) for part in ("what", "who", "why"))
            said = [what if facts in what else f"{what}: {facts}", *([why] if why else [])]
            log.info("%s: %s (generation %d, by %s)", name, "; ".join(said), entry["generation"], who)
        if not entries:  # whoever made the change has yet to write its line, where this server can't wait for the lock
            log.info("%s: %s (generation %d)", name, describe(before, after), after.generation)
