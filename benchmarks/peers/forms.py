"""What a request looks like in the form of each server, and where its answer has the model's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

Rows = list[list[float]]


@dataclass(frozen=True)
class Form:
    """request: what is sent, from rows. scores: the answer's probabilities, row by row, nested or flat."""

    request: Callable[[Rows], Any]
    scores: Callable[[Any], Any]


def _tensor(rows: Rows) -> Any:
    shape = [len(rows), len(rows[0])]
    return {"inputs": [{"name": "features", "datatype": "FP32", "shape": shape, "data": list(chain(*rows))}]}


def _predicted(answer: Any) -> Any:
    given = [row["probabilities"] for row in answer["predictions"]]
    return [list(row.values()) if isinstance(row, dict) else row for row in given]


FORMS = {
    "v2": Form(_tensor, lambda answer: next(o["data"] for o in answer["outputs"] if o["name"] == "probabilities")),
    "v1": Form(lambda rows: {"instances": rows}, _predicted),
    "mlflow": Form(lambda rows: {"inputs": rows}, lambda answer: answer["predictions"]["probabilities"]),
    # Where the service's own code says what a request is.
    "rows": Form(lambda rows: {"rows": rows}, lambda answer: answer),
}
