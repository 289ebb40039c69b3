"""What the gate, the workers and the quarantine have said of versions, and who still has to be asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeAlias

from serving.engine.batching import Independence
from serving.errors import ServingError
from serving.linux.thread_scheduling import lowest_priority
from serving.repository.repository import ModelVersion, Problem
from serving.repository.traffic import Traffic, plan

log = logging.getLogger("serving.gate")


Figure: TypeAlias = tuple[str, str, str, str, float]
"""Name and version, of which version (`this`, or the one that was `serving`), what was measured, and the value."""


class Gate(Protocol):
    """The gate: says whether a version may be loaded at all."""

    def known(self, found: ModelVersion, serving: ModelVersion | None) -> str | None:
        """Return a verdict that needs no work: '' for passed, a reason for refused, None where it must be examined."""

    def examine(self, found: ModelVersion, serving: ModelVersion | None) -> str:
        """Examine a version; takes seconds. '' for passed, else the reason."""

    def independence(self, found: ModelVersion) -> Independence:
        """Return whether a version that passed has independent rows, as far as that was proved."""

    def figures(self, found: ModelVersion) -> list[Figure]:
        """Return what was measured of a version."""


class Parted(NamedTuple):
    """A model's versions: those that may be loaded, why others may not, and whether some are still examined."""

    good: list[ModelVersion]
    refused: list[Problem]
    pending: bool


class GateResults:
    """Kept for the coordinator, on whose thread all methods are called.

    call: has something done on that thread; what is done there looks at the folder again.
    """

    def __init__(self, gate: Gate, call: Callable[[Callable[[], None]], None]) -> None:
        self._gate = gate
        self._call = call
        self._said: dict[ModelVersion, str] = {}
        self._examined: set[ModelVersion] = set()
        self._examiner = ThreadPoolExecutor(1, thread_name_prefix="gate", initializer=lowest_priority)
        self.quarantined: dict[tuple[str, str], str] = {}
        """Reasons, by name and version."""

    def held(self, name: str) -> set[str]:
        """Return the versions of a model that are in quarantine."""
        return {version for model, version in self.quarantined if model == name}

    def part(self, name: str, found: list[ModelVersion], traffic: Traffic, serving: ModelVersion | None) -> Parted:
        """Part versions into good and refused; of those that nobody has judged, the wanted ones go to the gate."""
        refused = [
            Problem(name, item.version, f"quarantined: {self.quarantined[name, item.version]}")
            for item in found
            if (name, item.version) in self.quarantined
        ]
        good = [item for item in found if (name, item.version) not in self.quarantined]
        while good:
            try:
                wanted = set(plan(traffic, [item.version for item in good]).loaded)
            except ServingError:
                break
            verdicts = {item: self._verdict(item, serving) for item in good if item.version in wanted}
            bad = [item for item, verdict in verdicts.items() if verdict]
            if not bad:
                unjudged = [item for item, verdict in verdicts.items() if verdict is None]
                return Parted([item for item in good if item not in unjudged], refused, bool(unjudged))
            refused += [Problem(name, item.version, verdicts[item] or "") for item in bad]
            good = [item for item in good if item not in bad]
        return Parted(good, refused, False)

    def mark(self, item: ModelVersion, reason: str) -> None:
        """Remember that a version can't be loaded."""
        self._said[item] = reason

    def forget(self, name: str) -> None:
        """Forget what was said against versions of a model that somebody asks to be loaded again."""
        for item in [item for item, reason in self._said.items() if item.name == name and reason]:
            del self._said[item]

    def forget_changed(self, name: str, found: list[ModelVersion]) -> bool:
        """Forget what was said against versions that are not as they were, and tell whether there were any.

        A file may be whole, read while it is written over, and be the same again.
        """
        gone = [item for item, reason in self._said.items() if item.name == name and reason and item not in found]
        for item in gone:
            del self._said[item]
        return bool(gone)

    def independence(self, item: ModelVersion) -> Independence:
        """Return whether a version that was let pass has independent rows."""
        return self._gate.independence(item)

    def passed(self) -> list[tuple[str, str, bool]]:
        """List, by name and version, which versions were let pass and which were refused."""
        return [(item.name, item.version, not reason) for item, reason in self._said.items()]

    def figures(self) -> list[Figure]:
        """List what was measured of the versions that were judged."""
        return [figure for item in self._said for figure in self._gate.figures(item)]

    def close(self) -> None:
        """Examine nothing any more."""
        self._examiner.shutdown(wait=False, cancel_futures=True)

    def _verdict(self, item: ModelVersion, serving: ModelVersion | None) -> str | None:
        verdict = self._said.get(item)
        if verdict is None:
            verdict = self._gate.known(item, serving)
            if verdict is not None:
                self._said[item] = verdict
            elif item not in self._examined:
                self._examined.add(item)
                self._examiner.submit(self._examine, item, serving)
        return verdict

    def _examine(self, item: ModelVersion, serving: ModelVersion | None) -> None:
        """Run the gate, on its thread."""
        try:
            verdict = self._gate.examine(item, serving)
        except Exception:
            log.exception("the gate failed on %s %s", item.name, item.version)
            verdict = "it could not be examined: the server's log has the reason"

        if verdict:
            log.error("not served: %s %s: %s", item.name, item.version, verdict)

        def note() -> None:
            self._examined.discard(item)
            self._said[item] = verdict

        self._call(note)
