"""Versions that ended workers: a query that kills must not kill every worker, one after the other.

They are remembered in `<models>/.serving/quarantine.json`, so that a restart does not forget, or in the server's
private folder where the models folder can't be written. A version is let go when its file changes or its entry goes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.fleet.repository import MODEL_FILE, Contents, Problem

log = logging.getLogger("serving.quarantine")

DEATHS = 2
"""Deaths of workers that put a version in quarantine."""
DEATHS_UNSURE = 4
"""The same, where each time another version ran that has as many."""


@dataclass(frozen=True, slots=True)
class Case:
    """One version in quarantine: why, and the size and time of change of the file that did it."""

    name: str
    version: str
    reason: str
    size: int
    modified_ns: int


def guilty(deaths: Counter[tuple[str, str]], last: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Choose, of the versions that ran at the last death, the one that is to be quarantined; None while it is unsure.

    >>> guilty(Counter({("iris", "2"): 2, ("digits", "1"): 1}), [("iris", "2"), ("digits", "1")])
    ('iris', '2')
    >>> guilty(Counter({("iris", "2"): 2, ("digits", "1"): 2}), [("iris", "2"), ("digits", "1")])
    """
    ranked = sorted(last, key=lambda version: deaths[version], reverse=True)
    if not ranked or deaths[ranked[0]] < DEATHS:
        return None
    tied = len(ranked) > 1 and deaths[ranked[1]] == deaths[ranked[0]]
    return None if tied and deaths[ranked[0]] < DEATHS_UNSURE else ranked[0]


class Quarantine:
    """The file of cases for one models folder. private: folder of this server's own, which goes with it."""

    def __init__(self, root: Path, private: Path) -> None:
        self._root = root
        self._files = (root / ".serving" / "quarantine.json", private / "quarantine.json")

    def add(self, name: str, version: str, reason: str) -> None:
        """Put a version in quarantine, or log why that can't be kept."""
        size, modified = self._state(name, version)
        cases = [case for case in self.cases() if (case.name, case.version) != (name, version)]
        text = json.dumps([asdict(case) for case in [*cases, Case(name, version, reason, size, modified)]], indent=1)
        for file in self._files:
            try:
                file.parent.mkdir(exist_ok=True)
                fresh = file.with_suffix(".new")
                fresh.write_text(text + "\n")
                fresh.replace(file)
            except OSError:
                continue  # a folder that can't be written: the next one is ours alone
            return
        log.error("the quarantine of %s %s can't be written down: it lasts until the next start", name, version)

    def cases(self) -> list[Case]:
        """Return the cases that hold: those whose model file is still the one that did it."""
        found = {(case.name, case.version): case for file in self._files for case in _read(file)}
        return [c for c in found.values() if self._state(c.name, c.version) == (c.size, c.modified_ns)]

    def withhold(self, contents: Contents) -> Contents:
        """Turn versions in quarantine from what can be loaded into problems, with the reason."""
        held = {(case.name, case.version): case.reason for case in self.cases()}
        if not held:
            return contents
        problems = [
            Problem(item.name, item.version, f"quarantined: {held[item.name, item.version]}")
            for item in contents.found
            if (item.name, item.version) in held
        ]
        return Contents(
            tuple(item for item in contents.found if (item.name, item.version) not in held),
            (*contents.problems, *problems),
            contents.labels,
        )

    def _state(self, name: str, version: str) -> tuple[int, int]:
        try:
            found = (self._root / name / version / MODEL_FILE).stat()
        except OSError:
            return (0, 0)
        return (found.st_size, found.st_mtime_ns)


def _read(file: Path) -> list[Case]:
    try:
        return [Case(**case) for case in json.loads(file.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        log.error("%s can't be read: its versions are not held back", file.name)
        return []
