"""Proves that a model's rows are independent: f(a ++ b) = f(a) ++ f(b), by its graph and by trying.

Both must agree. The graph says it for all inputs, where each operator on the way is known to keep rows apart; the
trial says it for the runtime that will serve, on distinct rows that are like real ones. Either one in doubt, requests
run alone. Only for a process that a model may end: it runs the model many times.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, inliner

from serving.engine import runtime
from serving.engine.batch_graph import Walk
from serving.engine.batch_node import Doubt
from serving.engine.batching import Independence
from serving.engine.every_value import EveryValue
from serving.engine.probe_rows import MadeUpRows
from serving.engine.session import OnnxSession
from serving.errors import InferenceFailed
from serving.tensors import Array, Tensors

_MANY = 48
"""Rows of the largest batch that is tried."""
_EXACT, _COARSE = 1e-4, 5e-2
"""Largest difference, relative to the largest answer: of floats, and where the graph rounds to 16 or 8 bits."""
_REFUSALS_S = 1.0
"""Seconds for which shapes are tried together that are refused alone."""
_NAMED_BY_TOOLS = re.compile("unk__")
"""Names of dimensions that tf2onnx makes up, another one for each that has none."""
_TAKEN = {
    "one": "its first dimension is fixed at 1",
    "none": "its first dimension does not count rows",
}


_FAILURES: tuple[type[Exception], ...] = (*runtime.ERRORS, InferenceFailed, MemoryError)


class _Effort(NamedTuple):
    """How much is tried of a model, by how long it takes for two rows, in seconds."""

    run_s: float
    seeds: int
    rows: int
    many: bool
    walked: tuple[int, ...]
    """Numbers of rows with which its graph is walked."""


_EFFORTS = (
    _Effort(0.01, seeds=3, rows=7, many=True, walked=(2, 3, 5)),
    _Effort(0.2, seeds=2, rows=5, many=False, walked=(2, 3, 5)),
    _Effort(10.0, seeds=1, rows=3, many=False, walked=(2, 3)),
)


def prove(session: OnnxSession, path: Path) -> Independence:
    """Prove it for the model in a file, which `session` has loaded. Never raises for what lies in it."""
    batch = session.signature.batch
    if batch != "dynamic":
        return Independence(proved=False, reason=_TAKEN[batch])
    try:
        return _Proof(session, path).run()
    except Doubt as doubt:
        return Independence(proved=False, reason=str(doubt))
    except _FAILURES as error:
        what = runtime.first_line(error).replace(str(path.parent), "")[:200]
        return Independence(proved=False, reason=f"its rows can't be tried: {what or type(error).__name__}")


class _Proof:
    def __init__(self, session: OnnxSession, path: Path) -> None:
        self._session = session
        self._folder = path.parent
        self._model = onnx.load(str(path), load_external_data=False)
        if self._model.functions:
            self._model = inliner.inline_local_functions(self._model)
        self._tolerance = _COARSE if _rounds(self._model) else _EXACT
        self._made = MadeUpRows(session.signature, session.dimension_names, self._takes)

    def run(self) -> Independence:
        if not self._made.inner:
            raise Doubt("it takes no made-up rows, so its own can't be tried")
        began = time.monotonic()
        self._session.run(self._made.make(2, seed=0, inner=self._made.inner[-1]))
        taken = time.monotonic() - began
        effort = next((effort for effort in _EFFORTS if taken <= effort.run_s), None)
        if effort is None:
            raise Doubt(f"it takes {taken:.0f} s for two rows, too long to try more")
        self._refuse_unequal()
        self._refuse_together(effort)
        quantised = self._walk(effort.walked)
        self._try(effort, quantised=bool(quantised))
        return Independence(proved=not quantised, quantised=bool(quantised), reason=quantised)

    def _takes(self, inputs: Tensors) -> bool:
        try:
            self._session.run(inputs)
        except InferenceFailed:
            return False
        return True

    def _refuse_unequal(self) -> None:
        """Try inputs with different numbers of rows, where their graph names these differently: a batch has one."""
        names = [of[0] if of else None for of in self._session.dimension_names]
        few, many = (self._made.make(rows, seed=0, inner=self._made.inner[0]) for rows in (1, 3))
        for index, name in enumerate(names):
            if name is None or name == names[0] or _NAMED_BY_TOOLS.match(name):
                continue
            for one, other in ((few, many), (many, few)):
                if self._takes((*one[:index], other[index], *one[index + 1 :])):
                    spec = self._session.signature.inputs[index]
                    raise Doubt(f"input {spec.name[:60]!r} may have another number of rows than the first")

    def _refuse_together(self, effort: _Effort) -> None:
        """Try together what is refused alone: rows of ten elements that are cut in sevens fit once there are seven."""
        most = _MANY // 2 if effort.many else effort.rows
        until = time.monotonic() + _REFUSALS_S
        for rows in range(2, most + 1):
            for inner in self._made.refused:
                if time.monotonic() > until:  # it computes long before it refuses: windows of few rows were tried
                    return
                if self._takes(self._made.make(rows, seed=0, inner=inner)):
                    raise Doubt(f"it takes {rows} rows of a shape together of which it takes none alone")

    def _walk(self, numbers: Sequence[int]) -> str:
        """Follow the rows through the graph; return where they meet in a scale only. Raises Doubt where they may."""
        seen = EveryValue(self._model, self._folder)
        names = [spec.name for spec in self._session.signature.inputs]
        quantised = ""
        for inner in self._made.inner:
            runs = [
                seen.run(dict(zip(names, self._made.make(rows, seed=0, inner=inner), strict=True)), rows)
                for rows in numbers
            ]
            walk = Walk(self._model, runs)
            walk.run()
            quantised = quantised or walk.quantised
        return quantised

    def _try(self, effort: _Effort, *, quantised: bool) -> None:
        """Run rows alone and together, in several orders. Raises Doubt where an answer differs."""
        compare = self._in_any_order if quantised else self._alone_and_together
        for seed in range(1, 1 + effort.seeds):
            for inner in self._made.inner:
                rows = self._made.make(effort.rows, seed=seed, inner=inner)
                compare(rows, _orders(effort.rows, seed, many=effort.many))

    def _alone_and_together(self, rows: Tensors, orders: Sequence[Array]) -> None:
        alone = [self._session.run(_picked(rows, [index])) for index in range(len(rows[0]))]
        self._compare(rows, orders, lambda order: _joined([alone[index] for index in order]))

    def _in_any_order(self, rows: Tensors, orders: Sequence[Array]) -> None:
        """Where the rows' scale is common: a batch of the same rows has the same answers in any order."""
        whole = self._session.run(rows)
        whole_orders = [order for order in orders if set(order.tolist()) == set(range(len(rows[0])))]
        self._compare(rows, whole_orders, lambda order: tuple(output[order] for output in whole))

    def _compare(self, rows: Tensors, orders: Sequence[Array], due: Callable[[Array], Tensors]) -> None:
        for order in orders:
            outputs = self._session.run(_picked(rows, order))
            for spec, want, got in zip(self._session.signature.outputs, due(order), outputs, strict=True):
                if not same(want, got, self._tolerance):
                    raise Doubt(f"output {spec.name[:60]!r} of a row differs with the rows that run beside it")
                if want.dtype.kind in "fV" and not np.isfinite(want.astype(np.float64)).any():
                    raise Doubt(f"output {spec.name[:60]!r} of made-up rows is no number")


