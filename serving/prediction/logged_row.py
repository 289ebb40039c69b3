"""A row as the log may have it: without features that are sensitive, and in so many bytes."""

from __future__ import annotations

import json

import numpy as np

from serving.engine.model import Model
from serving.tensors import Overriding, Tensors

MOST_BYTES = 4096
"""Of a row's names and values in a line; the features behind are left out."""
MOST_TEXT = 256
"""Characters of one value."""


def row_of(model: Model, inputs: Tensors) -> dict[str, object]:
    """Return the features of one row that are numbers or texts; none where it is not known which are sensitive."""
    signature, sensitive = model.signature, model.sensitive
    if sensitive is None or signature.batch == "none" or isinstance(inputs, Overriding):
        return {}
    shown: dict[str, object] = {}
    size = 0
    for index, feature in enumerate(signature.features):
        if feature.shape or feature.name in sensitive:
            continue
        value = inputs[0].flat[index] if signature.layout == "matrix" else inputs[index].flat[0]
        told: object = str(value)[:MOST_TEXT]
        if isinstance(value, np.floating):  # as short as its own precision, and JSON has nothing that is not finite
            told = float(str(value)) if np.isfinite(value) else None
        elif isinstance(value, np.generic):
            told = value.item()
        size += len(json.dumps({feature.name: told}))
        if size > MOST_BYTES:
            break
        shown[feature.name] = told
    return shown
