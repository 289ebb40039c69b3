"""Converts fitted models to ONNX with clean names: the traps of the converters are known here and nowhere else."""

from __future__ import annotations

from typing import Any

import onnx
import pandas as pd
from onnx import TensorProto, helper

# Isolation forests and some scalers convert only up to these; onnxruntime runs them all.
OPSET = {"": 17, "ai.onnx.ml": 3}


def to_onnx(
    model: Any, train: pd.DataFrame, *, double: bool, image: tuple[str, tuple[int, ...]] | None
) -> onnx.ModelProto:
    """Convert a fitted model: one matrix input `features`, or one input a column where there are strings."""
    numeric = all(pd.api.types.is_numeric_dtype(train[name]) for name in train.columns)
    family = type(model).__module__.split(".")[0]
    if family in ("lightgbm", "xgboost"):
        proto = _boosted(model, family, len(train.columns))
    else:
        proto = _sklearn(model, train, numeric=numeric, double=double)
    names = [port.name for port in proto.graph.input]
    # skl2onnx makes C identifiers of column names; the signature and the graph keep the real ones.
    wanted = ["features"] if len(names) == 1 and len(train.columns) > 1 else [str(name) for name in train.columns]
    renames = dict(zip(names, wanted, strict=True))
    outputs = [port.name for port in proto.graph.output]
    scores = "probabilities" if hasattr(model, "predict_proba") else "scores"  # outlier detectors, margins
    renames |= dict(zip(outputs, ["label", scores] if len(outputs) == 2 else ["prediction"], strict=True))
    rename(proto, renames)
    if image is not None:
        _accept_image(proto, *image)
    _name_alike(proto)
    return proto


def _name_alike(proto: onnx.ModelProto) -> None:
    """Give nodes and graph the same names at every conversion; some converters use random ones."""
    proto.graph.name = "model"
    proto.graph.doc_string = ""
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"


def original_rows(model: Any, table: pd.DataFrame) -> Any:
    """Make rows as the original takes them: a table, or a list of texts for a text pipeline."""
    if hasattr(model, "steps") and type(model.steps[0][1]).__name__ == "TfidfVectorizer":
        return table.iloc[:, 0].tolist()
    return table if hasattr(model, "feature_names_in_") else table.to_numpy()


def _sklearn(model: Any, train: pd.DataFrame, *, numeric: bool, double: bool) -> onnx.ModelProto:
    from skl2onnx import to_onnx as convert  # noqa: PLC0415  slow to import, and not wanted for a path
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, StringTensorType  # noqa: PLC0415

    number = DoubleTensorType if double else FloatTensorType
    if numeric:
        types = [("features", number([None, len(train.columns)]))]
    else:
        types = [
            (
                str(name),
                number([None, 1]) if pd.api.types.is_numeric_dtype(train[name]) else StringTensorType([None, 1]),
            )
            for name in train.columns
        ]
    options: dict[Any, Any] = {}
    if hasattr(model, "predict_proba"):
        options[id(model)] = {"zipmap": False}  # a list of maps is slow to make and to read
    for _, step in getattr(model, "steps", []):
        if type(step).__name__ == "TfidfVectorizer":
            options[id(step)] = {"locale": "C"}  # en_US, the default, is missing on small machines
    proto: onnx.ModelProto = convert(model, initial_types=types, options=options, target_opset=OPSET)
    return proto


def _boosted(model: Any, family: str, width: int) -> onnx.ModelProto:
    from onnxmltools import convert_lightgbm, convert_xgboost  # noqa: PLC0415
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    types = [("features", FloatTensorType([None, width]))]
    if family == "lightgbm":
        proto: onnx.ModelProto = convert_lightgbm(model, initial_types=types, zipmap=False, target_opset=15)
    else:
        proto = convert_xgboost(model, initial_types=types, target_opset=15)
    return proto


def rename(proto: onnx.ModelProto, names: dict[str, str]) -> None:
    """Rename inputs and outputs of a graph, wherever they are used."""
    graph = proto.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} - names.keys()
    inner = {name: f"{name}_inner" for name in taken & set(names.values())}
    names = {**inner, **names}
    for port in (*graph.input, *graph.output, *graph.value_info):
        port.name = names.get(port.name, port.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _accept_image(proto: onnx.ModelProto, name: str, shape: tuple[int, ...]) -> None:
    """Put a flattening in front, so that callers send an image and not a row of pixels."""
    graph = proto.graph
    inner = graph.input[0].name
    flatten = helper.make_node("Flatten", [name], [inner], name="flatten_image", axis=1)
    nodes = [flatten, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]))
