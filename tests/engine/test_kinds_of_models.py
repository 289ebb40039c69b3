"""What onnxruntime runs is served: scalars, tensors without elements, NaN, no inputs at all; other types say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.engine.session import OnnxSession
from serving.errors import ModelInvalid
from serving.http_api.strict_json import dumps
from tests.conformance.direct import Answer, Direct
from tests.conformance.onnx_suite import WAYS, Asker, Case

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
