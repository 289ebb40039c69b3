"""Follows the rows of a batch through an ONNX graph: does each output row depend on its own input row alone?

A rule for each operator says what becomes of the states of values (`batch_node`, `batch_operators`); an operator
without a rule, or a path that its rule does not know, is a Doubt. So the walk may doubt what is well, and lets nothing
pass that mixes.

Shapes are not inferred: the graph was run with all its values as outputs, at several numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from serving.engine.batch_node import FREE, SIZE, Doubt, Node, Rows, State, domain
from serving.engine.batch_operators import DYNAMIC_QUANTISATION, RULES, UNREPEATABLE
from serving.engine.batch_sizes import SIZES
from serving.tensors import Array, count

_SMALL = 65536
"""Elements of a weight up to which its content is looked at."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One run: how many rows it had, the shape of each value, and those values that no row has a part in.

    A sequence counts as one dimension.
    """

    rows: int
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Array]


class Walk:
    """One walk over one graph."""

    def __init__(self, model: onnx.ModelProto, runs: Sequence[Observed]) -> None:
        self._graph = model.graph
        self._runs = runs
        self.numbers = [run.rows for run in runs]
        self.opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
        self._initializers = {tensor.name: tensor for tensor in self._graph.initializer}
        self.states: dict[str, State] = dict.fromkeys(self._initializers, FREE)
        self.states |= {tensor.values.name: FREE for tensor in self._graph.sparse_initializer}
        for port in self._graph.input:
            self.states.setdefault(port.name, Rows(0))
        self._names = {name for node in self._graph.node for name in node.output} | set(self.states)
        self.quantised: str = ""
        """The first node that takes its scale over all rows; all else is as independent as the walk says."""

    def run(self) -> None:
        """Walk from the inputs to the outputs. Raises Doubt at the first node that leaves one."""
        for proto in _wanted(self._graph):
            self._step(proto)
        for port in self._graph.output:
            state = self.states.get(port.name, FREE)
            shapes = self.shapes(port.name)
            lengths = [shape[0] if shape else 0 for shape in shapes]
            if state is SIZE and self.repeats(port.name, Rows(0)):
                state = Rows(0)
            if state != Rows(0) or lengths != self.numbers:
                raise Doubt(f"output {port.name[:60]!r} does not have one row for each row of input")

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Return the shape of a value in each run."""
        if name in self._initializers:
            return [tuple(self._initializers[name].dims)] * len(self._runs)
        return [run.shapes[name] for run in self._runs]

    def values(self, name: str) -> list[Array | None]:
        """Return the content of a value in each run; None where it was not kept."""
        tensor = self._initializers.get(name)
        if tensor is not None:
            small = count(tuple(tensor.dims)) <= _SMALL and not tensor.external_data
            return [numpy_helper.to_array(tensor) if small else None] * len(self._runs)
        return [run.arrays.get(name) for run in self._runs]

    def repeats(self, name: str, at: Rows) -> bool:
        """Tell whether a value is the same for each row, however many there are; its rows would lie as `at` says."""
        seen = []
        for rows, array in zip(self.numbers, self.values(name), strict=True):
            if array is None:
                return False
            if at.axis < 0 or array.shape[at.axis] == 1:
                seen.append(array)
                continue
            dim, period = array.shape[at.axis], rows * at.stride
            if dim % period:
                return False
            shape = (*array.shape[: at.axis], dim // period, rows, at.stride, *array.shape[at.axis + 1 :])
            each = np.moveaxis(array.reshape(shape), at.axis + 1, 0)
            if not all(_same(each[0], row) for row in each[1:]):
                return False
            seen.append(each[0])
        return all(_same(seen[0], other) for other in seen[1:])

    def _step(self, proto: onnx.NodeProto) -> None:
        own = domain(proto)
        key = f"{own}::{proto.op_type}" if own else proto.op_type
        subgraphs = _subgraphs(proto)
        given = self._given(proto, subgraphs)
        node = Node(proto, self)
        states: Sequence[State]
        if key in UNREPEATABLE:
            raise node.doubt("answers differently each time")
        if all(state is FREE for state in given):
            if key not in RULES and own not in ("", "ai.onnx.ml", "com.microsoft"):
                raise node.doubt("is not known here")
            states = [FREE]
        elif subgraphs:
            raise node.doubt("runs a graph inside the graph over the rows")
        elif not any(isinstance(state, Rows) for state in given):
            if key not in SIZES or not SIZES[key](node):
                raise node.doubt("computes with how many rows there are")
            states = [SIZE]
        elif key in RULES:
            states = RULES[key](node)
            if key in DYNAMIC_QUANTISATION and not self.quantised:
                self.quantised = str(node.doubt("takes its scale over all rows of the batch"))
        else:
            raise node.doubt("is not known to keep rows apart")
        for index, name in enumerate(proto.output):
            if name:
                self.states[name] = self._checked(node, name, states[min(index, len(states) - 1)])

    def _given(self, proto: onnx.NodeProto, subgraphs: Sequence[onnx.GraphProto]) -> list[State]:
        """Return the states of all that a node takes, its graphs from around them too."""
        outer = [name for graph in subgraphs for name in _captured(graph) if name in self._names]
        names = [name for name in (*proto.input, *outer) if name]
        if any(name not in self.states for name in names):
            raise Doubt(f"{proto.op_type} comes before a node that it takes from")
        return [self.states[name] for name in names]

    def _checked(self, node: Node, name: str, state: State) -> State:
        """Check a state against what was seen."""
        if state is SIZE:
            arrays = self.values(name)
            if any(array is None for array in arrays):
                raise node.doubt("computes with how many rows there are")
            return FREE if all(_same(arrays[0], array) for array in arrays[1:]) else self._rows_of_size(name)
        if isinstance(state, Rows):
            of_one = set()
            for rows, shape in zip(self.numbers, self.shapes(name), strict=True):
                length = shape[state.axis] if 0 <= state.axis < len(shape) else 0
                if not length or length % (rows * state.stride):
                    raise node.doubt("gives another number of rows than it takes")
                of_one.add((*shape[: state.axis], length // rows, *shape[state.axis + 1 :]))
            if state.padding is None and len(of_one) > 1:
                raise node.doubt("gives a row another shape where there are more rows")
        return state

    def _rows_of_size(self, name: str) -> State:
        """Say where the rows of a value lie that is the same for each of them, as zeros to begin with are."""
        shapes = self.shapes(name)
        counts = [axis for axis in range(len(shapes[0])) if [shape[axis] for shape in shapes] == self.numbers]
        if len(counts) == 1 and self.repeats(name, Rows(counts[0])):
            return Rows(counts[0])
        return SIZE


def _same(one: Array | None, other: Array | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"))


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in (a.g, *a.graphs) if g.node or g.output]


def _wanted(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that outputs depend on, in order."""
    wanted = {port.name for port in graph.output}
    found = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(node.input, *map(_captured, _subgraphs(node)))
    return found[::-1]


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    """Give the names that a graph may take from the one around it."""
    for node in graph.node:
        yield from (name for name in node.input if name)
        for inner in _subgraphs(node):
            yield from _captured(inner)
    yield from (port.name for port in graph.output)


def without_rows(graph: onnx.GraphProto) -> set[str]:
    """Return the names of values that no row has a part in, though how many there are may: worth keeping in a run."""
    fixed = {tensor.name for tensor in graph.initializer}
    touched = {port.name for port in graph.input} - fixed
    for node in graph.node:
        given = {*node.input, *(name for inner in _subgraphs(node) for name in _captured(inner))}
        if node.op_type not in ("Shape", "Size") and touched.intersection(given):
            touched.update(node.output)
    return {name for node in graph.node for name in node.output if name} - touched
