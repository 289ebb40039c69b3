"""Golden rows: those of a signature whose answers are known, compared with what a session answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.engine.rows import Rows
from serving.engine.session import OnnxSession
from serving.errors import ModelInvalid
from serving.tensors import Array


def check(session: OnnxSession) -> float | None:
    """Return the largest difference from a known answer, relative above 1; None where none is known.

    Raises ModelInvalid, with the row, where one is above the signature's tolerance or a label is another, and
    InferenceFailed.
    """
    signature = session.signature
    golden = signature.golden
    if golden is None or not golden.rows:
        return None
    rows = Rows(signature, "golden")
    cells = [[row.get(name) for name in rows.names] for row in golden.rows]
    if signature.batch == "dynamic":
        outputs = session.run(rows.arrays(cells))
    else:
        singles = [session.run(rows.arrays([row])) for row in cells]
        join = np.concatenate if signature.batch == "one" else np.stack
        outputs = tuple(join(parts) for parts in zip(*singles, strict=True))
    worst = 0.0
    for spec, actual in zip(signature.outputs, outputs, strict=True):
        if spec.name in golden.outputs:
            worst = max(worst, _difference(golden.outputs[spec.name], actual, golden.tolerance, spec.name))
    return worst


def _difference(expected: list[Any], actual: Array, tolerance: float, name: str) -> float:
    """Return the largest difference of an output from its known answer, relative above 1; labels must be equal.

    Raises ModelInvalid where it is above `tolerance`, with the row.
    """
    due: Array = np.array(expected)
    if due.shape != actual.shape:
        raise ModelInvalid(f"golden rows: output {name} has shape {list(actual.shape)}, and {list(due.shape)} is known")
    if actual.dtype.kind == "f":
        due, got = due.astype(np.float64), actual.astype(np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.abs(due - got) / np.maximum(1, np.abs(due))
        # One number that is none differs from all others, and infinities of one sign are equal.
        equal = np.isnan(due) & np.isnan(got) | (due == got)
        apart = np.where(equal, 0.0, np.where(np.isnan(apart), np.inf, apart))
    else:
        apart = np.where(due == actual, 0.0, np.inf)
    by_row = apart.reshape(len(due), -1).max(axis=1, initial=0.0)
    worst = float(by_row.max())
    if worst > tolerance:
        row = int(by_row.argmax())
        raise ModelInvalid(f"golden row {row}: output {name} is {_cell(actual[row])}, and {_cell(due[row])} is known")
    return worst


def _cell(value: Any) -> str:
    return str(value.tolist() if hasattr(value, "tolist") else value)[:80]
