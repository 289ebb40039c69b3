"""What a model is to serve next: decided from what the folder holds, what the gate says, and what serves now. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from serving.deploy.model_state import ModelState
from serving.deploy.plan import Plan
from serving.engine.batching import Independence
from serving.errors import ServingError
from serving.gate.results import Parted
from serving.repository.model_settings import ModelSettings
from serving.repository.repository import ModelVersion, Problem
from serving.repository.traffic import NOTHING, Roles, Traffic, plan, without

_Item = TypeVar("_Item", ModelVersion, Problem)


@dataclass(frozen=True, slots=True)
class ModelContents:
    """What one scan of the folder found of a model.

    asked: its traffic document; where that can't be read, the one that is served. quarantined: versions.
    """

    name: str
    found: tuple[ModelVersion, ...]
    problems: tuple[Problem, ...]
    asked: Traffic
    settings: ModelSettings
    quarantined: frozenset[str]

    def ends(self, served: Plan | None) -> bool:
        """Tell whether something that serves now is in quarantine, and has to end whatever takes its place."""
        return served is not None and any(item.version in self.quarantined for item in served.versions)

    def traffic(self, served: Plan | None) -> Traffic:
        """Return what is to be served: what is asked for, with another stable version for one in quarantine.

        A later generation that asks for what is in quarantine is refused, as all that can't be served.
        """
        if self.ends(served) or served is None or served.traffic.generation == self.asked.generation:
            return without(self.quarantined, self.asked, [item.version for item in self.found])
        return self.asked


@dataclass(frozen=True, slots=True)
class Decision:
    """error: why what is asked for is not served, '' where it is. target: what to change to (revision 0), if at all."""

    error: str
    problems: tuple[Problem, ...]
    target: Plan | None = None


def by_name(items: Iterable[_Item]) -> defaultdict[str, list[_Item]]:
    """Sort them by model in one go: there may be thousands."""
    found: defaultdict[str, list[_Item]] = defaultdict(list)
    for item in items:
        found[item.name].append(item)
    return found


def unreplaced(
    found: Iterable[ModelVersion], served: Plan | None
) -> tuple[tuple[ModelVersion, ...], tuple[Problem, ...]]:
    """Keep what is loaded of versions that lie on disk with other bytes by now, and say so, a problem each.

    A number is a promise of what answers: nothing else ever takes over under it while it serves.
    """
    loaded = {item.version: item for item in served.versions} if served is not None else {}
    kept = tuple((item, loaded.get(item.version, item)) for item in found)
    reason = (
        "its files were replaced, and a version never changes: what was loaded of it serves on; publish these as the "
        "next version, or unload and load the model to take them as they are"
    )
    problems = (Problem(new.name, new.version, reason) for new, old in kept if new.content != old.content)
    return tuple(old for _, old in kept), tuple(problems)


def decide(
    state: ModelState, contents: ModelContents, results: Parted, independence: Callable[[ModelVersion], Independence]
) -> Decision:
    """Decide what becomes of a model whose folder is there, or has been away for long enough.

    results: of the gate, for `contents.traffic(state.served)`.
    """
    served, traffic = state.served, contents.traffic(state.served)
    good, problems = results.good, (*contents.problems, *results.refused)
    if results.pending and served is None:
        return Decision(state.error, problems)
    damaged = [problem for problem in problems if problem.version]
    if not good and damaged and served is not None and not traffic.unloaded:
        # Its files are there, and damaged or half copied: what serves goes on.
        roles, error = None, ""
    else:
        roles, error = _roles(contents.asked, traffic, good, results.refused)
    if results.pending and (roles is None or roles.problems or not good):
        # What is examined is asked for by name; a version that nobody names may come later.
        return Decision(state.error, problems)
    problems += tuple(Problem(contents.name, "", text) for text in (error, *(roles or NOTHING).problems) if text)
    if roles is None:
        error = error or _reasons(damaged)
    if not contents.found and not contents.problems and not traffic.unloaded:
        error = "it has vanished from the folder"
    if roles is None:
        if not contents.ends(served):
            return Decision(error, problems)
        good, roles = [], NOTHING
    versions = tuple(item for item in good if item.version in roles.loaded)
    unloaded = tuple(item.version for item in good if item.version not in roles.loaded)
    batching = {item.version: contents.settings.decide(independence(item)) for item in versions}
    target = Plan(contents.name, 0, traffic, versions, unloaded, batching)
    bare = replace(target, batching={version: how.without_providers() for version, how in batching.items()})
    refused = state.refusal.plan if state.refusal is not None else None
    if state.refusal is not None and (target.same(refused) or (state.diverged and bare.same(refused))):
        reason = state.refusal.reason
        # Where nothing else serves, the processor does rather than a provider that can't.
        needed = state.diverged and not bare.same(refused)
        return Decision(reason, (*problems, Problem(contents.name, "", reason)), bare if needed else None)
    return Decision(error, problems, target if state.diverged or not target.same(served) else None)


def _roles(
    asked: Traffic, traffic: Traffic, good: list[ModelVersion], refused: list[Problem]
) -> tuple[Roles | None, str]:
    """Say what each version does, None where that can't be; and what is not as `asked`, where `refused` does not."""
    if not good:
        return NOTHING, ""
    try:
        roles = plan(traffic, [item.version for item in good])
    except ServingError as error:
        why = _reasons(refused)
        return None, f"{error.message}{f' ({why})' if why else ''}"
    if traffic is asked:
        return roles, ""
    return roles, f"stable is version {asked.stable}, in quarantine: version {traffic.stable} answers instead"


def _reasons(problems: list[Problem]) -> str:
    return "; ".join(f"version {problem.version}: {problem.reason}" for problem in problems)
