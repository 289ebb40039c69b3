"""Graphs in which rows meet where no trial with usual rows sees it: beyond 1,000, or from sixty rows on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from tests.drills.mixing_graphs import FLOAT, INT64, graph, matrix, node, weight

BOOL = TensorProto.BOOL


def _ints(*values: int) -> Any:
    return np.array(values, np.int64)


def _hidden(
    nodes: list[onnx.NodeProto], opset: int = 17, shape: tuple[Any, ...] = ("n", 8), **weights: Any
) -> onnx.ModelProto:
    """Make y of x, where `big` is what of x is beyond 1,000, and n1 the number of rows."""
    before = [node("Sub", "x K", "low"), node("Relu", "low", "big"), node("Shape", "x", "s")]
    before.append(
        node("Slice", "s zero1 one1", "n1") if opset >= 10 else node("Slice", "s", "n1", starts=[0], ends=[1])
    )
    weights |= {"K": np.array(1000, np.float32), "zero1": _ints(0), "one1": _ints(1), "one": np.array(1, np.int64)}
    out = ["n", *([None] * (len(shape) - 1))]
    return graph([*before, *nodes], [("x", FLOAT, list(shape))], [("y", FLOAT, out)], opset, **weights)


def _plus(what: str, kind: str = "Add") -> onnx.NodeProto:
    return node(kind, f"x {what}", "y")


def _own_name(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return node(kind, inputs, outputs, domain="ai.onnx", **attributes)


def of_numbers() -> dict[str, onnx.ModelProto]:
    """Make graphs whose answers are others from some number of rows on, which is more than are tried."""
    late = np.zeros((300, 1), np.float32)
    late[100:] = 7
    sixty = {"sixty": _ints(60)}
    cases = {
        "a slice of a table": _hidden([node("Slice", "t zero1 n1 zero1", "u"), _plus("u")], t=late),
        "an entry of a table": _hidden([node("Gather", "t n1", "u", axis=0), _plus("u")], t=late[:, 0]),
        "a part of a table": _hidden(
            [node("Sub", "all n1", "rest"), node("Concat", "n1 rest", "parts", axis=0),
             node("Split", "t parts", "u v", axis=0), _plus("u")],
            t=late, all=_ints(300),
        ),
        "hundreds of rows": _hidden(
            [node("Cast", "n1", "f", to=FLOAT), node("Mul", "f cent", "g"), node("Cast", "g", "h", to=INT64),
             node("Cast", "h", "k", to=FLOAT), _plus("k")],
            cent=np.array(0.01, np.float32),
        ),
        "sixty rows": _hidden(
            [node("Sub", "n1 sixty", "d"), node("Cast", "d", "b", to=BOOL), node("Where", "b v w", "k"), _plus("k")],
            v=np.array(0, np.float32), w=np.array(9, np.float32), **sixty,
        ),
        "sixty rows, compared": _hidden(
            [node("Sub", "sixty n1", "d"), node("Equal", "d less", "b"), node("Where", "b v w", "k"), _plus("k")],
            v=np.array(9, np.float32), w=np.array(0, np.float32), less=_ints(-1), **sixty,
        ),
        "a diagonal": _hidden(
            [node("Sub", "n1 sixty", "d"), node("Squeeze", "d zero1", "k"), node("Trilu", "w k", "m"),
             node("MatMul", "x m", "y")],
            w=weight(8, 8), **sixty,
        ),
        "steps of a hundred": _hidden(
            [node("Squeeze", "n1 zero1", "n"), node("Range", "none n hundred", "r"), node("Shape", "r", "l"),
             node("Cast", "l", "k", to=FLOAT), _plus("k")],
            none=np.array(0, np.int64), hundred=np.array(100, np.int64),
        ),
        "more than sixty": _hidden(
            [node("Sub", "n1 sixty", "d"), node("Squeeze", "d zero1", "n"), node("Range", "none n one", "r"),
             node("Shape", "r", "l"), node("Cast", "l", "k", to=FLOAT), _plus("k")],
            none=np.array(0, np.int64), **sixty,
        ),
        "columns from sixty on": _hidden(
            [node("Sub", "n1 sixty", "d"), node("Slice", "x d eight one1", "u"),
             node("ReduceSum", "u one1", "k", keepdims=1), _plus("k")],
            eight=_ints(8), **sixty,
        ),
        "the last fifty rows": _hidden(
            [node("Slice", "big start end zero1", "u"), node("Concat", "n1 rest", "to", axis=0),
             node("Reshape", "u to", "v"), node("ReduceSum", "v one1", "k", keepdims=1), _plus("k")],
            start=_ints(-50), end=_ints(2**40), rest=_ints(-1),
        ),
    }  # fmt: skip
    return cases | {
        "places of greatest elements": graph(
            [node("Reshape", "x images", "i"), node("MaxPool", "i", "p at", kernel_shape=[2]),
             node("Sub", "at far", "d"), node("Cast", "d", "f", to=FLOAT), node("Relu", "f", "r"),
             node("Flatten", "r", "y")],
            [("x", FLOAT, ["n", 8])], [("y", FLOAT, ["n", 7])], images=_ints(-1, 1, 8), far=_ints(800),
        ),
        "a scale of rows": matrix(
            [node("Reshape", "x images", "i"), node("Resize", "i  scales", "r"), node("Reshape", "r back", "y")],
            images=_ints(-1, 1, 1, 8), scales=np.array([1.01, 1, 1, 1], np.float32), back=_ints(-1, 8),
        ),
        "a scale of rows, before Resize": matrix(
            [node("Reshape", "x images", "i"), node("Upsample", "i scales", "r"), node("Reshape", "r back", "y")],
            opset=9, images=_ints(-1, 1, 1, 8), scales=np.array([1.01, 1, 1, 1], np.float32), back=_ints(-1, 8),
        ),
    }  # fmt: skip


def of_values() -> dict[str, onnx.ModelProto]:
    """Make graphs in which a row that has values beyond 1,000 is part of another's answer."""
    scaled = [
        node("Reshape", "big pairs", "t"),
        node("Scaler", "t", "u", domain="ai.onnx.ml", offset=[0.0], scale=[1.0]),
    ]
    merged = [node("Transpose", "a", "t", perm=[1, 0, 2]), node("Reshape", "t steps", "u")]  # rows are index % n
    start = [node("Sub", "h K", "low"), node("Relu", "low", "big"), node("Reshape", "big wide", "v")]  # index // 4
    return {
        "as many copies as rows, expanded": _hidden(
            [node("ReduceMax", "big", "m", axes=[1]), node("Concat", "n1 n1", "to", axis=0),
             node("Expand", "m to", "e"), node("ReduceSum", "e one1", "k", keepdims=1), _plus("k")]
        ),
        "as many copies as rows, tiled": _hidden(
            [node("Concat", "one1 n1", "to", axis=0), node("Tile", "big to", "e"),
             node("ReduceSum", "e one1", "k", keepdims=1), _plus("k")]
        ),
        "tables of merged rows": _hidden(
            [*scaled, node("Reshape", "u four", "v"), node("ReduceSum", "v zero1", "w", keepdims=0),
             node("Concat", "w w w w", "k", axis=1), _plus("k")],
            pairs=_ints(-1, 2), four=_ints(4, -1, 2),
        ),
        "another's start": graph(
            [*merged, *start, node("RNN", "u w r   v", "all last", hidden_size=2), node("Reshape", "last four", "b"),
             node("Transpose", "b", "y", perm=[1, 0, 2])],
            [("a", FLOAT, ["n", 4, 3]), ("h", FLOAT, ["n", 4, 2])], [("y", FLOAT, ["n", 4, 2])],
            K=np.array(1000, np.float32), steps=_ints(1, -1, 3), wide=_ints(1, -1, 2), four=_ints(4, -1, 2),
            w=weight(1, 2, 3), r=weight(1, 2, 2),
        ),
        "backwards, by the other name": _hidden(
            [_own_name("Slice", "big last first zero1 back", "r"), _plus("r")],
            last=_ints(-1), first=_ints(-(2**40)), back=_ints(-1),
        ),
        "softmax of old, by the other name": _hidden(
            [node("Transpose", "big", "t", perm=[1, 0]), _own_name("Softmax", "t", "p", axis=0),
             node("Transpose", "p", "q", perm=[1, 0]), node("Mul", "q big", "k"), _plus("k")],
            opset=11,
        ),
        "out of order": matrix([node("Add", "x m", "y"), node("ReduceMax", "x", "m", axes=[0])]),
        "windows": _hidden(
            [node("Reshape", "big sevens", "t"), node("ReduceMax", "t", "m", axes=[1]), node("Sub", "t m", "u"),
             node("Reshape", "u s", "v"), _plus("v")],
            shape=("n", "length"), sevens=_ints(-1, 7),
        ),
    }  # fmt: skip
