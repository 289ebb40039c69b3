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
    if actual.dtype.kind == "f":
        due = due.astype(np.float64)
    if due.shape != actual.shape:
        raise ModelInvalid(f"golden rows: output {name} has shape {list(actual.shape)}, and {list(due.shape)} is known")
    if actual.dtype.kind != "f":
        wrong = np.flatnonzero((due != actual).reshape(len(due), -1).any(axis=1))
        if wrong.size:
            row = int(wrong[0])
            raise ModelInvalid(
                f"golden row {row}: output {name} is {_cell(actual[row])}, and {_cell(due[row])} is known"
            )
        return 0.0
    got = actual.astype(np.float64)
    both = np.isnan(due) & np.isnan(got) | (due == got)
    with np.errstate(invalid="ignore"):
        apart = np.where(both, 0.0, np.abs(due - got) / np.maximum(1, np.abs(due)))
    apart = np.where(np.isfinite(apart), apart, np.inf).reshape(len(due), -1)
    worst = float(apart.max(initial=0.0))
    if worst > tolerance:
        raise _wrong(int(apart.max(axis=1).argmax()), name, got, due)
    return worst


def _wrong(row: int, name: str, got: Array, due: Array) -> ModelInvalid:
    return ModelInvalid(f"golden row {row}: output {name} is {_cell(got[row])}, and {_cell(due[row])} is known")


def _cell(value: Any) -> str:
    return str(value.tolist() if hasattr(value, "tolist") else value)[:80]
