"""What operators that move elements do to the rows of a batch: the rules of those that compute nothing."""

from __future__ import annotations

from collections.abc import Sequence

from serving.engine.batch_node import FREE, Node, Rows, State
from serving.tensors import count

_ENDLESS = 10**9
"""As far, or further, do exporters slice where they mean all; no batch has so many rows."""


def reshaped(node: Node) -> Sequence[State]:
    """Reshape, Flatten, Squeeze, Unsqueeze: the elements in their order."""
    state = node.state(0)
    if not isinstance(state, Rows) or any(isinstance(other, Rows) for other in node.inputs[1:]):
        raise node.doubt("takes a shape from the rows")
    shapes = list(zip(node.numbers, node.shapes(0), node.shapes_out(), strict=True))
    if state.padding is not None and any(_longer(before) != _longer(after) for _, before, after in shapes):
        raise node.doubt("reshapes rows that are as long as the longest of the batch")
    places = {_place(state, *shape) for shape in shapes}
    place = places.pop()
    if places or place is None:
        raise node.doubt("reshapes rows into each other")
    return [place]


def _longer(shape: tuple[int, ...]) -> list[int]:
    return [dim for dim in shape if dim != 1]


def _place(state: Rows, rows: int, before: tuple[int, ...], after: tuple[int, ...]) -> Rows | None:
    """Find the rows in an array of another shape; None where no axis of it has them."""
    apart = count(before[state.axis + 1 :]) * state.stride  # elements of one row that follow each other
    for axis, dim in enumerate(after):
        inner = count(after[axis + 1 :])
        if apart and inner and apart % inner == 0 and dim and dim % (rows * (apart // inner)) == 0:
            return Rows(axis, apart // inner, state.padding)
    return None


def transposed(node: Node) -> Sequence[State]:
    """Reorder the axes."""
    rows = node.rows(0)
    order = node.attribute("perm", list(range(node.rank(0)))[::-1])
    return [Rows(list(order).index(rows.axis), rows.stride)]


def resized(node: Node) -> Sequence[State]:
    """Resize by fixed scales, which for the axis of the rows is 1: one of 1.01 leaves a few rows as they are."""
    rows = node.rows(0)
    node.need_free_from(1)
    scales = node.setting("scales", 2, [])
    crops = node.attribute("coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    if len(scales) != node.rank(0) or node.attribute("axes") is not None or crops:
        raise node.doubt("is no plain scale for each axis")
    if scales[rows.axis] != 1:
        raise node.mixes
    return [rows]


def concatenated(node: Node) -> Sequence[State]:
    """Put inputs next to each other, or rows behind rows."""
    rows = node.aligned(range(len(node.inputs)), node.rank_out())
    # Behind each other they are all rows, some times over.
    behind = node.axis(1) == rows.axis
    if behind and not all(isinstance(state, Rows) for state in node.inputs):
        raise node.doubt("puts what is no row behind rows")
    return [rows]


def sliced(node: Node) -> Sequence[State]:
    """Take a part along other axes than that of the rows."""
    rows = node.rows(0)
    node.need_free_from(1)
    starts, ends = node.setting("starts", 1, []), node.setting("ends", 2, [])
    axes = [axis % node.rank(0) for axis in node.setting("axes", 3, range(len(starts)))]
    if rows.axis in axes:
        at = axes.index(rows.axis)
        steps = node.setting("steps", 4)
        if starts[at] != 0 or ends[at] < _ENDLESS or (steps is not None and steps[at] != 1):
            raise node.doubt("takes some of the rows")
    return [rows]


def gathered(node: Node) -> Sequence[State]:
    """Look rows up in a table, or take places along another axis than that of the rows."""
    axis = node.axis(0)
    if node.state(0) is FREE:
        return [node.rows(1).moved(axis)]
    if node.state(1) is not FREE:
        raise node.mixes
    rows = node.rows(0)
    if rows.axis == axis:
        raise node.doubt("takes some of the rows")
    return [rows if rows.axis < axis else rows.moved(node.rank(1) - 1)]


def gathered_elements(node: Node) -> Sequence[State]:
    """Pick, in each row, elements of the same row."""
    rows = node.rows(0)
    if node.rows(1) != rows or node.axis(0) == rows.axis:
        raise node.mixes
    return [rows]


def expanded(node: Node) -> Sequence[State]:
    """Expand, Tile: repeat along other axes than that of the rows."""
    rows = node.rows(0)
    if any(isinstance(state, Rows) for state in node.inputs[1:]):
        raise node.doubt("takes a shape from the rows")
    moved = rows.moved(node.rank_out() - node.rank(0))
    if [s[rows.axis] for s in node.shapes(0)] != [s[moved.axis] for s in node.shapes_out()]:
        raise node.doubt("repeats the rows")
    return [moved]


def padded(node: Node) -> Sequence[State]:
    """Add elements along other axes than that of the rows."""
    rows = node.rows(0)
    node.need_free_from(1)
    pads = node.setting("pads", 1)
    axes = [axis % node.rank(0) for axis in node.setting("axes", 3, range(node.rank(0)))]
    if rows.axis in axes:
        at = axes.index(rows.axis)
        if pads[at] or pads[at + len(axes)]:
            raise node.doubt("pads the rows with others")
    return [rows]


def one_hot(node: Node) -> Sequence[State]:
    """Put an axis for the classes in front of another, or at the end."""
    node.need_free_from(1)
    rows = node.rows(0)
    return [rows.moved(node.attribute("axis", -1) % (node.rank(0) + 1) <= rows.axis)]


def array_features(node: Node) -> Sequence[State]:
    """Pick from the last axis, by a flat list of places."""
    if node.state(0) is FREE:
        rows = node.rows(1)
        strides = {count(shape[rows.axis + 1 :]) * rows.stride for shape in node.shapes(1)}
        if len(strides) != 1:
            raise node.mixes
        return [Rows(node.rank_out() - 1, strides.pop())]
    node.need_free_from(1)
    rows = node.rows(0)
    if rows.axis == node.rank(0) - 1:
        raise node.mixes
    return [rows]
