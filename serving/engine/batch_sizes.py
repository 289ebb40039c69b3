"""What may be computed of how many rows there are: only what grows evenly with them.

A walk sees a few numbers of rows. What is the same at all of these may be another at some larger one, as n // 100 is:
then a batch would answer otherwise than its requests alone. So each operator here keeps sums of the number of rows
(a * n + b, in whole numbers), and everything that rounds, cuts off or compares is a Doubt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from serving.engine.batch_node import FREE, Node

_WHOLE = (TensorProto.INT32, TensorProto.INT64)
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)
_MOST = 2**31


def _any(_node: Node) -> bool:
    """Move elements, or repeat them by a shape."""
    return True


def _whole(node: Node) -> bool:
    """Sums: floats would round, and show it at some number only."""
    return all(array.dtype.kind == "i" for index in range(len(node.inputs)) for array in node.arrays(index))


def _scaled(node: Node) -> bool:
    """Multiply by what is fixed: products of sizes may be equal at those numbers that are seen."""
    return _whole(node) and node.inputs.count(FREE) == len(node.inputs) - 1


def _cast(node: Node) -> bool:
    """Change the type where that neither rounds nor wraps."""
    before, to = node.arrays(0)[0].dtype.kind, node.attribute("to")
    return to in _FLOATS or (to in _WHOLE and before in "ib")


def _part(node: Node) -> bool:
    """Gather, Slice, Split: a fixed part of a list of fixed length, as a shape is."""
    return all(state in (None, FREE) for state in node.inputs[1:]) and len(set(node.shapes(0))) == 1


def _product(node: Node) -> bool:
    """Multiply a list, of fixed length, of dimensions of which one counts rows."""
    if not (_part(node) and _whole(node)):
        return False
    each = zip(*(array.ravel().tolist() for array in node.arrays(0)), strict=True)
    return sum(len(set(values)) > 1 for values in each) <= 1


def _never_equal(node: Node) -> bool:
    """Compare sizes with what none of them ever is, as exporters do: they grow from 0 or more, and are never below."""
    fixed = [index for index, state in enumerate(node.inputs) if state is FREE]
    if len(fixed) != 1 or not _whole(node) or not (node.arrays(fixed[0])[0] < 0).all():
        return False
    sizes = node.arrays(1 - fixed[0])
    if len({array.shape for array in sizes}) != 1:
        return False
    first, second = (array.astype(np.int64) for array in sizes[:2])
    each = (second - first) // (node.numbers[1] - node.numbers[0])
    return bool((each >= 0).all() and (first - each * node.numbers[0] >= 0).all() and (second < _MOST).all())


_MOVED = "Concat ConstantOfShape Expand Flatten Identity Reshape Shape Squeeze Tile Transpose Unsqueeze Where"

SIZES: dict[str, Callable[[Node], bool]] = {
    **dict.fromkeys(("Add", "Neg", "Sub"), _whole),
    **dict.fromkeys(("Gather", "Slice", "Split"), _part),
    **dict.fromkeys(_MOVED.split(), _any),
    "Cast": _cast,
    "Equal": _never_equal,
    "Mul": _scaled,
    "ReduceProd": _product,
}
"""By operator: whether a node of which an input is a size, and none has rows, gives what grows evenly."""
