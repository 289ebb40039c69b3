"""What onnxruntime runs is served: scalars, tensors without elements, NaN, no inputs at all; other types say so."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2

from serving.engine.session import OnnxSession
from serving.errors import ModelInvalid
from serving.protocols.strict_json import dumps
from tests.conformance.direct import Answer, Direct
from tests.conformance.onnx_suite import WAYS, Asker, Case
from tests.conftest import MODELS

FLOAT, INT64, STRING, BF16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BFLOAT16
Port = tuple[str, int, Any]
Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Write a graph of nodes to a file."""

    def write(nodes: list[Any], inputs: list[Port], outputs: list[Port], **more: Any) -> Path:
        ports = [[helper.make_tensor_value_info(*port) for port in side] for side in (inputs, outputs)]
        graph = helper.make_graph(nodes, "g", *ports, **more)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        path = tmp_path / "model.onnx"
        path.write_bytes(made.SerializeToString())
        return path

    return write


def asked(model: Direct, inputs: dict[str, Any], outputs: dict[str, Any], ways: tuple[str, ...] = WAYS) -> None:
    """Ask in each way, and compare with what is due."""
    case = Case("m", b"", inputs, outputs, 1e-6, 1e-6)
    for way in ways:
        found = Asker(model, model).ask(way, case, model.described)
        assert found.keys() == outputs.keys()
        for name, value in found.items():
            assert not (fault := case.fault(name, value, text=way in ("V1", "JSON"))), (way, fault)


def v1(model: Direct, body: Any) -> Answer:
    return model.post("/v1/models/m:predict", json.dumps(body))


def v2(model: Direct, *inputs: Any) -> Answer:
    return model.post("/v2/models/m/infer", json.dumps({"inputs": inputs}))


