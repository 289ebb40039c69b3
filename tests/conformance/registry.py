"""All points, in the order in which they are asked."""

from __future__ import annotations

from tests.conformance import binary, calls, heavy, rest, triton_clients, wrong
from tests.conformance.point import POINTS, Point

_ORDER = [module.__name__ for module in (rest, binary, wrong, calls, triton_clients, heavy)]
POINTS.sort(key=lambda one: (one.last, _ORDER.index(one.ask.__module__)))

HEAVY = (heavy.PERF, heavy.KSERVE)
"""Groups that make environments of their own and take minutes."""

LIGHT: list[Point] = [one for one in POINTS if one.group not in HEAVY]