def same(want: Array, got: Array, tolerance: float) -> bool:
    """Tell whether two answers are the same, floats to rounding."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if want.dtype.kind not in "fV":
        return bool((want == got).all())
    one, other = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    bound = tolerance * float(np.abs(one[finite]).max(initial=0.0))
    return bool((np.abs(one[finite] - other[finite]) <= bound).all())


def _orders(rows: int, seed: int, *, many: bool) -> list[Array]:
    """Return which rows run together, and in what order: backwards, shuffled, some, and many."""
    chance = np.random.default_rng(seed)
    found = [np.arange(rows)[::-1]]
    if rows > 3:
        found += [chance.permutation(rows), chance.choice(rows, 3, replace=False)]
    if many:
        found.append(chance.permutation(np.resize(np.arange(rows), _MANY - _MANY % rows)))
    return found


def _picked(rows: Tensors, order: Sequence[int] | Array) -> Tensors:
    return tuple(np.ascontiguousarray(array[np.asarray(order)]) for array in rows)


def _joined(answers: Sequence[Tensors]) -> Tensors:
    try:
        return tuple(np.concatenate(parts) for parts in zip(*answers, strict=True))
    except ValueError:
        raise Doubt("rows that run alone have answers of different shapes") from None


def _rounds(model: onnx.ModelProto) -> bool:
    """Tell whether a graph rounds its values to 16 or 8 bits on the way: there a last bit makes a step."""
    small = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return any(tensor.data_type in small for tensor in model.graph.initializer) or any(map(_step, model.graph.node))


def _step(node: onnx.NodeProto) -> bool:
    to = next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else 0
    return "Quantize" in node.op_type or "QLinear" in node.op_type or to in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
