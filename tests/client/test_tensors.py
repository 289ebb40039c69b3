"""Which rows travel as tensors: only those that mean the same so; the others are the server's to judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import serving
from serving.client.given import given
from serving.client.tensors import tensors_of
from serving.engine.signature import Signature


def _signature(*features: dict[str, Any], shape: tuple[int, ...] = (-1, 1)) -> Signature:
    """A model with an input for each feature, named as the exporter names them."""
    names = [feature["name"].replace(" ", "_") for feature in features]
    made = zip(names, features, strict=True)
    inputs = [{"name": name, "datatype": f["datatype"], "shape": (*shape, *f.get("shape", ()))} for name, f in made]
    outputs = [{"name": "y", "datatype": "FP32", "shape": (-1,)}]
    return Signature.model_validate({"inputs": inputs, "outputs": outputs, "layout": "columns", "features": features})


def _sent(rows: Any, *features: dict[str, Any]) -> Any:
    made = tensors_of(given(rows), _signature(*features))
    return None if made is None else {t.name: (t.datatype, t.array.dtype.kind, t.array.tolist()) for t in made}


LENGTH = {"name": "bill length", "datatype": "FP32"}
AGE = {"name": "age", "datatype": "INT8"}
SEX = {"name": "sex", "datatype": "BYTES"}
WELL = {"name": "well", "datatype": "BOOL"}


def test_features_become_the_inputs_of_the_graph() -> None:
    """By whatever name the graph has them, with its datatypes and its dimension behind the rows."""
    rows = [
        {"bill length": 1, "age": 2, "sex": "f", "well": True},
        {"bill length": 1.5, "age": 3, "sex": "m", "well": False},
    ]
    due = {
        "bill_length": ("FP32", "f", [[1.0], [1.5]]),
        "age": ("INT8", "i", [[2], [3]]),
        "sex": ("BYTES", "O", [["f"], ["m"]]),
        "well": ("BOOL", "b", [[True], [False]]),
    }
    assert _sent(rows, LENGTH, AGE, SEX, WELL) == due
    assert _sent([list(row.values()) for row in rows], LENGTH, AGE, SEX, WELL) == due


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        (LENGTH, [True]),
        (LENGTH, ["1"]),
        (LENGTH, [None]),
        (LENGTH, [float("nan")]),
        (LENGTH, [1e39]),
        (LENGTH, [10**400]),
        (AGE, [1.0]),
        (AGE, [True]),
        (AGE, [128]),
        (AGE, [None]),
        (SEX, [None]),
        (SEX, [1]),
        (WELL, [1]),
        ({**SEX, "nullable": True}, [None]),
        ({**SEX, "categories": ["f", "m"], "unknown_category": "refuse"}, ["f"]),
    ],
)
def test_what_might_mean_something_else_is_sent_as_json(feature: dict[str, Any], values: list[Any]) -> None:
    """No value is made another one, none is let pass that JSON would be refused for."""
    assert _sent([{feature["name"]: value} for value in values], feature) is None
    column = np.array(values, object if values in ([10**400], [None]) else None)
    assert _sent({feature["name"]: column}, feature) is None


def test_missing_floats_are_nan_where_they_may_be_missing() -> None:
    """A nullable float travels as NaN; an infinity only where the model takes what is not finite."""
    ((_, _, sent),) = _sent([{"bill length": None}, {"bill length": 2}], {**LENGTH, "nullable": True}).values()
    assert np.array_equal(np.array(sent), [[np.nan], [2]], equal_nan=True)
    infinite = {"bill length": np.array([np.inf])}
    assert _sent(infinite, LENGTH) is None
    assert _sent(infinite, {**LENGTH, "allow_non_finite": True}) == {"bill_length": ("FP32", "f", [[np.inf]])}
    with pytest.raises(serving.InvalidRequest, match="2 features"):
        _sent(np.zeros((1, 3)), LENGTH, AGE)
