"""Small graphs put together by chance: what is proved of their rows must be true of their answers."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from serving.engine.batch_independence import prove
from serving.engine.session import OnnxSession
from serving.errors import ModelInvalid
from tests.drills.drill import Report, drill
from tests.drills.mixing_graphs import FLOAT

SHAPES = ((4,), (1,), (3, 4), (2, 2, 3), ())
"""Of a row."""


class Builder:
    """Adds nodes, each of which onnxruntime has taken, to a graph from x [n, ...]."""

    def __init__(self, chance: random.Random, row: tuple[int, ...]) -> None:
        self.chance = chance
        self.row = row
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {"x": (3, *row)}
        self._count = 0

    def add(self) -> None:
        """Try some operators until one fits."""
        for _ in range(8):
            nodes, weights = len(self.nodes), len(self.weights)
            name = self.chance.choice(list(OPERATORS))
            value = self.chance.choice(list(self.shapes))
            try:
                made = OPERATORS[name](self, value)
                seen = run(self.model(made), 3)
                other = run(self.model(made), 5)
            except Exception:
                del self.nodes[nodes:], self.weights[weights:]
                continue
            if seen.dtype == np.float32 and seen.size and other.size:
                self.shapes[made] = seen.shape
                return
            del self.nodes[nodes:], self.weights[weights:]

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node, and return its first output."""
        self._count += 1
        names = [f"v{self._count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0]

    def fixed(self, value: Any, dtype: Any = np.int64) -> str:
        """Add a constant."""
        name = f"w{len(self.weights)}_{self._count}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.fixed(np.random.default_rng(self.chance.randrange(99)).normal(size=shape), np.float32)

    def axis(self, value: str) -> int:
        rank = len(self.shapes[value])
        return self.chance.randrange(-rank, rank)

    def other(self) -> str:
        return self.chance.choice(list(self.shapes))

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", FLOAT, ["n", *self.row])],
            [onnx.ValueInfoProto(name=output)],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rows_of(model: onnx.ModelProto, rows: int, seed: int = 0) -> Any:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = (rows, *(dim.dim_value for dim in dims[1:]))
    return np.random.default_rng(seed).normal(0.2, 1.5, shape).astype(np.float32)


def plain(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, rows: int) -> Any:
    return plain(model).run(None, {"x": rows_of(model, rows)})[0]


def _reduced(b: Builder, value: str) -> str:
    kind = b.chance.choice(("ReduceMean", "ReduceMax", "ReduceL2", "ReduceProd"))
    axes = sorted(b.chance.sample(range(len(b.shapes[value])), b.chance.randint(1, len(b.shapes[value]))))
    return b.node(kind, value, axes=axes, keepdims=b.chance.randint(0, 1))


def _reshaped(b: Builder, value: str) -> str:
    sizes = list(b.shapes[value][1:]) or [1]
    targets = [[-1, *sizes[::-1]], [0, -1], [-1], [-1, sizes[-1]], [*sizes, -1], [1, -1], [0, -1, 1], [-1, 2], [2, -1]]
    return b.node("Reshape", value, b.fixed(b.chance.choice(targets)))


def _sliced(b: Builder, value: str) -> str:
    start, end, step = b.chance.choice(((0, 2**40, 1), (1, 2**40, 1), (0, 1, 1), (-1, -(2**40), -1), (0, 2**40, 2)))
    return b.node("Slice", value, *(b.fixed([v]) for v in (start, end, b.axis(value), step)))


def _count(b: Builder, value: str) -> str:
    number = b.node("Gather", b.node("Shape", value), b.fixed(0), axis=0)
    at = b.node("Cast", number, to=FLOAT)
    return b.node(b.chance.choice(("Mul", "Add")), value, at)


def _position(b: Builder, value: str) -> str:
    number = b.node("Gather", b.node("Shape", value), b.fixed(0), axis=0)
    places = b.node("Range", b.fixed(0), number, b.fixed(1))
    shaped = b.node("Reshape", places, b.fixed([-1] + [1] * (len(b.shapes[value]) - 1)))
    return b.node("Add", value, b.node("Cast", shaped, to=FLOAT))


def _padded_ones(b: Builder, value: str) -> str:
    ones = b.node("ConstantOfShape", b.node("Shape", value), value=numpy_helper.from_array(np.ones(1, np.float32)))
    return b.node(b.chance.choice(("Add", "Mul")), ones, b.other())


def _quantised(b: Builder, value: str) -> str:
    made = b.node("DynamicQuantizeLinear", value, outputs=3)
    scale, zero = made[:-1] + "1", made[:-1] + "2"
    return b.node("DequantizeLinear", made, scale, zero)


def _argument(b: Builder, value: str) -> str:
    found = b.node("ArgMax", value, axis=b.axis(value), keepdims=b.chance.randint(0, 1))
    return b.node("Cast", found, to=FLOAT)


def _picked(b: Builder, value: str) -> str:
    axis = b.axis(value)
    places = b.node("Cast", b.node("Abs", b.node("Sign", b.other())), to=onnx.TensorProto.INT64)
    return b.node("GatherElements", value, places, axis=axis)


def _attended(b: Builder, value: str) -> str:
    rank = len(b.shapes[value])
    turned = b.node("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
    weights = b.node("Softmax", b.node("MatMul", value, turned), axis=-1)
    return b.node("MatMul", weights, value)


def _lstm(b: Builder, value: str) -> str:
    size = b.shapes[value][-1]
    made = b.node("LSTM", value, b.weight(1, 8, size), b.weight(1, 8, 2), hidden_size=2, outputs=2)
    return b.chance.choice((made, made[:-1] + "1"))


def _normalised(b: Builder, value: str) -> str:
    axis = b.axis(value)
    shape = b.shapes[value][axis:]
    return b.node("LayerNormalization", value, b.weight(*shape), axis=axis)


def _padded(b: Builder, value: str) -> str:
    rank = len(b.shapes[value])
    pads = [0] * (2 * rank)
    at = b.chance.randrange(rank)
    pads[at], pads[at + rank] = b.chance.choice(((1, 0), (1, -1), (0, 1), (0, 0)))
    return b.node("Pad", value, b.fixed(pads), mode=b.chance.choice(("constant", "edge")))


OPERATORS: dict[str, Callable[[Builder, str], str]] = {
    "unary": lambda b, v: b.node(b.chance.choice(("Relu", "Abs", "Sigmoid", "Neg", "Identity")), v),
    "binary": lambda b, v: b.node(b.chance.choice(("Add", "Mul", "Sub", "Max")), v, b.other()),
    "where": lambda b, v: b.node("Where", b.node("Greater", v, b.fixed(0, np.float32)), v, b.other()),
    "weigh": lambda b, v: b.node("MatMul", v, b.weight(b.shapes[v][-1], b.chance.choice((2, 3, 4)))),
    "weigh_from_left": lambda b, v: b.node("MatMul", b.weight(2, b.shapes[v][-2]), v),
    "multiply": lambda b, v: b.node("MatMul", v, b.other()),
    "gemm": lambda b, v: b.node("Gemm", v, b.chance.choice((b.other(), b.weight(4, 4), b.weight(3, 3))),
                                transA=b.chance.randint(0, 1), transB=b.chance.randint(0, 1)),
    "softmax": lambda b, v: b.node(b.chance.choice(("Softmax", "LogSoftmax")), v, axis=b.axis(v)),
    "reduce": _reduced,
    "cumulate": lambda b, v: b.node("CumSum", v, b.fixed(b.axis(v))),
    "transpose": lambda b, v: b.node("Transpose", v, perm=b.chance.sample(range(len(b.shapes[v])), len(b.shapes[v]))),
    "reshape": _reshaped,
    "flatten": lambda b, v: b.node("Flatten", v, axis=b.axis(v)),
    "concatenate": lambda b, v: b.node("Concat", v, b.other(), axis=b.axis(v)),
    "slice": _sliced,
    "gather": lambda b, v: b.node("Gather", v, b.fixed(b.chance.choice((0, [0], [0, 0], [[0]]))), axis=b.axis(v)),
    "pick": _picked,
    "top": lambda b, v: b.node("TopK", v, b.fixed([b.chance.choice((1, 2, 3))]), axis=b.axis(v), outputs=2),
    "argument": _argument,
    "unsqueeze": lambda b, v: b.node("Unsqueeze", v, b.fixed([b.chance.randint(0, len(b.shapes[v]))])),
    "squeeze": lambda b, v: b.node("Squeeze", v, *b.chance.choice(((), (b.fixed([b.axis(v)]),)))),
    "tile": lambda b, v: b.node("Tile", v, b.fixed([b.chance.choice((1, 1, 2)) for _ in b.shapes[v]])),
    "expand": lambda b, v: b.node("Expand", v, b.fixed([b.chance.choice((1, 2)), *([1] * len(b.shapes[v]))])),
    "pad": _padded,
    "layer_norm": _normalised,
    "lp_norm": lambda b, v: b.node("LpNormalization", v, axis=b.axis(v)),
    "mean_variance": lambda b, v: b.node("MeanVarianceNormalization", v, axes=[b.axis(v)]),
    "einsum": lambda b, v: b.node("Einsum", v, b.other(), equation=b.chance.choice(
        ("ab,ab->ab", "ab,cb->ac", "abc,abd->acd", "ab,ab->b", "abc,acd->abd", "ab,ac->abc", "ab,bc->ac"))),
    "convolve": lambda b, v: b.node("Conv", v, b.weight(2, b.shapes[v][1], *([1] * (len(b.shapes[v]) - 2)))),
    "pool": lambda b, v: b.node("GlobalAveragePool", v),
    "batch_norm": lambda b, v: b.node("BatchNormalization", v, *(b.weight(b.shapes[v][1]) for _ in range(3)),
                                      b.fixed(np.ones(b.shapes[v][1]), np.float32)),
    "lstm": _lstm,
    "attend": _attended,
    "triangle": lambda b, v: b.node("Trilu", v, upper=b.chance.randint(0, 1)),
    "count": _count,
    "position": _position,
    "ones": _padded_ones,
    "quantise": _quantised,
    "split": lambda b, v: b.node("Split", v, axis=b.axis(v), outputs=b.chance.choice((1, 2))),
}  # fmt: skip


def random_graph(seed: int) -> onnx.ModelProto | None:
    """Make one graph of a few nodes, with as many rows out as in; None where chance made none."""
    chance = random.Random(seed)
    builder = Builder(chance, chance.choice(SHAPES))
    for _ in range(chance.randint(1, 6)):
        builder.add()
    for name in reversed(builder.shapes):
        model = builder.model(name)
        if name != "x" and all(run(model, rows).shape[:1] == (rows,) for rows in (3, 5)):
            return model
    return None


def wrong_together(model: onnx.ModelProto, seed: int) -> bool:
    """Tell whether requests that run together get other answers than alone, by plain onnxruntime."""
    session, chance = plain(model), random.Random(seed)
    for _ in range(6):
        requests = [rows_of(model, chance.choice((1, 1, 2, 3)), chance.randrange(10**6)) for _ in range(4)]
        try:
            alone = [session.run(None, {"x": rows})[0] for rows in requests]
            together = session.run(None, {"x": np.concatenate(requests)})[0]
        except Exception:
            continue  # a value that the graph refuses: whoever sent it is told so
        at = 0
        for rows, answer in zip(requests, alone, strict=True):
            its = together[at : at + len(rows)] if together.ndim else together
            if its.shape != answer.shape:
                return True
            size = 1e-5 * float(np.abs(answer, where=np.isfinite(answer), out=np.zeros_like(answer)).max(initial=0))
            if not np.allclose(its, answer, rtol=1e-3, atol=size, equal_nan=True):
                return True
            at += len(rows)
    return False


def graphs(first: int, number: int) -> Iterator[tuple[int, onnx.ModelProto]]:
    """Make so many graphs."""
    seed = first
    while number:
        model = random_graph(seed)
        if model is not None:
            number -= 1
            yield seed, model
        seed += 1


@drill("random_graphs", "no graph that chance makes is proved to keep rows apart where plain onnxruntime mixes them")
def random_graphs(report: Report, *, number: int = 3000, first: int = 0) -> None:
    """Prove each graph, and compare with its answers; the control believes whatever has as many rows out as in."""
    with tempfile.TemporaryDirectory(prefix="graphs-") as folder:
        _compared(report, Path(folder) / "model.onnx", number, first)


def _compared(report: Report, path: Path, number: int, first: int) -> None:
    logging.getLogger("serving.session").setLevel("ERROR")  # of graphs that refuse some of the rows there are many
    proved = apart = believed = wrong = 0
    for seed, model in graphs(first, number):
        path.write_bytes(model.SerializeToString())
        try:
            found = prove(OnnxSession(path, warm_rows=3), path)
        except ModelInvalid:
            continue
        mixes = wrong_together(model, seed)
        apart += not mixes
        proved += found.proved and not mixes
        believed += mixes
        if found.proved and mixes:
            wrong += 1
            print(f"graph {seed} mixes rows, and is proved not to")
    report.exactly("graphs that mix rows and are proved not to", wrong, 0)
    report.at_least("of those that keep rows apart, proved, %", round(100 * proved / max(1, apart)), 40)
    report.control("by their shapes alone many that mix would run together", believed > number / 10)
