"""What breaks callers is found by comparing two signatures, and nothing else is called breaking."""

from __future__ import annotations

from typing import Any

import pytest

from serving.engine.signature import Feature, Signature, TensorSpec
from serving.gate.compatibility import breaking


def features(*names: str, **changes: Any) -> tuple[Feature, ...]:
    first, *rest = names
    return (
        Feature(name=first, datatype="FP32").model_copy(update=changes),
        *(Feature(name=n, datatype="FP32") for n in rest),
    )


def signature(feats: tuple[Feature, ...] = features("a", "b"), **changes: Any) -> Signature:
    """Make a classifier of two columns; `changes` replace fields."""
    fields: dict[str, Any] = {
        "task": "classification",
        "inputs": (TensorSpec(name="x", datatype="FP32", shape=(-1, len(feats))),),
        "outputs": (
            TensorSpec(name="label", datatype="BYTES", shape=(-1,)),
            TensorSpec(name="scores", datatype="FP32", shape=(-1, 2)),
        ),
        "layout": "matrix",
        "features": feats,
        "label": "label",
        "scores": "scores",
        "classes": ("no", "yes"),
    }
    return Signature(**(fields | changes))


X3 = (TensorSpec(name="x", datatype="FP32", shape=(-1, 3)),)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            signature(),
            signature(features("a", "c")),
            ["features are gone: b", "features are new, and callers do not send them: c"],
        ),
        (signature(), signature(features("b", "a")), ["the features are in another order"]),
        (signature(), signature(features("a", "b", "c")), ["are new", "tensor 'x' had shape"]),
        (signature(), signature(features("a", "b", datatype="INT64")), ["feature 'a' was FP32 and is INT64"]),
        (signature(), signature(features("a", "b", datatype="FP64")), []),
        (signature(features("a", "b", datatype="FP64")), signature(), ["feature 'a' was FP64 and is FP32"]),
        (signature(features("a", "b", nullable=True)), signature(), ["could be missing"]),
        (signature(), signature(features("a", "b", nullable=True)), []),
        (signature(features("a", "b", allow_non_finite=True)), signature(), ["not finite"]),
        (
            signature(),
            signature(features("a", "b", categories=(1, 2), unknown_category="refuse")),
            ["refuses unknown categories"],
        ),
        (
            signature(features("a", "b", categories=(1, 2, 3), unknown_category="refuse")),
            signature(features("a", "b", categories=(1, 2), unknown_category="refuse")),
            ["refuses categories that it took: 3"],
        ),
        (
            signature(features("a", "b", categories=(1, 2), unknown_category="refuse")),
            signature(features("a", "b", categories=(1, 2, 3), unknown_category="refuse")),
            [],
        ),
        (
            signature(),
            signature(inputs=(TensorSpec(name="y", datatype="FP32", shape=(-1, 2)),)),
            ["input tensor 'x' is gone"],
        ),
        (
            signature(),
            signature(inputs=(TensorSpec(name="x", datatype="FP64", shape=(-1, 2)),)),
            ["was FP32 and is FP64"],
        ),
        (
            signature(),
            signature(inputs=(TensorSpec(name="x", datatype="FP32", shape=(1, 2)),)),
            ["had shape [-1, 2] and has [1, 2]"],
        ),
        (signature(), signature(classes=("no", "maybe")), ["classes are gone: yes"]),
        (signature(), signature(classes=("yes", "no")), ["classes are in another order"]),
        (signature(), signature(classes=("no", "yes", "maybe")), []),
        (signature(), signature(task="other"), ["the task was classification"]),
        (signature(), signature(label=None), ["the label was output 'label'"]),
        (signature(), signature(description="better", metrics={"accuracy": 1.0}), []),
    ],
)
def test_what_breaks_callers_is_named(old: Signature, new: Signature, says: list[str]) -> None:
    """Each difference that a caller would notice is a sentence; what only adds is none."""
    found = breaking(old, new)
    assert len(found) == len(says), found
    for part, sentence in zip(says, found, strict=True):
        assert part in sentence
    assert breaking(new, new) == []
