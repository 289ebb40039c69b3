"""One node of an ONNX graph as the rules of `batch_operators` see it: where the rows of a batch lie in its inputs.

Each value is in one of three states. `Rows`: what is at an index of one axis depends on one input row. FREE: it
depends on no row, nor on how many there are. SIZE: it depends on how many rows there are, as the output of Shape does,
and on nothing in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import onnx
from onnx import helper

from serving.engine.every_value import Values
from serving.tensors import Array


@dataclass(frozen=True, slots=True)
class Rows:
    """Along `axis`, index i belongs to input row (i // stride) % rows; that covers batch axes merged with others.

    padding: another axis is as long as the longest row needs, as Tokenizer's output is, and this fills the others.
    """

    axis: int
    stride: int = 1
    padding: bytes | None = None

    def moved(self, by: int) -> Rows:
        """Return the same rows where there are so many axes more in front of theirs."""
        return Rows(self.axis + by, self.stride)


@dataclass(frozen=True, slots=True)
class _Plain:
    name: str


FREE: Final = _Plain("free")
SIZE: Final = _Plain("size")
State: TypeAlias = Rows | _Plain


class Doubt(Exception):
    """Rows may meet, or nobody can say that they do not; the text names the node and says why."""


class Node:
    """One node with the states of its inputs; a rule asks it and answers with the states of its outputs."""

    def __init__(self, proto: onnx.NodeProto, states: Mapping[str, State], values: Values, opset: int) -> None:
        self._proto = proto
        self._values = values
        self.kind = proto.op_type
        self.opset = opset
        self.numbers = values.numbers
        self.outputs = len(proto.output)
        self.inputs: list[State | None] = [states[name] if name else None for name in proto.input]
        """None where an optional input is left out."""
        self._attributes = {a.name: a for a in proto.attribute}

    def doubt(self, why: str) -> Doubt:
        """Make the doubt that names this node."""
        name = f" {self._proto.name[:60]!r}" if self._proto.name else ""
        return Doubt(f"{self.kind}{name} {why}")

    @property
    def mixes(self) -> Doubt:
        """The doubt of a node that computes over rows."""
        return self.doubt("computes over several rows")

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value."""
        found = self._attributes.get(name)
        return default if found is None else helper.get_attribute_value(found)

    def setting(self, name: str, index: int, default: Any = None) -> Any:
        """Return what later operator sets take as an input, as a flat list, and earlier ones as an attribute."""
        given = self.constant(index)
        return self.attribute(name, default) if given is None else given.ravel().tolist()

    def axis(self, default: int) -> int:
        """Return the attribute `axis`, counted from the start."""
        axis: int = self.attribute("axis", default)
        return axis % self.rank(0)

    def state(self, index: int) -> State | None:
        """Return the state of an input; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def dependent(self, indexes: Iterable[int]) -> list[int]:
        """Return which of these inputs depend on rows, or on how many there are."""
        return [index for index in indexes if self.state(index) not in (None, FREE)]

    def shapes(self, index: int) -> list[tuple[int, ...]]:
        """Return the shape of an input in each run."""
        return self._values.shapes(self._proto.input[index])

    def shapes_out(self) -> list[tuple[int, ...]]:
        """Return the shape of the first output in each run."""
        return self._values.shapes(self._proto.output[0])

    def rank(self, index: int) -> int:
        """Return how many dimensions an input has."""
        return len(self.shapes(index)[0])

    def rank_out(self) -> int:
        """Return how many dimensions the first output has."""
        return len(self.shapes_out()[0])

    def arrays(self, index: int) -> list[Array]:
        """Return the content of an input that no row has a part in, in each run."""
        found = self._values.contents(self._proto.input[index])
        if found is None:
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
        found = self._values.contents(self._proto.input[index])
        if found is None:
            raise self.doubt("has a setting too large to be looked at")
        return found[0]

    def need_free(self, indexes: Iterable[int]) -> None:
        """Raise Doubt where one of these inputs depends on rows, or on how many there are."""
        for index in self.dependent(indexes):
            raise self.doubt(f"takes its input {index + 1} from the rows")

    def need_free_from(self, first: int) -> None:
        """Raise Doubt where an input from `first` on depends on rows, or on how many there are."""
        self.need_free(range(first, len(self.inputs)))

    def rows(self, index: int, axis: int | None = None) -> Rows:
        """Return the rows of an input, which must lie along `axis` where that is given; else raise Doubt."""
        state = self.state(index)
        if not isinstance(state, Rows):
            raise self.doubt(f"has no rows in its input {index + 1}")
        if axis is not None and state.axis != axis:
            raise self.mixes
        if state.padding is not None:
            raise self.doubt("takes rows that are as long as the longest of the batch")
        return state

    def alike(self, indexes: Iterable[int], axis: int = 0) -> Rows:
        """Return the rows of inputs that lie alike along `axis`; those that are left out are passed over."""
        found = {self.rows(index, axis) for index in indexes if self.state(index) is not None}
        if len(found) != 1:
            raise self.mixes
        return found.pop()

    def aligned(self, indexes: Iterable[int], rank: int) -> Rows:
        """Return where the rows of inputs lie that are broadcast against each other to `rank` dimensions.

        Raises Doubt where they do not lie along each other.
        """
        given = self.dependent(indexes)
        found = {self.rows(i).moved(rank - self.rank(i)) for i in given if isinstance(self.state(i), Rows)}
        if len(found) != 1:
            raise self.mixes
        rows = found.pop()
        for i in given:
            own = rows.moved(self.rank(i) - rank)
            if self.state(i) is SIZE and not self._values.repeats(self._proto.input[i], own.axis, own.stride):
                raise self.doubt("computes with how many rows there are, or with their positions")
        return rows


def domain(node: onnx.NodeProto) -> str:
    """Return the domain of a node's operator; ONNX's own has two names."""
    return "" if node.domain == "ai.onnx" else node.domain
