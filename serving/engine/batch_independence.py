"""Proves that a model's rows are independent: f(a ++ b) = f(a) ++ f(b), by its graph and by trying.

Both must agree. The graph says it for all inputs, where each operator on the way is known to keep rows apart; the
trial says it for the runtime that will serve, on distinct rows that are like real ones. Either one in doubt, requests
run alone. Only for a process that a model may end: it runs the model many times.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, inliner

from serving.engine import runtime
from serving.engine.batch_graph import Walk, without_rows
from serving.engine.batch_node import Doubt
from serving.engine.batching import Independence
from serving.engine.every_value import EveryValue
from serving.engine.probe_rows import MadeUpRows
from serving.engine.session import OnnxSession
from serving.errors import InferenceFailed
from serving.tensors import Array, Tensors

_MANY = 48
"""Rows of the largest batch that is tried."""
_FEW = 3
"""Rows of a batch of a model that takes long."""
_EXACT, _COARSE = 1e-4, 5e-2
"""Largest difference, relative to the largest answer: of floats, and where the graph rounds to 16 or 8 bits."""
_QUICK_S, _MOST_S = 0.02, 4.0
"""Seconds that two rows may take at most: to be tried by many rows, and to be tried at all."""
_TRIES_S = 3.0
"""Seconds after which no other rows are made up."""
_NUMBERS = (2, 3, 5)
"""Of rows, with which the graph is walked."""
_REFUSALS_S = 1.0
"""Seconds for which shapes are tried together that are refused alone."""
_NAMED_BY_TOOLS = re.compile("unk__")
"""Names of dimensions that tf2onnx makes up, another one for each that has none."""
_TAKEN = {
    "one": "its first dimension is fixed at 1",
    "none": "its first dimension does not count rows",
}


_FAILURES: tuple[type[Exception], ...] = (*runtime.ERRORS, InferenceFailed, MemoryError)


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
        self._made = MadeUpRows(session)

    def run(self) -> Independence:
        if not self._made.inner:
            raise Doubt("it takes no made-up rows, so its own can't be tried")
        began = time.monotonic()
        self._session.run(self._made.make(2, seed=0, inner=self._made.inner[-1]))
        taken = time.monotonic() - began
        if taken > _MOST_S:
            raise Doubt(f"it takes {taken:.0f} s for two rows, too long to try more")
        quick = taken <= _QUICK_S
        self._refuse_unequal()
        self._refuse_together(_MANY // 2 if quick else _FEW)
        quantised = self._walk()
        self._try(quick=quick, quantised=bool(quantised))
        return Independence(proved=not quantised, quantised=bool(quantised), reason=quantised)

    def _refuse_unequal(self) -> None:
        """Try inputs with different numbers of rows, where their graph names these differently: a batch has one."""
        names = [of[0] if of else None for of in self._session.dimension_names]
        few, many = (self._made.make(rows, seed=0, inner=self._made.inner[0]) for rows in (1, 3))
        for index, name in enumerate(names):
            if name is None or name == names[0] or _NAMED_BY_TOOLS.match(name):
                continue
            for one, other in ((few, many), (many, few)):
                if self._made.takes((*one[:index], other[index], *one[index + 1 :])):
                    spec = self._session.signature.inputs[index]
                    raise Doubt(f"input {spec.name[:60]!r} may have another number of rows than the first")

    def _refuse_together(self, most: int) -> None:
        """Try together what is refused alone: rows of ten elements that are cut in sevens fit once there are seven."""
        until = time.monotonic() + _REFUSALS_S
        for rows in range(2, most + 1):
            for inner in self._made.refused:
                if time.monotonic() > until:  # it computes long before it refuses: windows of few rows were tried
                    return
                if self._made.takes(self._made.make(rows, seed=0, inner=inner)):
                    raise Doubt(f"it takes {rows} rows of a shape together of which it takes none alone")

    def _walk(self) -> str:
        """Follow the rows through the graph; return where they meet in a scale only. Raises Doubt where they may."""
        seen = EveryValue(self._model, self._folder, keep=without_rows(self._model.graph))
        names = [spec.name for spec in self._session.signature.inputs]
        quantised = ""
        for inner in self._made.inner:
            runs = [
                seen.run(dict(zip(names, self._made.make(rows, seed=0, inner=inner), strict=True)), rows)
                for rows in _NUMBERS
            ]
            walk = Walk(self._model, runs)
            walk.run()
            quantised = quantised or walk.quantised
        return quantised

    def _try(self, *, quick: bool, quantised: bool) -> None:
        """Run rows together, in several orders and with others. Raises Doubt where an answer is not as it is due.

        Due is what each row is answered alone or, where a batch has a scale in common, what they are in any order.
        """
        number = 7 if quick else _FEW
        until = time.monotonic() + _TRIES_S
        for seed in range(1, 4):
            for inner in self._made.inner:
                rows = self._made.make(number, seed=seed, inner=inner)
                due = self._session.run(rows) if quantised else self._alone(rows)
                for order in _orders(number, seed, whole=quantised or not quick):
                    self._compare(due, rows, order)
            if time.monotonic() > until:
                return

    def _alone(self, rows: Tensors) -> Tensors:
        answers = [self._session.run(_picked(rows, [index])) for index in range(len(rows[0]))]
        shapes = [{output.shape for output in outputs} for outputs in zip(*answers, strict=True)]
        if any(len(found) > 1 or found.pop()[:1] != (1,) for found in shapes):
            raise Doubt("rows that run alone are not answered by one row each, of one shape")
        return tuple(np.concatenate(outputs) for outputs in zip(*answers, strict=True))

    def _compare(self, due: Tensors, rows: Tensors, order: Array) -> None:
        outputs = self._session.run(_picked(rows, order))
        for spec, whole, got in zip(self._session.signature.outputs, due, outputs, strict=True):
            want = whole[order]
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
    bound = tolerance * float(np.abs(one[np.isfinite(one)]).max(initial=0.0))
    return np.allclose(one, other, rtol=0, atol=bound, equal_nan=True)


def _orders(rows: int, seed: int, *, whole: bool) -> list[Array]:
    """Return which rows run together, and in what order: backwards, shuffled; some, and many, unless they are whole."""
    chance = np.random.default_rng(seed)
    found = [np.arange(rows)[::-1], chance.permutation(rows)]
    if not whole:
        found += [chance.choice(rows, 3, replace=False), chance.permutation(np.resize(np.arange(rows), _MANY))]
    return found


def _picked(rows: Tensors, order: Sequence[int] | Array) -> Tensors:
    return tuple(np.ascontiguousarray(array[np.asarray(order)]) for array in rows)


def _rounds(model: onnx.ModelProto) -> bool:
    """Tell whether a graph rounds its values to 16 or 8 bits on the way: there a last bit makes a step."""
    small = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return any(tensor.data_type in small for tensor in model.graph.initializer) or any(map(_step, model.graph.node))


def _step(node: onnx.NodeProto) -> bool:
    to = next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else 0
    return "Quantize" in node.op_type or "QLinear" in node.op_type or to in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
