"""Graphs whose first dimension is free, and is no batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
Port = tuple[str, int, Any]
_chance = np.random.default_rng(11)


def weight(*shape: int) -> Any:
    return (_chance.normal(size=shape) / np.sqrt(shape[0] if shape else 1)).astype(np.float32)


def node(kind: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(" "), outputs.split(" "), domain=domain, **attributes)


def graph(
    nodes: list[onnx.NodeProto],
    inputs: list[Port],
    outputs: list[Port],
    opset: int = 17,
    **weights: Any,
) -> onnx.ModelProto:
    """Make a model; weights are arrays by name."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [("", opset), ("ai.onnx.ml", 3), ("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=[helper.make_opsetid(*o) for o in opsets], ir_version=8)


def matrix(
    nodes: list[onnx.NodeProto], width: int = 8, out: Any = ("n", "m"), opset: int = 17, **weights: Any
) -> onnx.ModelProto:
    """Make a model from x [n, width] to y."""
    return graph(nodes, [("x", FLOAT, ["n", width])], [("y", FLOAT, list(out))], opset, **weights)


def mixing() -> dict[str, onnx.ModelProto]:
    """Make graphs in which one row has a part in another's answer, each with as many rows out as in."""
    i = np.int64
    lstm = {"w": weight(1, 8, 2), "r": weight(1, 8, 2)}
    attention = [
        node("MatMul", "x q", "xq"),
        node("MatMul", "x k", "xk"),
        node("Transpose", "xk", "kt", perm=[1, 0]),
        node("MatMul", "xq kt", "s"),
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p x", "y"),
    ]
    body = helper.make_graph(
        [node("Add", "sum_in one", "sum_out"), node("Identity", "sum_out", "each")],
        "b",
        [helper.make_tensor_value_info(n, FLOAT, [8]) for n in ("sum_in", "one")],
        [helper.make_tensor_value_info(n, FLOAT, [8]) for n in ("sum_out", "each")],
    )
    return {
        "softmax_documents": matrix([node("Softmax", "x", "y", axis=0)], 1),
        "log_softmax": matrix([node("LogSoftmax", "x", "y", axis=0)]),
        "old_softmax": matrix([node("Softmax", "x", "y", axis=0)], opset=11),
        "centre": matrix([node("ReduceMean", "x", "m", axes=[0], keepdims=1), node("Sub", "x m", "y")]),
        "scale_to_greatest": matrix([node("ReduceMax", "x", "m", axes=[0], keepdims=1), node("Sub", "x m", "y")]),
        "share_of_all": matrix(
            [node("Abs", "x", "a"), node("ReduceSum", "a", "m", keepdims=1), node("Div", "x m", "y")]
        ),
        "hidden_by_relu": matrix(
            [
                node("Add", "x bias", "low"),
                node("Relu", "low", "r"),
                node("ReduceMean", "r", "m", axes=[0], keepdims=1),
                node("Sub", "r m", "y"),
            ],
            bias=np.full(8, -30, np.float32),
        ),
        "lstm_over_rows": graph(
            [node("LSTM", "x w r", "all", hidden_size=2), node("Squeeze", "all one", "y")],
            [("x", FLOAT, ["seq", 1, 2])],
            [("y", FLOAT, ["seq", 1, 2])],
            one=np.array([1], i),
            **lstm,
        ),
        "gru_over_rows": graph(
            [node("GRU", "x w r", "all", hidden_size=2), node("Squeeze", "all one", "y")],
            [("x", FLOAT, ["seq", 1, 2])],
            [("y", FLOAT, ["seq", 1, 2])],
            one=np.array([1], i),
            w=weight(1, 6, 2),
            r=weight(1, 6, 2),
        ),
        "attention_of_tokens": matrix(attention, q=weight(8, 8), k=weight(8, 8)),
        "convolution_over_time": graph(
            [
                node("Transpose", "x", "t", perm=[1, 0]),
                node("Unsqueeze", "t zero", "u"),
                node("Conv", "u w", "c", pads=[1, 1]),
                node("Squeeze", "c zero", "s"),
                node("Transpose", "s", "y", perm=[1, 0]),
            ],
            [("x", FLOAT, ["time", 3])],
            [("y", FLOAT, ["time", 3])],
            zero=np.array([0], i),
            w=weight(3, 3, 3),
        ),
        "sorted": matrix(
            [node("Shape", "x", "s"), node("Slice", "s zero one", "n"), node("TopK", "x n", "y at", axis=0)],
            zero=np.array([0], i),
            one=np.array([1], i),
        ),
        "cumulative": matrix([node("CumSum", "x zero", "y")], zero=np.array(0, i)),
        "batch_statistics": matrix(
            [node("BatchNormalization", "x s b m v", "y m2 v2", training_mode=1)],
            s=np.ones(8, np.float32),
            b=np.zeros(8, np.float32),
            m=np.zeros(8, np.float32),
            v=np.ones(8, np.float32),
        ),
        "mean_variance": matrix([node("MeanVarianceNormalization", "x", "y", axes=[0])]),
        "lp_normalised": matrix([node("LpNormalization", "x", "y", axis=0)]),
        "backwards": matrix(
            [node("Slice", "x last first zero back", "y")],
            last=np.array([-1], i),
            first=np.array([-(2**40)], i),
            zero=np.array([0], i),
            back=np.array([-1], i),
        ),
        "shifted": matrix([node("Pad", "x pads", "y")], pads=np.array([1, 0, -1, 0], i)),
        "gram": matrix(
            [node("Transpose", "x", "t", perm=[1, 0]), node("MatMul", "x t", "g"), node("MatMul", "g x", "y")]
        ),
        "einsum": matrix([node("Einsum", "x x", "g", equation="ab,cb->ac"), node("MatMul", "g x", "y")]),
        "gemm": matrix([node("Gemm", "x x", "g", transB=1), node("MatMul", "g x", "y")]),
        "first_row": matrix([node("Gather", "x zero", "f", axis=0), node("Add", "x f", "y")], zero=np.array([0], i)),
        "how_many": matrix(
            [
                node("Shape", "x", "s"),
                node("Gather", "s zero", "n", axis=0),
                node("Cast", "n", "f", to=FLOAT),
                node("Div", "x f", "y"),
            ],
            zero=np.array([0], i),
        ),
        "position": matrix(
            [
                node("Shape", "x", "s"),
                node("Gather", "s zero", "n", axis=0),
                node("Range", "zero n one", "at"),
                node("Cast", "at", "f", to=FLOAT),
                node("Unsqueeze", "f ones", "u"),
                node("Add", "x u", "y"),
            ],
            zero=np.array(0, i),
            one=np.array(1, i),
            ones=np.array([1], i),
        ),
        "reshaped_across": matrix(
            [
                node("Reshape", "x turned", "t"),
                node("Softmax", "t", "p", axis=-1),
                node("Reshape", "p back", "y"),
            ],
            turned=np.array([8, -1], i),
            back=np.array([-1, 8], i),
        ),
        "pairs": matrix(
            [
                node("Unsqueeze", "x one", "a"),
                node("Unsqueeze", "x zero", "b"),
                node("Sub", "a b", "d"),
                node("ReduceSum", "d one", "y", keepdims=0),
            ],
            zero=np.array([0], i),
            one=np.array([1], i),
        ),
        "running_sum": matrix(
            [node("Scan", "start x", "last y", body=body, num_scan_inputs=1)], start=np.zeros(8, np.float32)
        ),
        "quantised_as_it_runs": matrix(
            [
                node("DynamicQuantizeLinear", "x", "q s z"),
                node("MatMulInteger", "q w z", "i"),
                node("Cast", "i", "f", to=FLOAT),
                node("Mul", "f s", "y"),
            ],
            w=np.arange(64, dtype=np.uint8).reshape(8, 8),
        ),
        "where_the_greatest_is": matrix(
            [node("ArgMax", "x", "a", axis=0, keepdims=1), node("Cast", "a", "f", to=FLOAT), node("Add", "x f", "y")]
        ),
        "unknown_order": matrix([node("Hardmax", "x", "y", axis=0)]),
        "wave": graph(
            [node("CumSum", "x zero", "y")], [("x", FLOAT, ["k"])], [("y", FLOAT, ["k"])], zero=np.array(0, i)
        ),
        "scaler_of_one_dimension": graph(
            [node("Softmax", "x", "y", axis=-1)], [("x", FLOAT, ["k"])], [("y", FLOAT, ["k"])]
        ),
    }
