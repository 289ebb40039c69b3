"""Graphs of which each row is answered by itself, in the ways in which exporters write them."""

from __future__ import annotations

import numpy as np
import onnx

from tests.drills.mixing_graphs import FLOAT, INT64, graph, matrix, node, weight


def ordinary() -> dict[str, onnx.ModelProto]:
    """Make graphs of which each row is answered by itself, in the ways in which exporters write them."""
    i = np.int64
    return {
        "perceptron": matrix(
            [node("Gemm", "x w b", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "z"), node("Softmax", "z", "y")],
            w=weight(8, 16),
            b=weight(16),
            v=weight(16, 3),
        ),
        "convolutions": graph(
            [
                node("Conv", "x w", "c", pads=[1, 1, 1, 1]),
                node("BatchNormalization", "c one zero zero one", "n"),
                node("Relu", "n", "r"),
                node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
                node("GlobalAveragePool", "p", "g"),
                node("Flatten", "g", "f"),
                node("Gemm", "f v", "y"),
            ],
            [("x", FLOAT, ["batch", 3, 8, 8])],
            [("y", FLOAT, ["batch", 4])],
            w=weight(5, 3, 3, 3),
            one=np.ones(5, np.float32),
            zero=np.zeros(5, np.float32),
            v=weight(5, 4),
        ),
        "transformer": _encoder(),
        "time_major_attention": _time_major(),
        "lstm_by_row": graph(
            [
                node("Transpose", "x", "t", perm=[1, 0, 2]),
                node("LSTM", "t w r", "all last cell", hidden_size=4),
                node("Squeeze", "last zero", "y"),
            ],
            [("x", FLOAT, ["batch", "time", 3])],
            [("y", FLOAT, ["batch", 4])],
            zero=np.array([0], i),
            w=weight(1, 16, 3),
            r=weight(1, 16, 4),
        ),
        "quantised_before": matrix(
            [
                node("QuantizeLinear", "x s z", "q"),
                node("DequantizeLinear", "q s z", "d"),
                node("MatMul", "d w", "y"),
            ],
            s=np.array(0.05, np.float32),
            z=np.array(128, np.uint8),
            w=weight(8, 3),
        ),
        "each_element": graph([node("Neg", "x", "y")], [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])]),
        "table": graph([node("Gather", "t i", "y")], [("i", INT64, ["n"])], [("y", FLOAT, ["n", 2])], t=weight(12, 2)),
        "einsum_by_row": graph(
            [node("Einsum", "a b", "y", equation="bij,bjk->bik")],
            [("a", FLOAT, ["n", 2, 3]), ("b", FLOAT, ["n", 3, 2])],
            [("y", FLOAT, ["n", 2, 2])],
        ),
        "columns_of_all_rows": matrix(
            [node("Slice", "x from to", "y")],
            **{"from": np.array([0, 1], i), "to": np.array([10**9, 4], i)},
        ),
        "zipmap": graph(
            [
                node("LinearClassifier", "x", "label p", domain="ai.onnx.ml", coefficients=[1.0, -1.0] * 8,
                     intercepts=[0.0, 0.1], classlabels_ints=[0, 1], post_transform="SOFTMAX"),
                node("Cast", "p", "y", to=FLOAT),
            ],
            [("x", FLOAT, ["n", 8])],
            [("label", INT64, ["n"]), ("y", FLOAT, ["n", 2])],
        ),
    }  # fmt: skip


