"""What the gate, the workers and the quarantine have said of versions, and who still has to be asked."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple, Protocol, TypeAlias

from serving.engine.batching import Independence
from serving.errors import NotReady, ServingError
from serving.gate.gate import unreadable
from serving.gate.report import Report
from serving.linux.thread_scheduling import lowest_priority
from serving.repository.repository import ModelVersion, Problem
from serving.repository.traffic import Traffic, plan

log = logging.getLogger("serving.gate")


Figure: TypeAlias = tuple[str, str, str, str, float]
"""Name and version, of which version (`this`, or the one that was `serving`), what was measured, and the value."""


class Gate(Protocol):
    """The gate: says whether a version may be loaded at all."""

    def known(self, found: ModelVersion) -> Report | None:
        """Return a report that needs no work; None where the version must be examined."""

    def examine(self, found: ModelVersion, serving: ModelVersion | None) -> Report:
        """Examine a version; takes seconds. Raises NotReady where nobody can say."""

    def rest(self) -> None:
        """Take note that there is nothing to examine for now."""


class Parted(NamedTuple):
    """A model's versions: those that may be loaded, why others may not, and whether some are still examined."""

    good: list[ModelVersion]
    refused: list[Problem]
    pending: bool


class GateResults:
    """Kept for the coordinator, on whose thread all methods are called.

    call: has something done on that thread; after that it scans the folder again.
    """

    def __init__(self, gate: Gate, call: Callable[[Callable[[], None]], None]) -> None:
        self._gate = gate
        self._call = call
        self._reports: defaultdict[str, dict[ModelVersion, Report]] = defaultdict(dict)
        """By model: of thousands, each is asked for at each scan."""
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
            reports = {item: self._report(item, serving) for item in good if item.version in wanted}
            bad = {item: report for item, report in reports.items() if report is not None and not report.ok}
            if not bad:
                awaited = [item for item, report in reports.items() if report is None]
                return Parted([item for item in good if item not in awaited], refused, bool(awaited))
            refused += [Problem(name, item.version, report.reason) for item, report in bad.items()]
            good = [item for item in good if item not in bad]
        return Parted(good, refused, False)

    def mark(self, item: ModelVersion, reason: str) -> None:
        """Remember that a version can't be loaded."""
        known = self._reports[item.name].get(item) or unreadable(reason)
        self._reports[item.name][item] = known.model_copy(update={"ok": False, "reasons": (reason,)})

    def forget(self, name: str) -> None:
        """Forget what was said against versions of a model that somebody asks to be loaded again."""
        for item in self._refused(name):
            del self._reports[name][item]

    def forget_changed(self, name: str, found: list[ModelVersion]) -> bool:
        """Forget what was said against versions that are not as they were, and tell whether there were any.

        A file may be whole, read while it is written over, and be the same again.
        """
        changed = [item for item in self._refused(name) if item not in found]
        for item in changed:
            del self._reports[name][item]
        return bool(changed)

    def _refused(self, name: str) -> list[ModelVersion]:
        return [item for item, report in self._reports[name].items() if not report.ok]

    def independence(self, item: ModelVersion) -> Independence:
        """Return whether a version that passed has independent rows, as far as that was proved."""
        report = self._reports[item.name].get(item)
        known = None if report is None else report.independence
        return known or Independence(proved=False, reason="its rows have not been tried")

    def passed(self) -> list[tuple[str, str, bool]]:
        """List, by name and version, which versions passed and which were refused."""
        return [(item.name, item.version, report.ok) for item, report in self._all()]

    def figures(self) -> list[Figure]:
        """List what was measured of the versions, and of those that served then, in the same minute."""
        return [
            (item.name, item.version, of, what, float(value))
            for item, report in self._all()
            for of, figures in (("this", report.figures), ("serving", report.beside))
            if figures is not None
            for what, value in (
                ("seconds", sum(check.seconds for check in report.checks) if of == "this" else None),
                ("load_seconds", figures.load_s),
                ("row_seconds", figures.row_s),
                ("memory_bytes", figures.memory_bytes),
            )
            if value is not None
        ]

    def _all(self) -> Iterator[tuple[ModelVersion, Report]]:
        return chain.from_iterable(reports.items() for reports in self._reports.values())

    def close(self) -> None:
        """Examine nothing any more."""
        self._examiner.shutdown(wait=False, cancel_futures=True)

    def _report(self, item: ModelVersion, serving: ModelVersion | None) -> Report | None:
        """Return what is known of a version; where that is nothing, it is examined, and None returned."""
        reports = self._reports[item.name]
        report = reports.get(item)
        if report is None and item not in self._examined:
            report = self._gate.known(item)
            if report is not None:
                reports[item] = report
            else:
                self._examined.add(item)
                self._examiner.submit(self._examine, item, serving)
        return report

    def _examine(self, item: ModelVersion, serving: ModelVersion | None) -> None:
        """Run the gate, on its thread."""
        try:
            report = self._gate.examine(item, serving)
        except NotReady as error:
            report = unreadable(error.message)
        except Exception:
            log.exception("the gate failed on %s %s", item.name, item.version)
            report = unreadable("it could not be examined: the server's log has the reason")
        if not report.ok:
            log.error("not served: %s %s: %s", item.name, item.version, report.reason)

        def note() -> None:
            self._examined.discard(item)
            self._reports[item.name][item] = report
            if not self._examined:
                self._examiner.submit(self._gate.rest)

        self._call(note)
