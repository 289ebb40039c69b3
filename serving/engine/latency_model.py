"""How long a batch takes, learnt from those that ran: what is let in, and how large batches are."""

from __future__ import annotations

import math

_WEIGHT = 0.1
"""Of the newest batch in the averages: some twenty batches tell."""
MARGIN = 1.25
"""By how much a wait is thought longer than the average says: machines have other work too."""
_SHARE = 0.2
"""Of its allowance that a request may spend in its own batch: the rest is for waiting."""
_EFFICIENT = 4.0
"""Never cut a batch below so many times its fixed cost, or the fixed cost eats the capacity."""
_FITS = 2 / 3
"""Of its allowance that a request may spend on the batch that runs and its own, at the most: what is left is for one
that waits. Else, with batches that take long whatever their size, hardly a request would be let in to fill them."""


class LatencyModel:
    """How long a batch takes: `fixed` seconds and `each` row's, the line through the batches that ran of late."""

    __slots__ = ("_rows", "_rows2", "_rows_seconds", "_seconds", "each", "fixed")

    def __init__(self) -> None:
        self._rows = self._seconds = self._rows2 = self._rows_seconds = 0.0
        self.fixed = 0.0
        self.each = 0.0

    def learn(self, rows: int, seconds: float) -> None:
        """Take a batch that ran."""
        weight = _WEIGHT if self._rows else 1.0
        self._rows += weight * (rows - self._rows)
        self._seconds += weight * (seconds - self._seconds)
        self._rows2 += weight * (rows * rows - self._rows2)
        self._rows_seconds += weight * (rows * seconds - self._rows_seconds)
        spread = self._rows2 - self._rows * self._rows
        # Batches of one size tell nothing of another: what a row costs stays as it was known, at first nothing. Were it
        # nothing again under a steady load, the next batch would be as large as can be, and late.
        differ = spread > 0.01 * self._rows2
        slope = (self._rows_seconds - self._rows * self._seconds) / spread if differ else self.each
        self.each = min(max(slope, 0.0), self._seconds / self._rows)
        self.fixed = self._seconds - self.each * self._rows

    def seconds(self, rows: float) -> float:
        """Return how long a batch of so many rows takes."""
        return self.fixed + self.each * rows

    def rows(self, allowance: float, most: int) -> int:
        """Return how many rows, `most` at most, run together for requests that have `allowance` seconds in all."""
        if not self.each:
            return most
        wanted = max(_SHARE * allowance, _EFFICIENT * self.fixed)
        spare = min(wanted, _FITS * allowance / (2 * MARGIN)) - self.fixed
        return max(1, min(most, int(spare / self.each)))

    def waits(self, allowance: float, most: int) -> tuple[float, float]:
        """Return seconds that a queued row makes a request wait, and that the batch that runs and its own do.

        Of batches as they are under load by this very pace: rows chosen by an older one, at the price of this one,
        would promise batches that never run, and refuse for them.
        """
        rows = self.rows(allowance, most)
        full = MARGIN * self.seconds(rows)
        return full / rows, 2 * full


def seconds_to_come_back(wait: float) -> int:
    """Return whole seconds for a Retry-After: never before the queue has gone down.

    >>> seconds_to_come_back(2.1), seconds_to_come_back(0.2)
    (3, 1)
    """
    return max(1, math.ceil(wait))
