"""Cheap models that take and answer megabytes, and bodies of requests for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, save

WIDTH = 1024


def wide(folder: Path) -> None:
    """Write a cheap model that takes a megabyte: for each row its greatest element, and where it stands."""
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["features"], ["label"], axis=1, keepdims=0),
            helper.make_node("ReduceMax", ["features"], ["probabilities"], axes=[1], keepdims=1),
        ],
        "wide",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", WIDTH])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["rows"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 1]),
        ],
    )
    (folder / "wide" / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save(model, folder / "wide" / "1" / "model.onnx")


def echo(folder: Path) -> None:
    """Write a model that answers as much as it is given: each number, negated."""
    given, answered = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in ("features", "negated")
    )
    graph = helper.make_graph([helper.make_node("Neg", ["features"], ["negated"])], "echo", [given], [answered])
    (folder / "echo" / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save(model, folder / "echo" / "1" / "model.onnx")


def texts(folder: Path) -> None:
    """Write a cheap model that takes strings, [rows, columns], and answers the first of each row."""
    start, end, axis = (
        helper.make_node("Constant", [], [place], value_ints=[value])
        for place, value in (("start", 0), ("end", 1), ("axis", 1))
    )
    graph = helper.make_graph(
        [start, end, axis, helper.make_node("Slice", ["words", "start", "end", "axis"], ["first"])],
        "texts",
        [helper.make_tensor_value_info("words", TensorProto.STRING, ["rows", "columns"])],
        [helper.make_tensor_value_info("first", TensorProto.STRING, ["rows", 1])],
    )
    (folder / "texts" / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save(model, folder / "texts" / "1" / "model.onnx")


def json_body(rows: np.ndarray) -> bytes:
    """Write rows as a v2 request with one flat tensor."""
    tensor = {"name": "features", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def binary_body(rows: np.ndarray) -> tuple[bytes, int]:
    """Write rows as a v2 request with a raw tensor that asks for raw outputs; return it and the bytes of its JSON."""
    raw = rows.astype(np.float32).tobytes()
    tensor = {
        "name": "features",
        "datatype": "FP32",
        "shape": list(rows.shape),
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}, separators=(",", ":")).encode()
    return head + raw, len(head)
