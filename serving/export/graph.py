"""Changes graphs at their rims: names, types and forms of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx import compose as joining

from serving.export.refusal import CannotExport
from serving.tensors import Array

LABELS = ("classlabels_int64s", "classlabels_strings")
ELEMENT = {
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "INT64": TensorProto.INT64,
    "BOOL": TensorProto.BOOL,
    "BYTES": TensorProto.STRING,
}


def rename(proto: onnx.ModelProto, names: dict[str, str]) -> None:
    """Rename inputs and outputs of a graph, wherever they are used."""
    graph = proto.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} - names.keys()
    taken |= {tensor.name for tensor in graph.initializer} - names.keys()
    inner = {name: f"{name}_inner" for name in taken & set(names.values())}
    names = {**inner, **names}
    for port in (*graph.input, *graph.output, *graph.value_info):
        port.name = names.get(port.name, port.name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def name_alike(proto: onnx.ModelProto) -> None:
    """Give nodes and graph the same names at every conversion; some converters use random ones."""
    proto.graph.name = "model"
    proto.graph.doc_string = ""
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"


def plain_outputs(proto: onnx.ModelProto) -> tuple[Any, ...] | None:
    """Make tensors of outputs that are maps (ZipMap) or sequences of tensors; return the keys of the maps, if any."""
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    keys: tuple[Any, ...] | None = None
    made: list[onnx.ValueInfoProto] = []
    for port in graph.output:
        maker = makers.get(port.name)
        if maker is not None and maker.op_type == "ZipMap":
            names = [v for a in maker.attribute if a.name in LABELS for v in helper.get_attribute_value(a)]
            keys = tuple(name.decode() if isinstance(name, bytes) else name for name in names)
            graph.node.remove(maker)
            graph.node.append(helper.make_node("Cast", [maker.input[0]], [port.name], to=TensorProto.FLOAT))
            made.append(helper.make_tensor_value_info(port.name, TensorProto.FLOAT, ["batch", len(keys) or None]))
        elif maker is not None and maker.op_type == "SequenceConstruct":
            graph.node.remove(maker)
            for index, inner in enumerate(maker.input):
                name = f"{port.name}_{index}"
                graph.node.append(helper.make_node("Identity", [inner], [name]))
                made.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]))
        else:
            made.append(port)
    kept = [_copy(port) for port in made]
    for port in kept:
        # Trees answer with float32, whatever they take: skl2onnx declares otherwise.
        maker = makers.get(port.name)
        if maker is not None and maker.op_type.startswith("TreeEnsemble") and port.name == maker.output[-1]:
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.output[:]
    graph.output.extend(kept)
    if all(opset.domain for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("", 17))
    return keys or None


def _copy(port: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    out = onnx.ValueInfoProto()
    out.CopyFrom(port)
    return out


def split_targets(proto: onnx.ModelProto, name: str, widths: Sequence[int]) -> None:
    """Make of an output [targets, batch, classes] one output [batch, classes] for each target."""
    graph = proto.graph
    kept = [_copy(port) for port in graph.output if port.name != name]
    for index, width in enumerate(widths):
        at, start, end, axis = (f"{name}_{part}_{index}" for part in ("target", "start", "end", "axis"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(index, dtype=np.int64), at))
        for constant, value in ((start, 0), (end, width), (axis, 1)):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], dtype=np.int64), constant))
        graph.node.append(helper.make_node("Gather", [name, at], [f"{at}_all"], axis=0))
        graph.node.append(helper.make_node("Slice", [f"{at}_all", start, end, axis], [f"{name}_{index}"]))
        kept.append(helper.make_tensor_value_info(f"{name}_{index}", TensorProto.FLOAT, ["batch", width]))
    del graph.output[:]
    graph.output.extend(kept)


def cast_output(proto: onnx.ModelProto, name: str, datatype: str) -> None:
    """Give an output another type."""
    inner = f"{name}_uncast"
    graph = proto.graph
    shape = next(
        [d.dim_value or d.dim_param or None for d in p.type.tensor_type.shape.dim]
        for p in graph.output
        if p.name == name
    )
    rename(proto, {name: inner})
    kept = [_copy(port) for port in graph.output]
    del graph.output[:]
    for port in kept:
        graph.output.append(
            helper.make_tensor_value_info(name, ELEMENT[datatype], shape) if port.name == inner else port
        )
    graph.node.append(helper.make_node("Cast", [inner], [name], to=ELEMENT[datatype]))


def add_label(proto: onnx.ModelProto, classes: int) -> None:
    """Answer with the place of the highest score too, where the only output is one score for each class.

    Raises CannotExport where it is not.
    """
    graph = proto.graph
    found = [[d.dim_value for d in port.type.tensor_type.shape.dim] for port in graph.output]
    if len(found) != 1 or len(found[0]) != 2 or found[0][1] != classes:
        raise CannotExport(
            "classes", f"has {classes} names, and the file does not answer with one score for each", "leave it out"
        )
    scores = _copy(graph.output[0])
    graph.node.append(helper.make_node("ArgMax", [scores.name], ["label"], axis=1, keepdims=0))
    del graph.output[:]
    graph.output.extend([helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]), scores])


def label_of_scores(proto: onnx.ModelProto, classes: Array) -> None:
    """Answer with the class of the highest score: the trees' own label is another where only two classes are left."""
    graph = proto.graph
    label, scores = graph.output[0].name, graph.output[1].name
    rename(proto, {label: f"{label}_inner"})
    values = classes.astype(np.int64) if classes.dtype.kind in "biuf" else classes.astype(object)
    graph.initializer.append(onnx.numpy_helper.from_array(values, f"{label}_classes"))
    graph.node.append(helper.make_node("ArgMax", [scores], [f"{label}_place"], axis=1, keepdims=0))
    graph.node.append(helper.make_node("Gather", [f"{label}_classes", f"{label}_place"], [label]))
    kept = [_copy(port) for port in graph.output[1:]]
    element = graph.initializer[-1].data_type
    del graph.output[:]
    graph.output.extend([helper.make_tensor_value_info(label, element, ["batch"]), *kept])


