"""Small models that make a server do what few models do: halves, every datatype, nothing, NaN, and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
    "BF16": TensorProto.BFLOAT16,
}


def write(root: Path) -> None:
    """Write the probes into a model repository: `<root>/<name>/1/model.onnx`."""
    each = [(name, kind) for name, kind in TYPES.items() if name not in ("FP16", "BF16")]
    _save(
        root,
        "probe_types",
        [helper.make_node("Identity", [f"in_{n}"], [f"out_{n}"]) for n, _ in each],
        [(f"in_{n}", kind, ["n", 2]) for n, kind in each],
        [(f"out_{n}", kind, ["n", 2]) for n, kind in each],
    )
    for name in ("FP16", "BF16"):
        _save(
            root,
            f"probe_{name.lower()}",
            [helper.make_node("Identity", ["x"], ["y"])],
            [("x", TYPES[name], ["n", 2])],
            [("y", TYPES[name], ["n", 2])],
        )
    _save(
        root,
        "probe_ratio",
        [helper.make_node("Div", ["a", "b"], ["ratio"])],
        [("a", TensorProto.FLOAT, ["n", 1]), ("b", TensorProto.FLOAT, ["n", 1])],
        [("ratio", TensorProto.FLOAT, ["n", 1])],
    )
    _save(
        root,
        "probe_empty",
        [helper.make_node("NonZero", ["x"], ["places"])],
        [("x", TensorProto.FLOAT, [4])],
        [("places", TensorProto.INT64, [1, "found"])],
    )
    _slow(root)


def _slow(root: Path) -> None:
    """One product of matrices for each of `turns`: time to be late or to leave in."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["before", "weights"], ["after"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [256, 256]),
        ],
    )
    _save(
        root,
        "probe_slow",
        [
            helper.make_node("Loop", ["turns", "", "weights"], ["last"], body=body),
            helper.make_node("ReduceMax", ["last"], ["most"], keepdims=0),
        ],
        [("turns", TensorProto.INT64, [])],
        [("most", TensorProto.FLOAT, [])],
        constants=[numpy_helper.from_array(np.eye(256, dtype=np.float32), "weights")],
    )


def _save(root: Path, name: str, nodes: Any, inputs: Any, outputs: Any, *, constants: Any = ()) -> None:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path = root / name / "1" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
