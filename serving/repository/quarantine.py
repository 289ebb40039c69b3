"""Versions that ended workers: a query that kills must not kill every worker, one after the other.

They are remembered in quarantine.json in the server's state folder, so that a restart does not forget, and all servers
of the folder know. A version is let go when its file changes, or its entry is taken out.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.linux.files import Stamp, stamp, write_whole
from serving.repository.manifest import MODEL_FILE
from serving.repository.state_directory import state_folder

log = logging.getLogger("serving.quarantine")

FILE = "quarantine.json"
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


def select_culprit(deaths: Counter[tuple[str, str]], last: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Choose, of the versions that ran at the last death, the one that is to be quarantined; None while it is unsure.

    >>> select_culprit(Counter({("iris", "2"): 2, ("digits", "1"): 1}), [("iris", "2"), ("digits", "1")])
    ('iris', '2')
    >>> select_culprit(Counter({("iris", "2"): 2, ("digits", "1"): 2}), [("iris", "2"), ("digits", "1")])
    """
    ranked = sorted(last, key=lambda version: deaths[version], reverse=True)
    if not ranked or deaths[ranked[0]] < DEATHS:
        return None
    tied = len(ranked) > 1 and deaths[ranked[1]] == deaths[ranked[0]]
    return None if tied and deaths[ranked[0]] < DEATHS_UNSURE else ranked[0]


class Quarantine:
    """The file of cases for one models folder; asking again costs little while it stays as it is.

    state_dir: see `state_folder`.
    """

    def __init__(self, root: Path, state_dir: Path | None = None) -> None:
        self._root = root
        self._state_dir = state_dir
        self._unwritten: list[Case] = []
        self._known: list[Case] = []
        self._seen: Stamp = ()

    def add(self, name: str, version: str, reason: str) -> None:
        """Put a version in quarantine; where that can't be written down, until this server ends."""
        size, modified = self._state(name, version) or (0, 0)
        case = Case(name, version, reason, size, modified)
        cases = [*(c for c in self.cases() if (c.name, c.version) != (name, version)), case]
        try:
            file = state_folder(self._root, self._state_dir) / FILE
            write_whole(file, json.dumps([asdict(c) for c in cases], indent=1).encode() + b"\n")
        except OSError as error:
            log.error("a quarantine can't be written down and ends with this server: %s", error.strerror)
            self._unwritten.append(case)

    def cases(self) -> list[Case]:
        """Return the cases that hold: those whose model file is still the one that did it."""
        found = [*self._read(), *self._unwritten]
        return [c for c in found if self._state(c.name, c.version) in ((c.size, c.modified_ns), None)]

    def _read(self) -> list[Case]:
        """Read the file where it is another than last time; what can't be read changes nothing."""
        if not self._root.is_dir():
            return self._known  # it may come back
        with contextlib.suppress(OSError):  # of the folder, of which `add` speaks
            file = state_folder(self._root, self._state_dir) / FILE
            seen = stamp(file)
            if seen != self._seen:
                self._seen = seen
                try:
                    self._known = [Case(**case) for case in json.loads(file.read_bytes())] if seen else []
                except (OSError, ValueError, TypeError):
                    log.error("%s can't be read: what it says is not followed", FILE)
        return self._known

    def _state(self, name: str, version: str) -> tuple[int, int] | None:
        try:
            found = (self._root / name / version / MODEL_FILE).stat()
        except OSError:
            return None
        return (found.st_size, found.st_mtime_ns)
