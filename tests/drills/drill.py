"""What every drill is made of: a promise, measured figures with their bounds, and a control that has to fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number and what was promised of it, in words: "at most 0.3 ms"."""

    what: str
    measured: float
    promised: str
    kept: bool


@dataclass(slots=True)
class Report:
    """What one drill found. The short form in the test suite asserts `kept`."""

    figures: list[Figure] = field(default_factory=list)

    def at_most(self, what: str, measured: float, bound: float, unit: str = "") -> None:
        """Note a figure that must not exceed `bound`."""
        self._add(what, measured, f"at most {bound:,g} {unit}", measured <= bound)

    def at_least(self, what: str, measured: float, bound: float, unit: str = "") -> None:
        """Note a figure that must reach `bound`."""
        self._add(what, measured, f"at least {bound:,g} {unit}", measured >= bound)

    def exactly(self, what: str, measured: float, due: float, unit: str = "") -> None:
        """Note a figure that must be `due`."""
        self._add(what, measured, f"{due:,g} {unit}", measured == due)

    def control(self, what: str, failed: bool) -> None:
        """Note whether the same drill failed with its defence off: one that can't fail proves nothing."""
        self._add(f"control: {what}", float(failed), "1 (it fails)", failed)

    def _add(self, what: str, measured: float, promised: str, kept: bool) -> None:
        self.figures.append(Figure(what, measured, promised.strip(), kept))

    @property
    def kept(self) -> bool:
        """Whether every promise was kept, and there was one."""
        return bool(self.figures) and all(figure.kept for figure in self.figures)

    def broken(self) -> list[Figure]:
        """Return the figures that miss their promise."""
        return [figure for figure in self.figures if not figure.kept]


Run: TypeAlias = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Drill:
    """A named promise; `run` takes a Report and, by keyword, how much of everything (the defaults: the long form)."""

    name: str
    promise: str
    run: Run


DRILLS: dict[str, Drill] = {}


def drill(name: str, promise: str) -> Callable[[Run], Run]:
    """Register a function as a drill."""

    def register(run: Run) -> Run:
        DRILLS[name] = Drill(name, promise, run)
        return run

    return register
