"""Follows the rows of a batch through an ONNX graph: does each output row depend on its own input row alone?

A rule for each operator says what becomes of the states of values (`batch_node`, `batch_operators`); an operator
without a rule, or a path that its rule does not know, is a Doubt. So the walk may doubt what is well, and lets nothing
pass that mixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from serving.engine.batch_node import FREE, SIZE, Doubt, Node, Rows, State, domain
from serving.engine.batch_operators import DYNAMIC_QUANTISATION, RULES, UNREPEATABLE
from serving.engine.batch_sizes import SIZES
from serving.engine.every_value import Observed, Values, equal


class Walk:
    """One walk over one graph."""

    def __init__(self, model: onnx.ModelProto, runs: Sequence[Observed]) -> None:
        self._graph = model.graph
        self._values = Values(model.graph, runs)
        self._opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
        self._states: dict[str, State] = {tensor.name: FREE for tensor in self._graph.initializer}
        for port in self._graph.input:
            self._states.setdefault(port.name, Rows(0))
        self.quantised: str = ""
        """The first node that takes its scale over all rows; all else is as independent as the walk says."""

    def run(self) -> None:
        """Walk from the inputs to the outputs. Raises Doubt at the first node that leaves one."""
        for proto in _wanted(self._graph):
            self._step(proto)
        for port in self._graph.output:
            lengths = [shape[0] if shape else 0 for shape in self._values.shapes(port.name)]
            if self._states.get(port.name) != Rows(0) or lengths != self._values.numbers:
                raise Doubt(f"output {port.name[:60]!r} does not have one row for each row of input")

    def _step(self, proto: onnx.NodeProto) -> None:
        own = domain(proto)
        key = f"{own}::{proto.op_type}" if own else proto.op_type
        if any(name and name not in self._states for name in proto.input):
            raise Doubt(f"{proto.op_type} takes what no node before it has made")
        given = [self._states[name] for name in proto.input if name]
        node = Node(proto, self._states, self._values, self._opsets.get(own, 1))
        states: Sequence[State]
        if key in UNREPEATABLE:
            raise node.doubt("answers differently each time")
        if _has_graphs(proto):
            raise node.doubt("runs a graph inside the graph")
        if all(state is FREE for state in given):
            if key not in RULES and own not in ("", "ai.onnx.ml", "com.microsoft"):
                raise node.doubt("is not known here")
            states = [FREE]
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
                self._states[name] = self._checked(node, name, states[min(index, len(states) - 1)])

    def _checked(self, node: Node, name: str, state: State) -> State:
        """Check a state against what was seen: a rule that is wrong of shapes must not let rows meet."""
        if state is SIZE:
            arrays = self._values.contents(name)
            if arrays is None:
                raise node.doubt("computes with how many rows there are")
            return FREE if all(equal(arrays[0], array) for array in arrays[1:]) else self._rows_of_size(name)
        if isinstance(state, Rows):
            of_one = set()
            for rows, shape in zip(self._values.numbers, self._values.shapes(name), strict=True):
                length = shape[state.axis] if 0 <= state.axis < len(shape) else 0
                if not length or length % (rows * state.stride):
                    raise node.doubt("gives another number of rows than it takes")
                of_one.add((*shape[: state.axis], length // rows, *shape[state.axis + 1 :]))
            if state.padding is None and len(of_one) > 1:
                raise node.doubt("gives a row another shape where there are more rows")
        return state

    def _rows_of_size(self, name: str) -> State:
        """Say where the rows of a value lie that is the same for each of them, as zeros to begin with are."""
        shapes = self._values.shapes(name)
        counts = [axis for axis in range(len(shapes[0])) if [shape[axis] for shape in shapes] == self._values.numbers]
        if len(counts) == 1 and self._values.repeats(name, counts[0]):
            return Rows(counts[0])
        return SIZE


def _has_graphs(node: onnx.NodeProto) -> bool:
    """Tell whether it is one as If, Loop and Scan are: what their graphs take from around them stands nowhere else."""
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _wanted(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that outputs depend on, in order."""
    wanted = {port.name for port in graph.output}
    found = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(node.input)
    return found[::-1]


def without_rows(graph: onnx.GraphProto) -> set[str]:
    """Return the names of values that no row has a part in, though how many there are may: worth keeping in a run."""
    fixed = {tensor.name for tensor in graph.initializer}
    touched = {port.name for port in graph.input} - fixed
    for node in graph.node:
        tells_size = node.op_type in ("Shape", "Size")
        if _has_graphs(node) or (touched.intersection(node.input) and not tells_size):
            touched.update(node.output)
    return {name for node in graph.node for name in node.output if name} - touched
