"""Compares an ONNX file with the model it was made from, row by row."""

from __future__ import annotations

import numpy as np
import pandas as pd

from serving.engine.signature import Parity
from serving.tensors import Array

FLOAT32_EXACT = 2**24


class ParityError(Exception):
    """The ONNX file answers otherwise than its original; the text shows the worst row and names the remedy."""


def compare(
    expected: Array, actual: Array, *, rows: pd.DataFrame, feeds: tuple[Array, ...], tolerance: float, labels: bool
) -> Parity:
    """Compare scores [rows, classes] or predictions [rows]; the difference is relative above 1.

    Raises ParityError where a row differs by more than `tolerance`.
    """
    expected = expected.reshape(len(rows), -1).astype(float)
    actual = actual.reshape(len(rows), -1).astype(float)
    if expected.shape != actual.shape:
        raise ParityError(f"the original answers {expected.shape[1]} values a row, and the file {actual.shape[1]}")
    differences = np.abs(expected - actual) / np.maximum(1, np.abs(expected))
    by_row = np.where(np.isfinite(differences), differences, np.inf).max(axis=1)
    worst = int(by_row.argmax())
    if by_row[worst] > tolerance:
        raise ParityError(
            f"{int((by_row > tolerance).sum())} of {len(rows)} rows differ by more than {tolerance:g}; the worst is "
            f"row {worst}: {rows.iloc[worst].to_dict()}: the original says {expected[worst].tolist()}, the file "
            f"{actual[worst].tolist()}. {_remedy(rows)}"
        )
    agreement = float((expected.argmax(axis=1) == actual.argmax(axis=1)).mean()) if labels else None
    return Parity(rows=len(rows), label_agreement=agreement, max_difference=float(by_row[worst]))


def _remedy(rows: pd.DataFrame) -> str:
    for name in rows.columns:
        column = rows[name]
        if pd.api.types.is_numeric_dtype(column) and float(column.abs().max()) > FLOAT32_EXACT:
            return (
                f"Column {name!r} has values up to {float(column.abs().max()):g}, which float32 can't tell apart: "
                "subtract an offset or scale it before the model, or export with double=True."
            )
    return (
        "Rows may lie on a tree's split: round features to float32 before fitting, export with double=True, "
        "or allow it with tolerance=."
    )
