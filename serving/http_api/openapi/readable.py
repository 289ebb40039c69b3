"""Numbers as a person writes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.engine.signature import Feature, Signature


def readable(value: Any, datatype: str) -> Any:
    """Give an example's value so that JSON has the fewest digits that read back as the same 32-bit float: 5.1, and not
    5.099999904632568.

    value: a number, an array or lists of numbers, or what is neither. Values of other types stay what they are.
    """
    if datatype == "FP32" and isinstance(value, list):
        return np.asarray(value, np.float32)
    return np.float32(value) if datatype == "FP32" and isinstance(value, float) else value


def example(signature: Signature) -> dict[str, Any] | None:
    """Give the row that a signature brings along."""
    if signature.example is None:
        return None
    datatypes = {feature.name: feature.datatype for feature in signature.features}
    return {name: readable(value, datatypes.get(name, "")) for name, value in signature.example.items()}


def described(feature: Feature) -> dict[str, Any]:
    """Give what a feature says of itself."""
    made = feature.model_dump(exclude_none=True)
    return made | {name: readable(made[name], feature.datatype) for name in ("minimum", "maximum") if name in made}
