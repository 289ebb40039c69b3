"""What each feature contributes to a row's answer: its values are put in the place of background rows', one by one.

Starting at a background row, features take the row's own values in a random order, and then in the opposite one; what
the answer changes by at each step is the feature's. The mean over the background rows is an estimate of its Shapley
value, exact where no more than two features act together, and what all features contribute adds up to the difference
between the answer and the background's. Source: Strumbelj and Kononenko, "Explaining prediction models and individual
predictions with feature contributions", Knowledge and Information Systems 41 (2014).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from serving.engine.reference import scalar_scores
from serving.engine.rows import Rows
from serving.engine.signature import Signature
from serving.errors import InvalidRequest, PayloadTooLarge, ServingError
from serving.prediction.bulk import PIECE_S, Piece
from serving.tensors import Array, Tensors

if TYPE_CHECKING:
    from serving.prediction.prediction import Prediction

MOST_RUNS = 65_536
"""Rows that the model may be asked for one request."""
_RUNS_A_ROW = 8192
_LEAST_BACKGROUND = 4
_MOST_MASKED = 64 << 20
"""Cells, each a byte, that say which features are the row's and which the background's: 2,896 features at most."""


class Explainer:
    """Explains rows of one signature. Raises InvalidRequest where they can't be."""

    def __init__(self, signature: Signature) -> None:
        rows = signature.background or (signature.golden.rows if signature.golden else ())
        if not rows or signature.batch != "dynamic" or any(feature.shape for feature in signature.features):
            raise InvalidRequest(
                "explain: the model's file brings no background rows: export it anew with serving.export, from a table"
            )
        width = len(signature.features)
        rows = rows[: max(_LEAST_BACKGROUND, min(len(rows), _RUNS_A_ROW // (2 * width)))]
        if 2 * width * len(rows) * width > _MOST_MASKED:
            raise InvalidRequest(f"explain: the model has {width} features, which are too many")
        self._matrix = signature.layout == "matrix"
        self._background = Rows(signature, "background").arrays(
            [[row[feature.name] for feature in signature.features] for row in rows]
        )
        self.scores = scalar_scores(signature)
        if self.scores is None:
            raise InvalidRequest("explain: is for models that answer a row with a label, scores or one number")
        self._width = width
        self._rows = len(rows)
        random = np.random.default_rng(0)
        steps = np.arange(width)
        masks, before, after, features = [], [], [], []
        for at in range(len(rows)):
            order = random.permutation(width)
            ranks = np.empty(width, int)
            ranks[order] = steps
            first = at * 2 * width
            # Row k of these has the first k features of the order; then k of the opposite one. Both share their ends.
            masks += [ranks < np.arange(width + 1)[:, None], (width - 1 - ranks) < steps[1:, None]]
            back = np.concatenate([[first], first + width + steps[1:], [first + width]])
            before += [first + steps, back[:-1]]
            after += [first + steps + 1, back[1:]]
            features += [order, order[::-1]]
        self._masks = np.concatenate(masks)
        self._from = np.repeat(np.arange(len(rows)), 2 * width)
        self._before, self._after = np.concatenate(before), np.concatenate(after)
        self._features = np.concatenate(features)
        self.runs = len(self._masks)
        """Rows that the model is asked for each that is explained."""

    def piece(self, inputs: Tensors, row: int, start: int, end: int) -> Tensors:
        """Return some of the rows that the model is asked, to explain one of those in `inputs`."""
        masks, places = self._masks[start:end], self._from[start:end]
        made = []
        for position, (own, background) in enumerate(zip(inputs, self._background, strict=True)):
            mask = masks if self._matrix else masks[:, position].reshape(-1, *(1,) * (own.ndim - 1))
            made.append(np.where(mask, own[row], background[places]))
        return tuple(made)

    def contributions(self, values: Array) -> Array:
        """Return what each feature contributes, and last the background's mean; values: float [runs]."""
        changes = values[self._after] - values[self._before]
        sums = np.bincount(self._features, changes, minlength=self._width)
        base = values[self._from * 2 * self._width].mean()
        return np.append(sums / (2 * self._rows), base)


async def explained(prediction: Prediction, explainer: Explainer) -> tuple[Tensors, Array]:
    """Answer a request's rows, and say what features contribute: float64 [rows, features + 1], the background last.

    All of it runs behind all others' requests, in short pieces. Raises what the model's queue and the model say.
    """
    inputs, rows = prediction.inputs, prediction.rows
    if rows * explainer.runs > MOST_RUNS:
        most = MOST_RUNS // explainer.runs
        raise PayloadTooLarge(f"explain: {rows} rows, and of this model {most} can be explained at a time: send fewer")
    if prediction.caller.limit is not None:
        prediction.caller.limit.take_rows(rows * explainer.runs)
    model = prediction.endpoint.model
    most = model.limits.max_queued_rows if model.batched else 1
    pieces = _Pieces(prediction, most)
    outputs = await pieces.run(lambda start, end: tuple(array[start:end] for array in inputs), rows)
    assert explainer.scores is not None  # noqa: S101  or it were none
    made = []
    for row in range(rows):
        score = explainer.scores(tuple(output[row : row + 1] for output in outputs))
        found = await pieces.run(partial(explainer.piece, inputs, row), explainer.runs)
        made.append(explainer.contributions(score(found)))
    return outputs, np.stack(made)


class _MadeUp(Piece):
    __slots__ = ()
    made_up = True


class _Pieces:
    """Runs rows of one caller in pieces of about a millisecond, one after the other."""

    def __init__(self, prediction: Prediction, most: int) -> None:
        self._prediction = prediction
        self._most = most
        self._rows = min(64, most)

    async def run(self, take: Callable[[int, int], Tensors], rows: int) -> Tensors:
        """Return the outputs for all rows; take: gives the inputs from one number to another."""
        prediction = self._prediction
        found: list[Tensors] = []
        at = 0
        while at < rows:
            if prediction.done:
                raise asyncio.CancelledError  # the caller has left
            end = min(rows, at + self._rows)
            piece = _MadeUp(take(at, end), end - at, prediction.deadline, prediction.endpoint.loop)
            prediction.endpoint.model.batcher.submit(piece)
            outcome = await piece.outcome
            if isinstance(outcome, ServingError):
                raise outcome
            found.append(outcome)
            at = end
            if piece.ran is not None:
                seconds = max(piece.ran.ended - piece.ran.started, 1e-6) / max(1, piece.ran.rows)
                self._rows = max(1, min(self._most, 2 * self._rows, int(PIECE_S / seconds)))
        return tuple(np.concatenate(columns) for columns in zip(*found, strict=True))
