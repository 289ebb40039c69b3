"""Whether counts of later rows fit the reference: pure functions over counts.

The reference is itself a sample, so both sides are random. Sources: the chi-square test of homogeneity, and S. Holm,
"A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.tensors import Array

FALSE_ALARMS = 0.0005
"""Share of windows of unchanged rows that may raise an alarm, over all columns together."""
LEAST_PSI = 0.1
"""What a shift must add to what chance makes of the PSI: large windows prove shifts that matter to nobody. By the usual
reading of the index, 0.1 is where one looks closer."""
LEAST_ROWS = 20
"""Of a reference, and of a window, before they say anything."""
_LEAST_EXPECTED = 10.0
"""Rows that a cell should hold by chance on either side; the test's tail is wrong for fewer: rare cells become one."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A column's window against its reference.

    psi: population stability index. psi_by_chance: what it is expected to be though nothing has changed.
    jensen_shannon: the distance, base 2, 0 to 1. p_value: None where there are too few rows to say.
    """

    psi: float
    psi_by_chance: float
    jensen_shannon: float
    p_value: float | None


def compare(reference: Array, window: Array) -> Comparison:
    """Compare two vectors of counts, cell by cell."""
    n, m = float(reference.sum()), float(window.sum())
    used = (reference + window) > 0
    one, other = reference[used].astype(float), window[used].astype(float)
    cells = len(one)
    if not n or not m or cells < 2:
        enough = min(n, m) >= LEAST_ROWS
        return Comparison(0.0, 0.0, 0.0, 1.0 if enough else None)
    # Half a row more in each cell: an empty one would make the index infinite.
    p, q = (one + 0.5) / (n + 0.5 * cells), (other + 0.5) / (m + 0.5 * cells)
    psi = float(((q - p) * np.log(q / p)).sum())
    p, q = one / n, other / m
    middle = (p + q) / 2
    divergence = sum(float((a[a > 0] * np.log2(a[a > 0] / middle[a > 0])).sum()) / 2 for a in (p, q))
    return Comparison(
        psi=psi,
        psi_by_chance=(cells - 1) * (1 / n + 1 / m),
        jensen_shannon=math.sqrt(min(1.0, max(0.0, divergence))),
        p_value=_p_value(one, other) if min(n, m) >= LEAST_ROWS else None,
    )


def _p_value(one: Array, other: Array) -> float:
    """Test whether two samples are of one distribution."""
    n, m = one.sum(), other.sum()
    # By the reference alone: chosen by the window's counts, the rare ones would be those with too few rows in it.
    order = np.argsort(one, kind="stable")
    one, other = one[order], other[order]
    expected = one * min(n, m) / n
    rare = int((expected < _LEAST_EXPECTED).sum())
    if rare:
        # Together they are a cell that holds enough, with the next larger ones where they alone do not.
        rare = max(rare, int((np.cumsum(expected) < _LEAST_EXPECTED).sum()) + 1)
        if rare >= len(
            one
        ):  # nearly all of the reference is one cell, as of a constant or of a flag that is seldom set
            return _p_value_of_two(int(one[:-1].sum()), int(n), int(other[:-1].sum()), int(m))
        one, other = (np.append(counts[rare:], counts[:rare].sum()) for counts in (one, other))
    statistic = float(((one * math.sqrt(m / n) - other * math.sqrt(n / m)) ** 2 / (one + other)).sum())
    return chi_square_beyond(statistic, len(one) - 1)


def _p_value_of_two(a: int, n: int, b: int, m: int) -> float:
    """Test whether `a` of `n` and `b` of `m` rows are one share, by Fisher's exact test: twice its smaller tail."""

    def ways(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    def chance(x: int) -> float:
        return math.exp(ways(n, x) + ways(m, a + b - x) - ways(n + m, a + b))

    below = sum(chance(x) for x in range(max(0, a + b - m), a))
    return min(1.0, 2 * min(below + chance(a), 1 - below))


def chi_square_beyond(value: float, degrees: int) -> float:
    """Return the probability that a chi-square variable is at least `value`; degrees: of freedom, 0 or more."""
    if degrees == 0:
        return 1.0
    # The upper incomplete gamma function at whole and half arguments is a finite sum.
    half = value / 2
    total, at = (math.exp(-half), 1.0) if degrees % 2 == 0 else (math.erfc(math.sqrt(half)), 0.5)
    while at < degrees / 2:
        total += math.exp(at * math.log(half) - half - math.lgamma(at + 1)) if half > 0 else 0.0
        at += 1
    return min(1.0, total)


def drifted(found: Sequence[Comparison]) -> list[bool]:
    """Say of each column whether it has drifted, so that all of them together seldom raise a false alarm (Holm)."""
    tested = sorted((one.p_value, i) for i, one in enumerate(found) if one.p_value is not None)
    rejected = set()
    for rank, (p_value, i) in enumerate(tested):
        if p_value > FALSE_ALARMS / (len(tested) - rank):
            break
        rejected.add(i)
    return [i in rejected and one.psi - one.psi_by_chance >= LEAST_PSI for i, one in enumerate(found)]
