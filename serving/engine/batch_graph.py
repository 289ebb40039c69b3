"""Follows the rows of a batch through an ONNX graph: does each output row depend on its own input row alone?

Each value is in one of three states. `Rows`: what stands at an index of one axis depends on one input row. FREE: it
depends on no row, nor on how many there are. SIZE: it depends on how many rows there are, as the output of Shape does,
and on nothing in them. A rule for each operator says what becomes of that (`batch_operators`); an operator without a
rule, or a path that its rule does not know, is a Doubt. So the walk may doubt what is well, and passes nothing that
mixes.

Shapes are not inferred: the graph was run with all its values as outputs, at several numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from serving.tensors import Array, count


@dataclass(frozen=True, slots=True)
class Rows:
    """Along `axis`, index i belongs to input row (i // stride) % rows; that covers batch axes merged with others.

    padding: another axis is as long as the longest row needs, as Tokenizer's output is, and this fills the others.
    """

    axis: int
    stride: int = 1
    padding: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Plain:
    name: str


FREE: Final = _Plain("free")
SIZE: Final = _Plain("size")
State: TypeAlias = Rows | _Plain

_SMALL = 65536
"""Elements of a weight up to which its content is looked at."""


class Doubt(Exception):
    """Rows may meet, or nobody can say that they do not; the text names the node and says why."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One run: how many rows it had, the shape of each value, and those values that no row has a part in.

    A sequence counts as one dimension.
    """

    rows: int
    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Array]


class Node:
    """One node of the graph, with what the walk knows of its inputs; rules ask it and answer with states."""

    def __init__(self, proto: onnx.NodeProto, walk: Walk) -> None:
        self._proto = proto
        self._walk = walk
        self.kind = proto.op_type
        self.domain = _domain(proto)
        self._attributes = {a.name: a for a in proto.attribute}
        self.inputs: list[State | None] = [walk.states[name] if name else None for name in proto.input]
        """None where an optional input is left out."""

    def doubt(self, why: str) -> Doubt:
        """Make the doubt that names this node."""
        name = f" {self._proto.name[:60]!r}" if self._proto.name else ""
        return Doubt(f"{self.kind}{name} {why}")

    @property
    def mixes(self) -> Doubt:
        """The doubt of a node that computes over rows."""
        return self.doubt("computes over several rows")

    @property
    def opset(self) -> int:
        """Version of the node's operator set."""
        return self._walk.opsets.get(self.domain, 1)

    @property
    def outputs(self) -> int:
        """How many outputs it has."""
        return len(self._proto.output)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value."""
        found = self._attributes.get(name)
        return default if found is None else helper.get_attribute_value(found)

    def state(self, index: int) -> State | None:
        """Return the state of an input; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def shapes(self, index: int) -> list[tuple[int, ...]]:
        """Return the shape of an input in each run."""
        return self._walk.shapes(self._proto.input[index])

    def shapes_out(self, index: int = 0) -> list[tuple[int, ...]]:
        """Return the shape of an output in each run."""
        return self._walk.shapes(self._proto.output[index])

    def rank(self, index: int) -> int:
        """Return how many dimensions an input has."""
        return len(self.shapes(index)[0])

    def rank_out(self, index: int = 0) -> int:
        """Return how many dimensions an output has."""
        return len(self.shapes_out(index)[0])

    def axis(self, value: int, rank: int) -> int:
        """Make an axis that may count from the end count from the start."""
        return value + rank if value < 0 else value

    @property
    def numbers(self) -> list[int]:
        """How many rows each run had."""
        return self._walk.numbers

    def arrays(self, index: int) -> list[Array]:
        """Return the content of an input that no row has a part in, in each run."""
        found = [array for array in self._walk.values(self._proto.input[index]) if array is not None]
        if len(found) < len(self.numbers):
            raise self.doubt("computes with how many rows there are")
        return found

    def constant(self, index: int) -> Array | None:
        """Return the value of an input that is the same in every run; None where it is left out.

        Raises Doubt where it is not the same, or too large to be looked at.
        """
        if self.state(index) is None:
            return None
        if self.state(index) is not FREE:
            raise self.doubt("takes from the rows what should be fixed")
        value = self._walk.values(self._proto.input[index])[0]
        if value is None:
            raise self.doubt("has a setting too large to be looked at")
        return value

    def need_free(self, *indexes: int) -> None:
        """Raise Doubt where one of these inputs depends on rows, or on how many there are."""
        for index in indexes:
            if self.state(index) not in (None, FREE):
                raise self.doubt(f"takes its input {index + 1} from the rows")

    def rows(self, index: int, axis: int | None = None) -> Rows:
        """Return the rows of an input, which must lie along `axis` where that is given; else raise Doubt.

        What depends only on how many rows there are counts too, where it is the same for each row.
        """
        state = self.state(index)
        if state is SIZE and axis is not None and self._walk.repeats(self._proto.input[index], Rows(axis)):
            return Rows(axis)
        if not isinstance(state, Rows):
            raise self.doubt(f"has no rows in its input {index + 1}")
        if axis is not None and state.axis != axis:
            raise self.mixes
        if state.padding is not None:
            raise self.doubt("takes rows that are as long as the longest of the batch")
        return state

    def alike(self, indexes: Sequence[int], axis: int = 0) -> Rows:
        """Return the rows of inputs that lie alike along `axis`; those that are left out are passed over."""
        found = {self.rows(index, axis) for index in indexes if self.state(index) is not None}
        if len(found) != 1:
            raise self.mixes
        return found.pop()

    def aligned(self, indexes: Iterator[int] | Sequence[int], rank: int) -> Rows | None:
        """Return where the rows of inputs lie that are broadcast against each other to `rank` dimensions.

        None where none has rows. Raises Doubt where they do not lie along each other.
        """
        found: Rows | None = None
        indexes = [index for index in indexes if self.state(index) is not None]
        for index in indexes:
            state = self.state(index)
            if isinstance(state, Rows):
                there = Rows(state.axis + rank - self.rank(index), state.stride, state.padding)
                if found is not None and (found.axis, found.stride) != (there.axis, there.stride):
                    raise self.mixes
                found = there if found is None or there.padding is not None else found
        for index in indexes:
            if found is None or self.state(index) is not SIZE:
                continue
            own = Rows(found.axis - (rank - self.rank(index)), found.stride)
            if not self._walk.repeats(self._proto.input[index], own):
                raise self.doubt("computes with how many rows there are, or with their positions")
        return found

    def reshaped(self, state: Rows) -> Rows:
        """Return where the rows of the first input are in the first output, which has its elements in their order."""
        if state.padding is not None and any(map(_reshapes, self.shapes(0), self.shapes_out())):
            raise self.doubt("reshapes rows that are as long as the longest of the batch")
        places = []
        for rows, before, after in zip(self._walk.numbers, self.shapes(0), self.shapes_out(), strict=True):
            apart = count(before[state.axis + 1 :]) * state.stride  # elements of one row that follow each other
            place = None
            for axis, dim in enumerate(after):
                inner = count(after[axis + 1 :])
                if apart and inner and apart % inner == 0 and dim and dim % (rows * (apart // inner)) == 0:
                    place = Rows(axis, apart // inner, state.padding)
                    break
            places.append(place)
        if None in places or len(set(places)) != 1:
            raise self.doubt("reshapes rows into each other")
        assert places[0] is not None  # noqa: S101  told to mypy
        return places[0]


def _reshapes(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Tell whether two shapes differ in more than dimensions of length 1."""
    return [d for d in before if d != 1] != [d for d in after if d != 1]


Rule: TypeAlias = Callable[[Node], Sequence[State]]
"""Says the state of each output of a node of which an input has rows; fewer states than outputs: the last is theirs."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is known of operators. Keys are `Kind`, or `domain::Kind` outside of ONNX's own domain."""

    by_kind: Mapping[str, Rule]
    of_sizes: Mapping[str, Callable[[Node], bool]]
    """May compute with the number of rows, where this says that the node jumps at none (`batch_sizes`)."""
    unrepeatable: frozenset[str]
    dynamic_quantisation: frozenset[str]


class Walk:
    """One walk over one graph."""

    def __init__(self, model: onnx.ModelProto, runs: Sequence[Observed], rules: Rules) -> None:
        self._graph = model.graph
        self._runs = runs
        self._rules = rules
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
        domain = _domain(proto)
        key = f"{domain}::{proto.op_type}" if domain else proto.op_type
        subgraphs = _subgraphs(proto)
        given = self._given(proto, subgraphs)
        node = Node(proto, self)
        if key in self._rules.unrepeatable:
            raise node.doubt("answers differently each time")
        if all(state is FREE for state in given):
            if key not in self._rules.by_kind and domain not in ("", "ai.onnx.ml", "com.microsoft"):
                raise node.doubt("is not known here")
            states: Sequence[State] = [FREE]
        elif subgraphs:
            raise node.doubt("runs a graph inside the graph over the rows")
        elif not any(isinstance(state, Rows) for state in given):
            even = self._rules.of_sizes.get(key)
            if even is None or not even(node):
                raise node.doubt("computes with how many rows there are")
            states = [SIZE]
        else:
            rule = self._rules.by_kind.get(key)
            if rule is None:
                raise node.doubt("is not known to keep rows apart")
            if key in self._rules.dynamic_quantisation and not self.quantised:
                self.quantised = str(node.doubt("takes its scale over all rows of the batch"))
            states = rule(node)
        for index, name in enumerate(proto.output):
            if name:
                self.states[name] = self._settled(node, name, states[min(index, len(states) - 1)])

    def _given(self, proto: onnx.NodeProto, subgraphs: Sequence[onnx.GraphProto]) -> list[State]:
        """Return the states of all that a node takes, its graphs from around them too."""
        outer = [name for graph in subgraphs for name in _captured(graph) if name in self._names]
        names = [name for name in (*proto.input, *outer) if name]
        if any(name not in self.states for name in names):
            raise Doubt(f"{proto.op_type} stands before a node that it takes from")
        return [self.states[name] for name in names]

    def _rows_of_size(self, name: str) -> State:
        """Say where the rows of a value lie that is the same for each of them, as zeros to begin with are."""
        shapes = self.shapes(name)
        counts = [axis for axis in range(len(shapes[0])) if [shape[axis] for shape in shapes] == self.numbers]
        whole = len({shape[:axis] + shape[axis + 1 :] for shape in shapes for axis in counts[:1]}) == 1
        if len(counts) == 1 and whole and self.repeats(name, Rows(counts[0])):
            return Rows(counts[0])
        return SIZE

    def _settled(self, node: Node, name: str, state: State) -> State:
        """Check a state against what was seen."""
        if state is SIZE:
            arrays = self.values(name)
            if any(array is None for array in arrays):
                raise node.doubt("computes with how many rows there are")
            if all(_same(arrays[0], array) for array in arrays[1:]):
                return FREE
            return self._rows_of_size(name)
        if isinstance(state, Rows):
            for rows, shape in zip(self.numbers, self.shapes(name), strict=True):
                if (
                    not 0 <= state.axis < len(shape)
                    or not shape[state.axis]
                    or shape[state.axis] % (rows * state.stride)
                ):
                    raise node.doubt("gives another number of rows than it takes")
            seen = zip(self.numbers, self.shapes(name), strict=True)
            if state.padding is None and len({_of_one(state, rows, shape) for rows, shape in seen}) > 1:
                raise node.doubt("gives a row another shape where there are more rows")
        return state


def _of_one(at: Rows, rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that each row has in a value."""
    return (*shape[: at.axis], shape[at.axis] // rows, *shape[at.axis + 1 :])


def _domain(node: onnx.NodeProto) -> str:
    """Return the domain of a node's operator; ONNX's own has two names."""
    return "" if node.domain == "ai.onnx" else node.domain


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