def _encoder(hidden: int = 8, heads: int = 2, words: int = 50) -> onnx.ModelProto:
    """Make one layer of an encoder as BERT's are exported: ids and mask [batch, tokens], and the first state out."""
    i = np.int64
    nodes = [
        node("Gather", "words ids", "e"),
        node("Shape", "ids", "shape"),
        node("Gather", "shape one", "length", axis=0),
        node("Unsqueeze", "length zeros", "end"),
        node("Slice", "positions zeros end zeros", "p"),
        node("Add", "e p", "x"),
        node("LayerNormalization", "x ln_s ln_b", "n"),
        node("Unsqueeze", "mask where", "m4"),
        node("Cast", "m4", "mf", to=FLOAT),
        node("Sub", "onef mf", "away"),
        node("Mul", "away low", "bias"),
    ]
    for name in "qkv":
        nodes += [
            node("MatMul", f"n {name}_w", f"{name}_m"),
            node("Reshape", f"{name}_m split", f"{name}_s"),
            node("Transpose", f"{name}_s", f"{name}_t", perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
        ]
    nodes += [
        node("MatMul", "q_t k_t", "s"),
        node("Div", "s root", "sd"),
        node("Add", "sd bias", "sb"),
        node("Softmax", "sb", "a", axis=-1),
        node("MatMul", "a v_t", "c"),
        node("Transpose", "c", "ct", perm=[0, 2, 1, 3]),
        # As torch writes it: the shape put together of what it was.
        node("Shape", "ct", "cs"),
        node("Slice", "cs zeros two", "front"),
        node("Concat", "front width", "joined", axis=0),
        node("Reshape", "ct joined", "o"),
        node("Add", "o n", "r"),
        node("Gather", "r zero", "cls", axis=1),
        node("MatMul", "cls out", "z"),
        node("Tanh", "z", "y"),
    ]
    weights = {f"{name}_w": weight(hidden, hidden) for name in "qkv"}
    return graph(
        nodes,
        [("ids", INT64, ["batch", "tokens"]), ("mask", INT64, ["batch", "tokens"])],
        [("y", FLOAT, ["batch", hidden])],
        words=weight(words, hidden),
        positions=weight(512, hidden),
        ln_s=np.ones(hidden, np.float32),
        ln_b=np.zeros(hidden, np.float32),
        onef=np.array(1, np.float32),
        low=np.array(-1e4, np.float32),
        root=np.array(2, np.float32),
        zero=np.array(0, i),
        one=np.array(1, i),
        zeros=np.array([0], i),
        two=np.array([2], i),
        width=np.array([hidden], i),
        where=np.array([1, 2], i),
        split=np.array([0, 0, heads, hidden // heads], i),
        out=weight(hidden, hidden),
        **weights,
    )


def _time_major(hidden: int = 8, heads: int = 2) -> onnx.ModelProto:
    """Make attention as torch's MultiheadAttention is exported: rows on the second axis, then merged with heads."""
    i = np.int64
    nodes = [
        node("Transpose", "x", "t", perm=[1, 0, 2]),
        node("Shape", "t", "s"),
        node("Gather", "s zeros", "steps", axis=0),
        node("Gather", "s ones", "rows", axis=0),
        node("Mul", "rows heads", "merged"),
        node("Concat", "steps merged depth", "apart", axis=0),
        node("Mul", "steps rows", "flat"),
        node("Concat", "flat width", "matrix", axis=0),
    ]
    for name in "qkv":
        nodes += [
            node("MatMul", f"t {name}_w", f"{name}_m"),
            node("Reshape", f"{name}_m apart", f"{name}_s"),
            node("Transpose", f"{name}_s", f"{name}_t", perm=[1, 2, 0] if name == "k" else [1, 0, 2]),
        ]
    nodes += [
        node("MatMul", "q_t k_t", "w"),
        node("Softmax", "w", "a", axis=-1),
        node("MatMul", "a v_t", "c"),
        node("Transpose", "c", "ct", perm=[1, 0, 2]),
        node("Reshape", "ct matrix", "m"),
        node("Gemm", "m out", "g"),
        node("Reshape", "g s", "o"),
        node("Transpose", "o", "y", perm=[1, 0, 2]),
    ]
    return graph(
        nodes,
        [("x", FLOAT, ["batch", "steps", hidden])],
        [("y", FLOAT, ["batch", "steps", hidden])],
        zeros=np.array([0], i),
        ones=np.array([1], i),
        heads=np.array([heads], i),
        depth=np.array([hidden // heads], i),
        width=np.array([hidden], i),
        out=weight(hidden, hidden),
        **{f"{name}_w": weight(hidden, hidden) for name in "qkv"},
    )
