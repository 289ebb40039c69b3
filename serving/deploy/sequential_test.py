"""What a count of failures proves about a rate, though it is looked at again and again: sequential likelihood ratios.

A confidence bound for one look (Wilson, Clopper-Pearson) is crossed by chance sooner or later where somebody looks
each second. A likelihood ratio is not: by Ville's inequality a non-negative martingale that starts at 1 ever reaches
1/a with probability a at most, however long it is followed. Wald, "Sequential tests of statistical hypotheses", 1945;
Robbins, "Statistical methods related to the law of the iterated logarithm", 1970. It holds too for parts of failures,
between 0 and 1 each (Hoeffding 1963, by convexity).
"""

from __future__ import annotations

import math

LEVEL = 0.01
"""Probability at most of a wrong conclusion, over all looks together."""
_TIMES = (1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""By how much the odds of failing may be greater than is allowed: each is tested, and the level divided by all."""
WORSE = 5.0
"""Times the allowed rate of which `within` makes sure that a version does not fail so often."""
_FINEST = 0.001
"""Rates below are made sure of as if they were this, for it takes 5 / rate predictions without a failure."""


def exceeds(failed: float, of: float, rate: float) -> bool:
    """Tell whether so many failures prove that more than `rate` fail.

    Where `rate` or fewer fail in truth, it ever says so, asked after each of any number of predictions, with
    probability LEVEL at most.

    >>> exceeds(1, 1, 0.01), exceeds(1, 99, 0.01), exceeds(4, 20, 0.01)
    (False, False, True)
    """
    if rate <= 0:
        return failed > 0
    ratios = (failed * math.log(times) - of * math.log1p(rate * (times - 1)) for times in _TIMES)
    return rate < 1 and max(ratios) >= math.log(len(_TIMES) / LEVEL)


def within(failed: float, of: float, rate: float) -> bool:
    """Tell whether no more than `rate` failed, and so many were seen that WORSE times as many would have shown.

    Where that many fail in truth, it ever says so with probability LEVEL at most.

    >>> within(0, 99, 0.01), within(0, 120, 0.01), within(1, 120, 0.01), within(1, 200, 0.01)
    (False, True, False, True)
    """
    if failed > rate * of:
        return False
    if rate >= 1:
        return True
    good = max(rate, _FINEST)
    bad = min(WORSE * good, (1 + good) / 2)
    ratio = failed * math.log(good / bad) + (of - failed) * math.log((1 - good) / (1 - bad))
    return ratio >= -math.log(LEVEL)


def at_most(failed: float, of: float) -> float:
    """Return the highest rate that so many failures leave room for: Wilson's upper bound, three standard errors up.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    >>> at_most(0, 0), round(at_most(0, 500), 4)
    (1.0, 0.0177)
    """
    if not of:
        return 1.0
    rate, z2 = min(1.0, failed / of), 9.0
    return (rate + z2 / (2 * of) + math.sqrt(z2 * (rate * (1 - rate) / of + z2 / (4 * of * of)))) / (1 + z2 / of)
