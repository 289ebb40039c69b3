"""How good predictions were, by what turned out to be true: pure functions over arrays."""

from __future__ import annotations

import math

import numpy as np

from serving.tensors import Array


def error(value: float | None, outcome: str) -> float:
    """Return how far a number was from the truth; infinity where one of them is none."""
    try:
        return abs(value - float(outcome))  # type: ignore[operator]
    except (TypeError, ValueError):
        return math.inf


def auc(outcomes: Array, scores: Array) -> float | None:
    """Return the area under the ROC curve, 0 to 1; of more than two classes the mean of each against the others.

    outcomes: int [n], positions of classes, -1 for none of them. scores: float [n, classes]. None where no class has
    outcomes both ways.
    """
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    areas = [_area(outcomes == k, scores[:, k]) for k in classes]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if known else None


def _area(positive: Array, scores: Array) -> float | None:
    """Return the chance that a positive row scores higher than another one; ties count half."""
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        return None
    _, places, times = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[places]  # the mean rank of equal scores, from 1
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def brier(outcomes: Array, probabilities: Array) -> float:
    """Return the mean squared difference of probabilities from what happened: of two classes for the second, 0 to 1;
    of more, summed over classes, 0 to 2. Arguments as for `auc`.
    """
    happened = outcomes[:, None] == np.arange(probabilities.shape[1])
    squares = ((probabilities - happened) ** 2).sum(axis=1)
    return float(squares.mean() / (2 if probabilities.shape[1] == 2 else 1))
