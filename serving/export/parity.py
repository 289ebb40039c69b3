"""Compares an ONNX file with the model it was made from, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from serving.engine.signature import Parity
from serving.tensors import Array


class ParityError(Exception):
    """The ONNX file answers otherwise than its original; the text shows the worst row, and a remedy that was tried."""


class Gap(Exception):
    """Rows differ: how many, how, and which is the worst."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The row whose numbers differ most, within what is allowed: its place, its values, and what both say of it."""

    index: int
    row: dict[str, Any]
    output: str
    expected: list[float]
    actual: list[float]


@dataclass(frozen=True, slots=True)
class Compared:
    """How a file compared with its original: what its signature tells of that, and the worst row of numbers."""

    parity: Parity
    worst: Worst | None = None


def differences(
    expected: Mapping[str, Array], actual: Mapping[str, Array], *, rows: pd.DataFrame, tolerance: float
) -> Compared:
    """Compare every output that the original has.

    Numbers differ relatively where they are above 1. A label may differ only where the original's best two scores are
    as close as `tolerance`. Raises Gap.
    """
    largest, agreement, worst = -1.0, None, None
    for name, due in expected.items():
        if name not in actual:
            raise Gap(f"the original answers {name}, and the file does not")
        got = actual[name]
        if name == "label":
            same = _same_labels(due, got)
            agreement = float(same.mean())
            refused = ~same & ~_tied(expected, tolerance, len(rows))
            _check(refused, due, got, rows, what=f"have another {name}")
        else:
            wanted, given = numbers(due, got, len(rows))
            by_row = difference(wanted, given)
            what = f"differ by more than {tolerance:g} in {name}"
            _check(by_row > tolerance, wanted, given, rows, what=what, by_row=by_row)
            index = int(by_row.argmax())
            if by_row[index] > largest:
                largest = float(by_row[index])
                row = {str(column): _plain(value) for column, value in rows.iloc[index].items()}
                worst = Worst(index, row, name, wanted[index].tolist(), given[index].tolist())
    return Compared(Parity(rows=len(rows), label_agreement=agreement, max_difference=max(0.0, largest)), worst)


def numbers(due: Array, got: Array, rows: int) -> tuple[Array, Array]:
    """Give both as [rows, values] of doubles; a margin of two classes may be shown for both of them. Raises Gap."""
    due, got = due.reshape(rows, -1).astype(float), got.reshape(rows, -1).astype(float)
    if due.shape[1] == 1 and got.shape[1] == 2:
        due = np.hstack([-due, due])
    if due.shape != got.shape:
        raise Gap(f"the original answers {due.shape[1]} values a row, and the file {got.shape[1]}")
    return due, got


def difference(due: Array, got: Array) -> Array:
    """Measure each row's largest difference, relative above 1; what is missing in both is equal."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(due - got) / np.maximum(1, np.abs(due))
    apart = np.where((due == got) | (np.isnan(due) & np.isnan(got)), 0, apart)
    largest: Array = np.where(np.isfinite(apart), apart, np.inf).max(axis=1)
    return largest


def _same_labels(due: Array, got: Array) -> Array:
    due = due.reshape(len(due), -1)
    if got.size != due.size or len(got) != len(due):
        raise Gap(f"the original's labels have the shape {due.shape}, and the file's {got.shape}")
    same: Array = (due.astype(object) == got.reshape(due.shape).astype(object)).all(axis=1)
    return same


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _tied(expected: Mapping[str, Array], tolerance: float, rows: int) -> Array:
    scores = next((expected[name] for name in ("probabilities", "scores", "distances") if name in expected), None)
    if scores is None:
        return np.zeros(rows, dtype=bool)
    scores = scores.reshape(rows, -1).astype(float)
    if scores.shape[1] == 1:
        tied: Array = np.abs(scores[:, 0]) <= tolerance
        return tied
    ordered = np.sort(-scores if "distances" in expected else scores, axis=1)
    close: Array = ordered[:, -1] - ordered[:, -2] <= 2 * tolerance * np.maximum(1, np.abs(ordered[:, -1]))
    return close


def _check(bad: Array, due: Array, got: Array, rows: pd.DataFrame, *, what: str, by_row: Array | None = None) -> None:
    if not bad.any():
        return
    worst = int(np.where(bad, 1 if by_row is None else by_row, -1).argmax())
    raise Gap(
        f"{int(bad.sum())} of {len(rows)} rows {what}; the worst is row {worst}: {rows.iloc[worst].to_dict()}: the "
        f"original says {np.ravel(due[worst]).tolist()}, the file {np.ravel(got[worst]).tolist()}"
    )
