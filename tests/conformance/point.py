"""A point of conformance: what a server should do, how to ask it, and what came of asking."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tests.conformance.subject import NotAsked, Subject

Verdict: TypeAlias = Literal["yes", "no", "not asked"]
Ask: TypeAlias = Callable[[Subject], str | None]


@dataclass(frozen=True, slots=True)
class Point:
    """`ask` returns (a note, where there is one) if the server conforms; raises NotAsked where it can't be told."""

    group: str
    name: str
    ask: Ask
    seconds: float
    """The most that it may take."""
    last: bool = False
    """Asked behind all others, since it changes the server."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one point; `note` says what was seen, or why nothing was asked."""

    group: str
    name: str
    verdict: Verdict
    note: str = ""
    seconds: float = 0.0


POINTS: list[Point] = []


def point(group: str, name: str, *, seconds: float = 40, last: bool = False) -> Callable[[Ask], Ask]:
    """Register a function as a point."""

    def register(ask: Ask) -> Ask:
        POINTS.append(Point(group, name, ask, seconds, last))
        return ask

    return register


def ask(subject: Subject, points: Iterable[Point]) -> list[Result]:
    """Ask a server about every point, one after another."""
    return [_asked(subject, one) for one in points]


def _asked(subject: Subject, one: Point) -> Result:
    came: list[tuple[Verdict, str]] = []
    began = time.monotonic()
    # A thread that may be left behind: some clients wait for ever for a server that ends their stream.
    asking = threading.Thread(target=lambda: came.append(_verdict(subject, one)), daemon=True)
    asking.start()
    asking.join(one.seconds)
    verdict, note = came[0] if came else ("no", f"no end within {one.seconds:g} s")
    return Result(one.group, one.name, verdict, note, round(time.monotonic() - began, 2))


def _verdict(subject: Subject, one: Point) -> tuple[Verdict, str]:
    try:
        return "yes", one.ask(subject) or ""
    except NotAsked as reason:
        return "not asked", str(reason)
    except Exception as error:  # whatever a server makes a client do, the other points are still asked
        return "no", _note(error)


def _note(error: Exception) -> str:
    code = getattr(error, "code", None)  # of a gRPC error, whose text is many lines
    details = getattr(error, "details", None)
    text = f"{code()}: {details()}" if callable(code) and callable(details) else str(error) or type(error).__name__
    text = re.sub(r"\s+", " ", text).replace(f"{Path.cwd()}/", "")[:300]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
