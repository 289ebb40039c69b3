"""What one worker sees of one version's rows: a few a second, copied on the model's thread, counted on another."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from serving.engine.reference import MOST_COLUMNS, Column
from serving.tensors import Array, Overriding, Tensors

ROWS_A_TICK = 512
"""Rows of one version that are taken between two drains, once a second: 2048 took a seventh of the processor time of a
busy connection, and would say no more."""
CELLS_A_TICK = 65_536
"""Cells at most, of models with hundreds of features."""


class Tracker:
    """Takes rows of a version for the columns that are followed; `offer` may be called on any thread."""

    def __init__(self, columns: Iterable[Column]) -> None:
        self.room = 0
        self._taken: list[tuple[dict[int, Array], dict[int, Array]]] = []
        self.follow(columns)

    def follow(self, columns: Iterable[Column]) -> None:
        """Take these columns from now on. What was taken for others is dropped."""
        self.columns = list(columns)
        self._inputs = sorted({column.position for column in self.columns if column.of == "input"})
        self._outputs = sorted({column.position for column in self.columns if column.of == "output"})
        self._taken = []
        self._most = min(ROWS_A_TICK, CELLS_A_TICK // len(self.columns) + 1) if self.columns else 0
        self.room = self._most

    def offer(self, inputs: Tensors, outputs: Tensors) -> None:
        """Take rows while there is room, of many every nth."""
        room = self.room
        if room <= 0 or isinstance(inputs, Overriding):
            return
        rows = inputs[0].shape[0]
        if any(not outputs[at].ndim or outputs[at].shape[0] != rows for at in self._outputs):
            return  # whoever asked is told
        every = max(1, math.ceil(rows / room))
        self.room = room - math.ceil(rows / every)
        self._taken.append(
            (
                {at: inputs[at][::every].copy() for at in self._inputs},
                {at: _first_columns(outputs[at][::every]).copy() for at in self._outputs},
            )
        )

    def drain(self) -> tuple[int, list[Array]]:
        """Return how many rows were taken, and each column's values; then take more."""
        number = len(self._taken)
        taken, columns = self._taken[:number], self.columns
        del self._taken[:number]
        self.room = self._most
        if not taken:
            return 0, []
        sides = [{at: np.concatenate([one[side][at] for one in taken]) for at in taken[0][side]} for side in (0, 1)]
        values = [column.values(sides[column.of == "output"]) for column in columns]
        return len(values[0]), values


def _first_columns(output: Array) -> Array:
    return output[:, :MOST_COLUMNS] if output.ndim == 2 else output