def joined(front: onnx.ModelProto, behind: onnx.ModelProto) -> onnx.ModelProto:
    """Give what the only output of one graph holds, as float32, to the only input of another, and answer as that."""
    behind = joining.add_prefix(behind, "behind/", rename_outputs=False)
    output, name = front.graph.output[0].name, behind.graph.input[0].name
    front.graph.node.append(helper.make_node("Cast", [output], [name], to=TensorProto.FLOAT))
    front.graph.node.extend(behind.graph.node)
    front.graph.initializer.extend(behind.graph.initializer)
    del front.graph.output[:]
    front.graph.output.extend(behind.graph.output)
    domains = {opset.domain for opset in front.opset_import}
    front.opset_import.extend(opset for opset in behind.opset_import if opset.domain not in domains)
    return front


def reshape_label(proto: onnx.ModelProto) -> None:
    """Give the first output, a label a row, one dimension: some converters write [rows, 1] or [1, rows]."""
    graph = proto.graph
    name = graph.output[0].name
    rename(proto, {name: f"{name}_shaped"})
    port = _copy(graph.output[0])
    kept = [helper.make_tensor_value_info(name, port.type.tensor_type.elem_type, ["batch"])]
    kept += [_copy(other) for other in graph.output[1:]]
    del graph.output[:]
    graph.output.extend(kept)
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], dtype=np.int64), f"{name}_shape"))
    graph.node.append(helper.make_node("Reshape", [f"{name}_shaped", f"{name}_shape"], [name]))


def swap_columns(proto: onnx.ModelProto, name: str) -> None:
    """Exchange the two columns of an output."""
    graph = proto.graph
    rename(proto, {name: f"{name}_swapped"})
    for port in graph.output:
        if port.name == f"{name}_swapped":
            port.name = name
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 0], dtype=np.int64), f"{name}_order"))
    graph.node.append(helper.make_node("Gather", [f"{name}_swapped", f"{name}_order"], [name], axis=1))


class Entrance:
    """What stands before a converted graph: one typed input a column, each made into what the graph takes."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        self._inner = [port.name for port in proto.graph.input]
        rename(proto, {name: f"/inside/{name}" for name in self._inner})
        self._inner = [f"/inside/{name}" for name in self._inner]
        self._types = {port.name: port.type.tensor_type.elem_type for port in proto.graph.input}
        self._nodes: list[onnx.NodeProto] = []
        self._ports: list[onnx.ValueInfoProto] = []
        self._columns: list[str] = []

    def add(self, name: str, datatype: str, codes: Mapping[Any, float] | None = None) -> None:
        """Add the next column; `codes` are the numbers of its categories, others become NaN."""
        self._ports.append(helper.make_tensor_value_info(name, ELEMENT[datatype], ["batch", 1]))
        inner = self._inner[len(self._columns)] if len(self._inner) > 1 else self._inner[0]
        due = self._types[inner]
        at = f"/typed/{name}"
        if codes is not None:
            kind = "keys_strings" if datatype == "BYTES" else "keys_int64s"
            keys: dict[str, Any] = {
                kind: list(codes),
                "values_floats": list(codes.values()),
                "default_float": float("nan"),
            }
            self._nodes.append(helper.make_node("LabelEncoder", [name], [at], domain="ai.onnx.ml", **keys))
        elif ELEMENT[datatype] != due:
            self._nodes.append(helper.make_node("Cast", [name], [at], to=due))
        else:
            self._nodes.append(helper.make_node("Identity", [name], [at]))
        self._columns.append(at)

    def close(self) -> None:
        """Join the columns to the graph."""
        if len(self._inner) == 1:
            self._nodes.append(helper.make_node("Concat", self._columns, self._inner, axis=1))
        else:
            for at, inner in zip(self._columns, self._inner, strict=True):
                self._nodes.append(helper.make_node("Identity", [at], [inner]))
        graph = self._proto.graph
        tensors = {tensor for node in graph.node for tensor in (*node.input, *node.output)}
        rename(self._proto, {port.name: f"/inside/{port.name}" for port in self._ports if port.name in tensors})
        nodes = [*self._nodes, *graph.node]
        del graph.node[:], graph.input[:]
        graph.node.extend(nodes)
        graph.input.extend(self._ports)


def accept_image(proto: onnx.ModelProto, name: str, shape: tuple[int, ...]) -> None:
    """Put a flattening in front, so that callers send an image and not a row of pixels."""
    graph = proto.graph
    inner = graph.input[0].name
    nodes = [helper.make_node("Flatten", [name], [inner], name="flatten_image", axis=1), *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]))
