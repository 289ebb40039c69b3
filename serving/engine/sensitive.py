"""Signatures that tell nothing of a single person where a feature is sensitive.

A signature has rows of training, ranges and categories, and servers show them. Of sensitive features only what the
histogram of training tells of many rows is kept; values in rows are taken from there, and are nobody's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import accumulate
from typing import Any

import numpy as np

from serving.engine.signature import Feature, Golden, Reference, Signature
from serving.tensors import INTEGERS

COMMON_ROWS = 10
"""Rows of training that have a category which is told."""


def veiled(signature: Signature, names: Collection[str]) -> Signature:
    """Return a signature whose features of these names are marked, and have no single row's values.

    The outputs of its golden rows are left out, since they answered others. The categories of a feature that refuses
    unknown ones stay: they are what its callers may send.
    """
    features = {feature.name: feature for feature in signature.features if feature.name in names}
    if not features:
        return signature
    closed = {name for name, feature in features.items() if feature.unknown_category == "refuse"}
    known = {r.name: r if r.name in closed else _coarse(r) for r in signature.reference if r.name in features}
    chance = np.random.default_rng(0)

    def row(given: dict[str, Any], share: float | None = None) -> dict[str, Any]:
        stand_ins = {
            name: _value(features[name], known.get(name), chance.random() if share is None else share)
            for name in given
            if name in features
        }
        return given | stand_ins

    golden = signature.golden
    return signature.model_copy(
        update={
            "features": tuple(_marked(f, known.get(f.name)) if f.name in features else f for f in signature.features),
            "reference": tuple(r for one in signature.reference if (r := known.get(one.name, one)) is not None),
            "example": None if signature.example is None else row(signature.example, 0.5),
            "golden": golden and Golden(rows=tuple(map(row, golden.rows)), outputs={}, tolerance=golden.tolerance),
            "background": tuple(map(row, signature.background)),
        }
    )


def _coarse(reference: Reference) -> Reference | None:
    """Return a histogram without its least and greatest value, and without rare categories; None if none is left."""
    if reference.edges is not None:
        low, high = _outward(reference.edges[0], reference.edges[-1])
        return reference.model_copy(update={"edges": (low, *reference.edges[1:-1], high)})
    counted = zip(reference.categories or (), reference.counts, strict=True)
    common = {value: count for value, count in counted if count >= COMMON_ROWS or isinstance(value, bool)}
    rare = sum(reference.counts) - sum(common.values())
    counts = tuple(common.values())
    return (
        reference.model_copy(update={"categories": tuple(common), "counts": counts, "other": reference.other + rare})
        if common
        else None
    )


def _outward(low: float, high: float) -> tuple[float, float]:
    """Widen a range to whole steps of its magnitude: 18.3 to 79 becomes 10 to 80."""
    span = high - low
    if not 0 < span < math.inf:
        return low, high
    step = 10.0 ** math.floor(math.log10(span))
    return float(f"{math.floor(low / step) * step:.12g}"), float(f"{math.ceil(high / step) * step:.12g}")


def _marked(feature: Feature, reference: Reference | None) -> Feature:
    """Mark a feature as sensitive; what is said of it are a wider range, and categories that many have."""
    told: dict[str, Any] = {"sensitive": True}
    if feature.minimum is not None and feature.maximum is not None:
        told["minimum"], told["maximum"] = _outward(feature.minimum, feature.maximum)
    if feature.categories is not None and feature.unknown_category == "accept":
        told["categories"] = reference.categories if reference is not None else None
    return feature.model_copy(update=told)


def _value(feature: Feature, reference: Reference | None, share: float) -> Any:
    """Return the value that this share of the histogram's rows is below; without one, any value that is taken."""
    if reference is not None and reference.edges is not None:
        # Between two values each, but for the outermost, which a single row may have had.
        cuts = reference.edges[1:-1] or (reference.edges[0] / 2 + reference.edges[-1] / 2,)
        cut = cuts[int(share * len(cuts))]
        return round(cut) if feature.datatype in INTEGERS else cut
    if reference is not None and reference.categories:
        ends = np.array(list(accumulate(reference.counts)))
        return reference.categories[int(np.searchsorted(ends, share * ends[-1], side="right"))]
    if feature.categories:
        return feature.categories[0]
    if feature.nullable and not feature.shape:
        return None
    blank = {"BYTES": "text", "BOOL": False}.get(feature.datatype, 0)
    return np.full([1 if dim == -1 else dim for dim in feature.shape], blank, object).tolist()
