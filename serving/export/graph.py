"""Changes graphs at their rims: names, types and forms of inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
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
    # Where the graph has a tensor of a new name already, that one makes room: two of one name would be one.
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
    _answer(graph, made)
    for port in graph.output:
        # Trees answer with float32, whatever they take: skl2onnx declares otherwise.
        maker = makers.get(port.name)
        if maker is not None and maker.op_type.startswith("TreeEnsemble") and port.name == maker.output[-1]:
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    if all(opset.domain for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("", 17))
    return keys or None


def _answer(graph: onnx.GraphProto, ports: Iterable[onnx.ValueInfoProto]) -> None:
    """Put ports, of which some may be the graph's own, in place of its outputs."""
    kept = copy.deepcopy(list(ports))
    del graph.output[:]
    graph.output.extend(kept)


def _constant(graph: onnx.GraphProto, name: str, values: Any) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    return name


def _remade(
    proto: onnx.ModelProto, name: str, operator: str, constants: Sequence[Any] = (), **attributes: Any
) -> onnx.ValueInfoProto:
    """Put one more operator behind an output, which keeps its name; return the output, to give it another type."""
    inner = f"{name}_inner"
    rename(proto, {name: inner})
    given = [_constant(proto.graph, f"{name}_{operator}_{i}", values) for i, values in enumerate(constants)]
    proto.graph.node.append(helper.make_node(operator, [inner, *given], [name], **attributes))
    port = next(port for port in proto.graph.output if port.name == inner)
    port.name = name
    return port


def split_targets(proto: onnx.ModelProto, name: str, widths: Sequence[int]) -> None:
    """Make of an output [targets, batch, classes] one output [batch, classes] for each target."""
    graph = proto.graph
    kept = [port for port in graph.output if port.name != name]
    for index, width in enumerate(widths):
        at, made = _constant(graph, f"{name}_target_{index}", index), f"{name}_{index}"
        bounds = [
            _constant(graph, f"{made}_{part}", [value]) for part, value in (("from", 0), ("to", width), ("axis", 1))
        ]
        graph.node.append(helper.make_node("Gather", [name, at], [f"{at}_all"], axis=0))
        graph.node.append(helper.make_node("Slice", [f"{at}_all", *bounds], [made]))
        kept.append(helper.make_tensor_value_info(made, TensorProto.FLOAT, ["batch", width]))
    _answer(graph, kept)


def cast_output(proto: onnx.ModelProto, name: str, datatype: str) -> None:
    """Give an output another type."""
    _remade(proto, name, "Cast", to=ELEMENT[datatype]).type.tensor_type.elem_type = ELEMENT[datatype]


def add_label(proto: onnx.ModelProto, classes: int) -> None:
    """Answer with the place of the highest score too, where the only output is one score for each class.

    Raises CannotExport where it is not.
    """
    graph = proto.graph
    found = [[d.dim_value for d in port.type.tensor_type.shape.dim] for port in graph.output]
    if len(found) != 1 or len(found[0]) != 2 or found[0][1] != classes:
        why = f"has {classes} names, and the file does not answer with one score for each"
        raise CannotExport("classes", why, "leave it out")
    graph.node.append(helper.make_node("ArgMax", [graph.output[0].name], ["label"], axis=1, keepdims=0))
    _answer(graph, [helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]), *graph.output])


def label_of_scores(proto: onnx.ModelProto, classes: Array) -> None:
    """Answer with the class of the highest score: the trees' own label is another where only two classes are left."""
    graph = proto.graph
    label, scores = graph.output[0].name, graph.output[1].name
    rename(proto, {label: f"{label}_inner"})
    values = classes.astype(np.int64) if classes.dtype.kind in "biuf" else classes.astype(object)
    named, place = _constant(graph, f"{label}_classes", values), f"{label}_place"
    graph.node.append(helper.make_node("ArgMax", [scores], [place], axis=1, keepdims=0))
    graph.node.append(helper.make_node("Gather", [named, place], [label]))
    element = graph.initializer[-1].data_type
    _answer(graph, [helper.make_tensor_value_info(label, element, ["batch"]), *graph.output[1:]])


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
    kind = _remade(proto, proto.graph.output[0].name, "Reshape", [[-1]]).type
    kind.CopyFrom(helper.make_tensor_type_proto(kind.tensor_type.elem_type, ["batch"]))


def swap_columns(proto: onnx.ModelProto, name: str) -> None:
    """Exchange the two columns of an output."""
    _remade(proto, name, "Gather", [[1, 0]], axis=1)


class Column(NamedTuple):
    """One input that callers send; `codes` are the numbers of its categories, others become NaN."""

    name: str
    datatype: str
    codes: Mapping[Any, float] | None


def accept_columns(proto: onnx.ModelProto, columns: Sequence[Column]) -> None:
    """Put one typed input a column in front, each made into what the graph takes: apart, or all in one matrix."""
    rename(proto, {port.name: f"/inside/{port.name}" for port in proto.graph.input})
    graph = proto.graph
    inner = list(graph.input)
    # A column that is called like an output has a tensor of another name; callers see the feature's.
    outputs = {port.name for port in graph.output}
    names = [f"{column.name}_" if column.name in outputs else column.name for column in columns]
    tensors = {tensor for node in graph.node for tensor in (*node.input, *node.output)}
    rename(proto, {name: f"/inside/{name}" for name in names if name in tensors})
    front = []
    for index, (column, name) in enumerate(zip(columns, names, strict=True)):
        port = inner[index if len(inner) > 1 else 0]
        made = port.name if len(inner) > 1 else f"/typed/{name}"
        if column.codes is not None:
            keys = "keys_strings" if column.datatype == "BYTES" else "keys_int64s"
            told: dict[str, Any] = {keys: list(column.codes), "values_floats": list(column.codes.values())}
            front.append(
                helper.make_node("LabelEncoder", [name], [made], domain="ai.onnx.ml", default_float=np.nan, **told)
            )
        elif ELEMENT[column.datatype] != port.type.tensor_type.elem_type:
            front.append(helper.make_node("Cast", [name], [made], to=port.type.tensor_type.elem_type))
        else:
            front.append(helper.make_node("Identity", [name], [made]))
    if len(inner) == 1:
        front.append(helper.make_node("Concat", [node.output[0] for node in front], [inner[0].name], axis=1))
    nodes = [*front, *graph.node]
    ports = [
        helper.make_tensor_value_info(name, ELEMENT[column.datatype], ["batch", 1])
        for column, name in zip(columns, names, strict=True)
    ]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(ports)


def accept_image(proto: onnx.ModelProto, name: str, shape: tuple[int, ...]) -> None:
    """Put a flattening in front, so that callers send an image and not a row of pixels."""
    graph = proto.graph
    inner = graph.input[0].name
    nodes = [helper.make_node("Flatten", [name], [inner], name="flatten_image", axis=1), *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]))