NODE = helper.make_node
X = np.array([[1, -2], [3, 4]], np.float32)
KINDS: dict[str, tuple[list[Any], list[Port], list[Port], dict[str, Any], dict[str, Any]]] = {
    "scalars in": (
        [NODE("Clip", ["x", "least", "most"], ["y"])],
        [("x", FLOAT, ["n", 2]), ("least", FLOAT, []), ("most", FLOAT, [])],
        [("y", FLOAT, ["n", 2])],
        {"x": X, "least": np.float32(-1), "most": np.float32(3)},
        {"y": np.clip(X, -1, 3)},
    ),
    "a scalar out": (
        [NODE("Size", ["x"], ["y"])],
        [("x", FLOAT, ["n", 2])],
        [("y", INT64, [])],
        {"x": X},
        {"y": np.int64(4)},
    ),
    "a scalar of text": (
        [NODE("Identity", ["x"], ["y"])],
        [("x", STRING, [])],
        [("y", STRING, [])],
        {"x": np.array("a", object)},
        {"y": np.array("a", object)},
    ),
    "no rows": (
        [NODE("Neg", ["x"], ["y"])],
        [("x", FLOAT, ["n", 2, "m"])],
        [("y", FLOAT, ["n", 2, "m"])],
        {"x": np.zeros((1, 2, 0), np.float32)},
        {"y": np.zeros((1, 2, 0), np.float32)},
    ),
    "a first past of a decoder": (
        [NODE("Concat", ["past", "x"], ["y"], axis=2)],
        [("past", FLOAT, [1, 2, "past", 2]), ("x", FLOAT, [1, 2, 1, 2])],
        [("y", FLOAT, [1, 2, "all", 2])],
        {"past": np.zeros((1, 2, 0, 2), np.float32), "x": X.reshape(1, 2, 1, 2)},
        {"y": X.reshape(1, 2, 1, 2)},
    ),
    "other axes": (
        [NODE("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        [("x", FLOAT, [2, 2]), ("axes", INT64, [0])],
        [("y", FLOAT, [])],
        {"x": X, "axes": np.zeros(0, np.int64)},
        {"y": X.sum()},
    ),
    "scales that are whole": (
        [NODE("Resize", ["x", "", "scales"], ["y"], mode="nearest")],
        [("x", FLOAT, [1, 1, 2, 2]), ("scales", FLOAT, [4])],
        [("y", FLOAT, [1, 1, "h", "w"])],
        {"x": X.reshape(1, 1, 2, 2), "scales": np.array([1, 1, 1, 2], np.float32)},
        {"y": np.repeat(X.reshape(1, 1, 2, 2), 2, axis=3)},
    ),
    "missing values": (
        [NODE("IsNaN", ["x"], ["nan"]), NODE("Cast", ["nan"], ["y"], to=INT64)],
        [("x", FLOAT, ["n", 2])],
        [("y", INT64, ["n", 2])],
        {"x": np.array([[1, np.nan]], np.float32)},
        {"y": np.array([[0, 1]])},
    ),
    "missing values in an image": (
        [NODE("IsNaN", ["x"], ["nan"]), NODE("Cast", ["nan"], ["y"], to=INT64)],
        [("x", FLOAT, ["n", 2, 2])],
        [("y", INT64, ["n", 2, 2])],
        {"x": np.array([[[1, np.nan], [2, 3]]], np.float32)},
        {"y": np.array([[[0, 1], [0, 0]]])},
    ),
    "several rows for one": (
        [NODE("Concat", ["x", "x", "x"], ["y"], axis=0)],
        [("x", FLOAT, [1, 2])],
        [("y", FLOAT, [3, 2])],
        {"x": X[:1]},
        {"y": np.repeat(X[:1], 3, axis=0)},
    ),
    "no inputs": (
        [NODE("Constant", [], ["y"], value=numpy_helper.from_array(X))],
        [],
        [("y", FLOAT, [2, 2])],
        {},
        {"y": X},
    ),
    "texts, a row each": (
        [NODE("Identity", ["x"], ["y"])],
        [("x", STRING, ["n"])],
        [("y", STRING, ["n"])],
        {"x": np.array(["a", "b"], object)},
        {"y": np.array(["a", "b"], object)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_answered_in_every_way(put: Put, kind: str) -> None:
    """V1, JSON, binary and gRPC give what is due, and the examples of the documentation are answered."""
    nodes, inputs, outputs, given, due = KINDS[kind]
    model = Direct(put(nodes, inputs, outputs))
    asked(model, given, due)
    for path, example in model.examples().items():
        assert example is not None
        answer = model.post(path, dumps(example))
        assert answer.status_code == 200, (path, example, answer.text)


def test_null_is_a_missing_value_where_training_had_some() -> None:
    """JSON null is taken by v2 as by V1 for features that may be missing, and refused by name for others."""
    model = Direct(next((MODELS / "penguins").glob("[0-9]*/model.onnx")))
    row = dict(model.signature.example or {})
    tensors = {
        f.name: {"name": f.name, "datatype": f.datatype, "shape": [1, 1], "data": [row[f.name]]}
        for f in model.signature.features
    }
    some = next(f for f in model.signature.features if f.nullable and f.datatype == "FP32")
    missing = v2(model, *({**tensors, some.name: {**tensors[some.name], "data": [None]}}.values()))
    assert missing.status_code == 200, missing.text
    due = v1(model, {"instances": [{**row, some.name: None}]}).json()["predictions"][0]["label"]
    assert missing.json()["outputs"][0]["data"] == [due]
    never = next((f for f in model.signature.features if not f.nullable), None)
    if never is not None:
        refused = v2(model, *({**tensors, never.name: {**tensors[never.name], "data": [None]}}.values()))
        assert (refused.status_code, "is null" in refused.text) == (400, True)
    iris = Direct(next((MODELS / "iris").glob("[0-9]*/model.onnx")))
    name = iris.signature.inputs[0].name
    refused = v2(iris, {"name": name, "datatype": "FP32", "shape": [1, 4], "data": [1, None, 3, 4]})
    assert "/inputs/0/data: element 1 is null" in refused.text


def test_a_matrix_may_come_as_a_tensor_a_column() -> None:
    """What MLServer's clients make of a table, a tensor for each feature's name, is the matrix: JSON and gRPC."""
    model = Direct(next((MODELS / "iris").glob("[0-9]*/model.onnx")))
    names = [feature.name for feature in model.signature.features]
    matrix = np.array([[5.1, 3.5, 1.4, 0.2], [6, 2, 5, 2]], np.float32)
    rows = v1(model, {"instances": matrix.tolist()}).json()["predictions"]

    def column(index: int, **more: Any) -> dict[str, Any]:
        return {"name": names[index], "datatype": "FP64", "shape": [2], "data": matrix[:, index].tolist(), **more}

    columns = [column(i) for i in range(4)]
    columns[0] |= {"shape": [2, 1]}
    columns[1] |= {"datatype": "INT64", "data": [3, 2]}
    answer = v2(model, *reversed(columns))
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"][0]["data"] == [row["label"] for row in rows]
    request = service_pb2.ModelInferRequest()
    for index in (2, 0, 1, 3):
        request.inputs.add(name=names[index], datatype="FP32", shape=[2])
        request.raw_input_contents.append(np.ascontiguousarray(matrix[:, index]).tobytes())
    assert len(model.ModelInfer(request).outputs) == len(model.signature.outputs)
    assert f"columns are missing: {names[0]}" in v2(model, *columns[1:]).text
    assert "columns have different lengths" in v2(model, *columns[1:], column(0, shape=[1], data=[1])).text
    assert "does not fit FP32" in v2(model, *columns[1:], column(0, data=[1e39, 1])).text
    assert "/inputs/3/shape" in v2(model, *columns[1:], column(0, shape=[1, 2])).text
    whole = {"name": "features", "datatype": "FP32", "shape": [2, 4], "data": matrix.ravel().tolist()}
    assert "send one of both" in v2(model, columns[0], whole).text


def test_a_column_may_come_in_one_dimension() -> None:
    """A model of columns [N, 1] takes them as [N] too: as JSON and, again and again, over gRPC."""
    model = Direct(next((MODELS / "penguins").glob("[0-9]*/model.onnx")))
    row = dict(model.signature.example or {})
    due = v1(model, {"instances": [row]}).json()["predictions"][0]["label"]
    columns = [
        {"name": spec.name, "datatype": spec.datatype, "shape": [1], "data": [row[spec.name]]}
        for spec in model.signature.inputs
    ]
    assert v2(model, *columns).json()["outputs"][0]["data"] == [due]
    request = service_pb2.ModelInferRequest()
    for spec in model.signature.inputs:
        request.inputs.add(name=spec.name, datatype=spec.datatype, shape=[1])
        value = row[spec.name]
        raw = (
            len(value.encode()).to_bytes(4, "little") + value.encode()
            if spec.datatype == "BYTES"
            else np.float32(value)
        )
        request.raw_input_contents.append(bytes(raw))
    for _ in range(3):
        assert model.ModelInfer(request).raw_output_contents[0][4:] == due.encode()


def test_forms_of_tensorflow_serving(put: Put) -> None:
    """Strings as {"b64": ...}, and values of [N, 1] inputs in brackets of their own, by row and by column."""
    ports = [("word", STRING, ["n", 1]), ("size", FLOAT, ["n", 1])]
    ends = [("a", STRING, ["n", 1]), ("b", FLOAT, ["n", 1])]
    model = Direct(put([NODE("Identity", ["word"], ["a"]), NODE("Neg", ["size"], ["b"])], ports, ends))
    due = [{"a": "h\xe9", "b": -1.5}, {"a": "i", "b": -2}]
    coded = {"b64": base64.b64encode("h\xe9".encode()).decode()}
    for rows in (
        [{"word": coded, "size": [1.5]}, {"word": "i", "size": 2}],
        [{"word": [coded], "size": 1.5}, {"word": ["i"], "size": [2]}],
        [[coded, [1.5]], ["i", 2]],
    ):
        answer = v1(model, {"instances": rows})
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"] == due
    columns = {"word": [[coded], ["i"]], "size": [[1.5], [2]]}
    assert v1(model, {"inputs": columns}).json()["outputs"] == {"a": ["h\xe9", "i"], "b": [-1.5, -2]}
    assert "/instances/0/word/b64: is not base64" in v1(model, {"instances": [{"word": {"b64": "?"}, "size": 1}]}).text
    assert "is not UTF-8" in v1(model, {"instances": [{"word": {"b64": "/w=="}, "size": 1}]}).text
    assert "/instances/0/size" in v1(model, {"instances": [{"word": "i", "size": [1, 2]}]}).text


def test_weights_may_be_sent_or_left_out(put: Put) -> None:
    """An initialiser that is listed as an input has its own value unless a request sends another, as bytes or JSON."""
    weights = numpy_helper.from_array(np.array([10, 20], np.float32), "w")
    ports = [("x", FLOAT, ["n", 2]), ("w", FLOAT, [2])]
    model = Direct(put([NODE("Add", ["x", "w"], ["y"])], ports, [("y", FLOAT, ["n", 2])], initializer=[weights]))
    assert [spec.name for spec in model.signature.inputs] == ["x"]
    assert model.signature.batch == "dynamic"
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    w = {"name": "w", "datatype": "FP32", "shape": [2], "data": [100, 200]}
    assert v1(model, {"instances": [[1, 2]]}).json()["predictions"] == [[11, 22]]
    assert v2(model, x).json()["outputs"][0]["data"] == [11, 22]
    assert v2(model, w, x).json()["outputs"][0]["data"] == [101, 202]
    assert "inputs are missing: x" in v2(model, w).text
    named = v1(model, {"instances": [{"f0": 1, "f1": 2, "w": [100, 200]}]})
    assert "/instances/0/w: is a weight of this model: send it as a tensor to /v2/models" in named.text
    request = service_pb2.ModelInferRequest()
    for tensor in (x, w):
        request.inputs.add(name=tensor["name"], datatype="FP32", shape=tensor["shape"])
        request.raw_input_contents.append(np.array(tensor["data"], np.float32).tobytes())
    assert np.frombuffer(model.ModelInfer(request).raw_output_contents[0], np.float32).tolist() == [101, 202]


def test_one_instance_has_one_prediction(put: Put) -> None:
    """A model that makes three rows of its one is answered with one prediction of three rows, not with three."""
    nodes, inputs, outputs, given, due = KINDS["several rows for one"]
    model = Direct(put(nodes, inputs, outputs))
    answer = v1(model, {"instances": [{"x": given["x"].tolist()}]})
    assert answer.json()["predictions"] == [due["y"].tolist()]


def test_an_input_without_a_shape_takes_any(put: Put) -> None:
    """Where a graph says nothing of an input's shape, onnxruntime says what it takes."""
    path = put([NODE("Neg", ["x"], ["y"])], [("x", FLOAT, None)], [("y", FLOAT, None)])
    model = Direct(path)
    for x in (np.float32(2), X, X.reshape(1, 2, 2, 1)):
        asked(model, {"x": x}, {"y": -x}, ("JSON", "binary", "gRPC"))


def test_the_only_input_in_base64(put: Put) -> None:
    """A model of one string takes {"b64": ...} as a whole instance."""
    model = Direct(put([NODE("Identity", ["x"], ["y"])], [("x", STRING, ["n"])], [("y", STRING, ["n"])]))
    assert v1(model, {"instances": [{"b64": "aGk="}, "there"]}).json()["predictions"] == ["hi", "there"]


def test_infinities_pass_as_bytes(put: Put) -> None:
    """A bare model's floats take infinities and NaN as Triton does; in JSON a number that does not fit is refused."""
    model = Direct(put([NODE("Neg", ["x"], ["y"])], [("x", FLOAT, ["n", 3])], [("y", FLOAT, ["n", 3])]))
    x = np.array([[np.inf, -np.inf, np.nan]], np.float32)
    asked(model, {"x": x}, {"y": -x}, ("binary", "gRPC"))
    beyond = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [0, 1e39, 1]}
    assert "/inputs/0/data: element 1 is too large for FP32" in v2(model, beyond).text
    assert "too large for FP32" in v1(model, {"instances": [[0, 1e39, 1]]}).text
    for token in ("NaN", "Infinity", "1e999"):
        answer = model.post("/v1/models/m:predict", f'{{"instances": [[0, {token}, 1]]}}')
        assert answer.status_code == 400


def test_scalars_of_bf16_stay_scalars(put: Put) -> None:
    """A BF16 tensor without dimensions goes in and comes out as one."""
    path = put([NODE("Identity", ["x"], ["y"])], [("x", BF16, [])], [("y", BF16, [])])
    model = Direct(path)
    x = np.array(1.5, model.session.example[0].dtype)  # type: ignore[index]
    asked(model, {"x": x}, {"y": x}, ("binary", "gRPC"))
    assert json.loads(v1(model, {"instances": [{"x": 1.5}]}).content)["predictions"] == [1.5]
    assert model.examples()["/v2/models/m/infer"] is None, "BF16 has no form in JSON"


def test_one_dimensional_data_of_a_scalar(put: Put) -> None:
    """Data that is nested deeper than its shape is refused by name, of a scalar too."""
    model = Direct(put([NODE("Neg", ["x"], ["y"])], [("x", FLOAT, [])], [("y", FLOAT, [])]))
    head = {"name": "x", "datatype": "FP32", "shape": []}
    assert json.loads(v2(model, {**head, "data": [2]}).content)["outputs"][0]["data"] == [-2]
    assert json.loads(v2(model, {**head, "data": 2}).content)["outputs"][0]["data"] == [-2]
    assert "/inputs/0/data: element 0 is an array" in v2(model, {**head, "data": [[2]]}).text


def test_an_empty_tensor_is_small_in_its_other_dimensions_too(put: Put) -> None:
    """[0, 10^9] costs nothing to send, and a sum over its rows would be a billion zeros: refused by name."""
    axes = numpy_helper.from_array(np.array([0]), "axes")
    node = NODE("ReduceSum", ["x", "axes"], ["y"], keepdims=0)
    model = Direct(put([node], [("x", FLOAT, ["n", "m"])], [("y", FLOAT, ["m"])], initializer=[axes]))
    for shape in ([0, 10**9], [0, 10**399], [2**62, 0]):
        refused = v2(model, {"name": "x", "datatype": "FP32", "shape": shape, "data": []})
        assert (refused.status_code, "/inputs/0/shape: beside 0" in refused.text) == (400, True), refused.text
    answer = v2(model, {"name": "x", "datatype": "FP32", "shape": [0, 3], "data": []})
    assert answer.json()["outputs"][0]["data"] == [0, 0, 0]


def test_a_raw_body_for_an_input_that_is_empty(put: Put) -> None:
    """A body without JSON is measured against an input of no elements without a division by it."""
    path = put([NODE("Shape", ["x"], ["y"])], [("x", FLOAT, [0, "n"])], [("y", INT64, [2])])
    answer = Direct(path).post("/v2/models/m/infer", b"1234", {"Inference-Header-Content-Length": "0"})
    assert answer.status_code == 400
    assert "has 4 bytes, and FP32 [0, 4] takes 0" in answer.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [(TensorProto.FLOAT8E4M3FN, "tensor(float8e4m3fn)"), (TensorProto.INT4, "tensor(int4)")],
)
@pytest.mark.parametrize("role", ["input", "output"])
def test_types_that_no_protocol_has_are_named(put: Put, kind: int, said: str, role: str) -> None:
    """A model with such an input or output is not served, and the reason names it and its type."""
    ends = (kind, FLOAT) if role == "input" else (FLOAT, kind)
    scale = numpy_helper.from_array(np.float32(1), "scale")
    zero = helper.make_tensor("zero", kind, [], b"\0", raw=True)
    node = NODE("DequantizeLinear" if role == "input" else "QuantizeLinear", ["x", "scale", "zero"], ["y"])
    path = put([node], [("x", ends[0], ["n"])], [("y", ends[1], ["n"])], initializer=[scale, zero])
    proto = onnx.load(str(path))
    proto.opset_import[0].version, proto.ir_version = 21, 10
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelInvalid, match=role) as refused:
        OnnxSession(path)
    assert said in refused.value.message
    assert ("x" if role == "input" else "y") in refused.value.message
