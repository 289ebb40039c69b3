"""A user's own `.onnx`, without a signature, serves: whatever its inputs and outputs look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx import TensorProto, helper
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from serving.http_api.app import create_app
from serving.settings import Settings

Put = Callable[[onnx.ModelProto], TestClient]
FLOAT, INT64, STRING, BOOL, DOUBLE = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.STRING,
    TensorProto.BOOL,
    TensorProto.DOUBLE,
)


@pytest.fixture
def put(tmp_path: Path) -> Any:
    """Serve one graph as the model `m`."""
    open_clients = []

    def serve(proto: onnx.ModelProto) -> TestClient:
        folder = tmp_path / "m" / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(proto.SerializeToString())
        client = TestClient(create_app(Settings(models=tmp_path)))
        client.__enter__()
        open_clients.append(client)
        problems = client.get("/v1/models").json()["problems"]
        assert not problems, problems
        return client

    yield serve
    for client in open_clients:
        client.__exit__()


def graph(nodes: list[Any], inputs: list[tuple[str, int, Any]], outputs: list[tuple[str, int, Any]]) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, outputs, **attributes)


def v1(client: TestClient, body: dict[str, Any]) -> Any:
    answer = client.post("/v1/models/m:predict", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def v2(client: TestClient, *inputs: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/v2/models/m/infer", json={"inputs": list(inputs)})
    assert answer.status_code == 200, answer.text
    return {o["name"]: o for o in answer.json()["outputs"]}


def test_one_matrix(put: Put) -> None:
    """One [batch, n] input: rows by position or by made-up names f0, f1."""
    client = put(graph([node("Mul", ["x", "x"], ["y"])], [("x", FLOAT, ["n", 3])], [("y", FLOAT, ["n", 3])]))
    assert v1(client, {"instances": [[1, 2, 3]]})["predictions"] == [[1, 4, 9]]
    assert v1(client, {"instances": [{"f0": 1, "f1": 2, "f2": 3}]})["predictions"] == [[1, 4, 9]]
    out = v2(client, {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]})
    assert out["y"]["data"] == [1, 4, 9, 16, 25, 36]


def test_one_input_a_column_with_strings(put: Put) -> None:
    """Several [batch, 1] inputs are the features, by their names, strings among them."""
    columns = {"colour": np.array([["red"], ["blue"]] * 20, dtype=object), "size": np.arange(40.0).reshape(-1, 1)}
    import pandas as pd

    table = pd.DataFrame({k: v.ravel() for k, v in columns.items()})
    model = make_pipeline(
        make_column_transformer((OneHotEncoder(), ["colour"]), ("passthrough", ["size"])), LogisticRegression()
    )
    model.fit(table, [0, 1] * 20)
    types = [("colour", StringTensorType([None, 1])), ("size", FloatTensorType([None, 1]))]
    client = put(to_onnx(model, initial_types=types, options={"zipmap": False}, target_opset={"": 17, "ai.onnx.ml": 3}))
    rows = [{"colour": "red", "size": 3}, {"size": 3, "colour": "blue"}]
    assert [p["label"] for p in v1(client, {"instances": rows})["predictions"]] == [0, 1]
    assert v1(client, {"inputs": {"colour": ["blue"], "size": [1]}})["outputs"]["label"] == [1]
    refused = client.post("/v1/models/m:predict", json={"instances": [{"colour": 1, "size": "x"}]})
    assert refused.status_code == 422
    assert [d["path"] for d in refused.json()["details"]] == ["/instances/0/colour", "/instances/0/size"]


@pytest.mark.parametrize("classes", [["no", "yes"], [3, 7]], ids=["string", "integer"])
def test_sequences_of_maps(put: Put, classes: list[Any]) -> None:
    """ZipMap, the exporters' default, answers label and probabilities by class, in V1 and as a tensor in v2."""
    rows = np.arange(20.0, dtype=np.float32).reshape(-1, 1)
    model = LogisticRegression().fit(rows, [classes[int(i > 9)] for i in range(20)])
    client = put(to_onnx(model, rows[:1], target_opset={"": 17, "ai.onnx.ml": 3}))
    low, high = v1(client, {"instances": [0, 19]})["predictions"]
    assert (low["label"], high["label"]) == (classes[0], classes[1])
    assert high["probabilities"][str(classes[1])] > 0.9
    out = v2(client, {"name": "X", "datatype": "FP32", "shape": [2, 1], "data": [0, 19]})
    assert out["output_probability"]["shape"] == [2, 2]


def test_several_inputs_and_outputs_of_several_types(put: Put) -> None:
    """Inputs and outputs of different types and shapes keep their names and types."""
    client = put(
        graph(
            [
                node("Cast", ["count"], ["c"], to=FLOAT),
                node("Mul", ["c", "price"], ["total"]),
                node("Not", ["flag"], ["unflag"]),
                node("Identity", ["word"], ["echo"]),
            ],
            [
                ("count", INT64, ["n", 1]),
                ("price", FLOAT, ["n", 1]),
                ("flag", BOOL, ["n"]),
                ("word", STRING, ["n", 2]),
            ],
            [
                ("total", FLOAT, ["n", 1]),
                ("unflag", BOOL, ["n"]),
                ("echo", STRING, ["n", 2]),
            ],
        )
    )
    row = {"count": 2, "price": 1.5, "flag": True, "word": ["a", "ü"]}
    assert v1(client, {"instances": [row]})["predictions"] == [{"total": 3.0, "unflag": False, "echo": ["a", "ü"]}]
    out = v2(
        client,
        {"name": "word", "datatype": "BYTES", "shape": [1, 2], "data": ["x", ""]},
        {"name": "flag", "datatype": "BOOL", "shape": [1], "data": [False]},
        {"name": "price", "datatype": "FP32", "shape": [1, 1], "data": [2]},
        {"name": "count", "datatype": "INT64", "shape": [1, 1], "data": [9007199254740993]},
    )
    assert out["echo"]["data"] == ["x", ""]
    assert out["unflag"]["data"] == [True]
    for bad in (2.5, True, "2", 2**63):
        assert client.post("/v1/models/m:predict", json={"instances": [{**row, "count": bad}]}).status_code == 422


def test_dynamic_inner_dimensions(put: Put) -> None:
    """A free inner dimension takes any length; requests of different lengths are answered each for itself."""
    client = put(graph([node("Neg", ["x"], ["y"])], [("x", FLOAT, ["n", "m"])], [("y", FLOAT, ["n", "m"])]))
    assert v1(client, {"instances": [[1, 2, 3]]})["predictions"] == [[-1, -2, -3]]
    assert v1(client, {"instances": [[1, 2]]})["predictions"] == [[-1, -2]]
    ragged = client.post("/v1/models/m:predict", json={"instances": [[1, 2], [1]]})
    assert ragged.status_code == 422
    assert "different shapes" in ragged.json()["error"]


def test_a_batch_fixed_at_one(put: Put) -> None:
    """A graph whose batch is 1 still takes many rows in V1; in v2 its shape is what it is."""
    client = put(graph([node("Neg", ["x"], ["y"])], [("x", FLOAT, [1, 2])], [("y", FLOAT, [1, 2])]))
    assert v1(client, {"instances": [[1, 2], [3, 4], [5, 6]]})["predictions"] == [[-1, -2], [-3, -4], [-5, -6]]
    out = v2(client, {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]})
    assert out["y"]["data"] == [-1, -2]
    two = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]}
    assert client.post("/v2/models/m/infer", json=two).status_code == 400


def test_no_batch_dimension(put: Put) -> None:
    """A graph without a batch takes one example at a time, as the tensors that it has."""
    client = put(
        graph(
            [node("ReduceMean", ["x"], ["mean"], keepdims=0), node("Add", ["x", "b"], ["y"])],
            [("x", FLOAT, [3]), ("b", FLOAT, [])],
            [("mean", FLOAT, []), ("y", FLOAT, [3])],
        )
    )
    out = v2(
        client,
        {"name": "x", "datatype": "FP32", "shape": [3], "data": [1, 2, 3]},
        {"name": "b", "datatype": "FP32", "shape": [], "data": [1]},
    )
    assert (out["mean"]["shape"], out["mean"]["data"]) == ([], [2.0])
    assert out["y"]["data"] == [2, 3, 4]


def test_an_output_whose_rank_its_inputs_decide_is_described_as_declared(put: Put) -> None:
    """Where axes are an input, the made-up ones of a probe say nothing of the rank, and are not shown as an example."""
    made = graph(
        [node("Identity", ["a"], ["axes"]), node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        [("x", FLOAT, [2, 3, 4]), ("a", INT64, [2])],
        [("y", FLOAT, [4])],
    )
    client = put(made)
    assert client.get("/v2/models/m").json()["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [4]}]
    described = client.get("/openapi.json").json()["paths"]["/v1/models/m:predict"]["post"]
    assert "example" not in described["requestBody"]["content"]["application/json"]
    out = v2(
        client,
        {"name": "x", "datatype": "FP32", "shape": [2, 3, 4], "data": [1] * 24},
        {"name": "a", "datatype": "INT64", "shape": [2], "data": [0, 1]},
    )
    assert (out["y"]["shape"], out["y"]["data"]) == ([4], [6.0] * 4)


def test_an_example_that_lists_can_not_show_is_not_shown(put: Put) -> None:
    """Behind an empty dimension a list shows no size: V1's documentation has no example, and v2's is answered."""
    client = put(graph([node("Identity", ["x"], ["y"])], [("x", FLOAT, [0, "n"])], [("y", FLOAT, [0, "n"])]))
    paths = client.get("/openapi.json").json()["paths"]
    predict, infer = (
        paths[path]["post"]["requestBody"]["content"]["application/json"]
        for path in ("/v1/models/m:predict", "/v2/models/m/infer")
    )
    assert "example" not in predict
    assert client.post("/v2/models/m/infer", json=infer["example"]).status_code == 200


def test_a_model_without_rows_takes_one_example_a_request(put: Put) -> None:
    """Where a graph has no batch dimension, a second row is refused, not dropped, and outputs stand whole."""
    client = put(graph([node("NonZero", ["x"], ["y"])], [("x", FLOAT, ["n"])], [("y", INT64, [1, "k"])]))
    answer = client.post("/v1/models/m:predict", json={"instances": [[1.0], [2.0]]})
    assert answer.status_code == 422
    assert "one by one" in answer.json()["error"]
    for row, due in (([1.0], [[0]]), ([1.0, 2.0], [[0, 1]]), ([0.0], [[]])):
        assert client.post("/v1/models/m:predict", json={"instances": [row]}).json()["predictions"] == [due]
        assert client.post("/v1/models/m:predict", json={"inputs": [row]}).json()["outputs"] == [due]


@pytest.mark.parametrize("body", [{"instances": [["a"], ["b", "c"]]}, {"inputs": {"s": [["a"], ["b", "c"]]}}])
def test_rows_of_strings_of_different_lengths_are_refused(put: Put, body: dict[str, Any]) -> None:
    """Ragged strings are named as such; the model never sees a list written out as a string."""
    client = put(graph([node("Identity", ["s"], ["y"])], [("s", STRING, ["n", "k"])], [("y", STRING, ["n", "k"])]))
    answer = client.post("/v1/models/m:predict", json=body)
    assert answer.status_code == 422, answer.text
    assert "different shapes" in answer.json()["error"]


def test_one_scalar_a_row_and_doubles(put: Put) -> None:
    """A [batch] input is one value a row; doubles keep their precision."""
    client = put(graph([node("Neg", ["x"], ["y"])], [("x", DOUBLE, ["n"])], [("y", DOUBLE, ["n"])]))
    exact = 1700000000.123456
    assert v1(client, {"instances": [exact, 2]})["predictions"] == [-exact, -2]


def test_a_graph_that_mixes_its_rows_is_never_batched(put: Put) -> None:
    """Where outputs are not one a row, strangers' rows never meet in the graph."""
    client = put(
        graph(
            [node("ReduceSum", ["x"], ["y"], keepdims=0)],
            [("x", FLOAT, ["n", 2])],
            [("y", FLOAT, [])],
        )
    )
    out = v2(client, {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]})
    assert out["y"]["data"] == [10.0]


def test_values_that_the_graph_refuses_are_the_callers_to_mend(put: Put) -> None:
    """A row that fits the signature and breaks the graph is a 4xx without a trace, and the next one is answered."""
    table = helper.make_tensor("table", FLOAT, [2, 1], [10.0, 20.0])
    proto = graph(
        [node("Gather", ["table", "i"], ["y"], axis=0)],
        [("i", INT64, ["n"])],
        [("y", FLOAT, ["n", 1])],
    )
    proto.graph.initializer.append(table)
    client = put(proto)
    bad = client.post("/v1/models/m:predict", json={"instances": [7]})
    assert bad.status_code == 422
    assert "Gather" not in bad.text
    assert "/" not in bad.json()["error"].replace("value or shape", "")
    assert v1(client, {"instances": [1]})["predictions"] == [20.0]


def test_a_number_too_large_for_half_a_float_is_refused_by_that_type(put: Put) -> None:
    """1e6 is no FP16: the refusal names the cell and the type that the model takes."""
    half = TensorProto.FLOAT16
    client = put(graph([node("Identity", ["x"], ["y"])], [("x", half, ["n", 2])], [("y", half, ["n", 2])]))
    answer = client.post("/v1/models/m:predict", json={"instances": [[1, 1e6]]})
    assert answer.status_code == 422
    assert answer.json()["details"][0]["message"] == "is too large for FP16, which the model takes"


def test_an_output_that_no_protocol_carries_is_named_with_its_type(tmp_path: Path) -> None:
    """A sequence of tensors has no place in any protocol: the model is refused, with the output and its type."""
    proto = graph([node("SequenceConstruct", ["x"], ["y"])], [("x", FLOAT, ["n", 2])], [])
    proto.graph.output.append(helper.make_tensor_sequence_value_info("y", FLOAT, None))
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(proto.SerializeToString())
    with TestClient(create_app(Settings(models=tmp_path))) as client:
        problem = str(client.get("/v1/models").json()["problems"])
    assert "output y is of type seq(tensor(float))" in problem


def test_an_output_whose_rank_the_request_decides_may_have_any(put: Put) -> None:
    """Axes that are an input decide how many dimensions come out: metadata and documentation promise none."""
    client = put(graph([node("Unsqueeze", ["x", "axes"], ["y"])], [("x", FLOAT, ["a", "b"]), ("axes", INT64, ["n"])],
                       [("y", FLOAT, None)]))  # fmt: skip
    tensors = [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]},
        {"name": "axes", "datatype": "INT64", "shape": [2], "data": [0, 3]},
    ]
    answer = client.post("/v2/models/m/infer", json={"inputs": tensors}).json()
    assert answer["outputs"][0]["shape"] == [1, 1, 2, 1]
    (schema,) = (
        schema for name, schema in client.get("/openapi.json").json()["components"]["schemas"].items()
        if name.endswith("_predictions")
    )  # fmt: skip
    assert schema["properties"]["predictions"]["items"] == {}


def test_made_up_rows_of_sizes_that_do_not_fit_refuse_no_model(put: Put) -> None:
    """A loop over rows refuses sizes that were made up: that says nothing against it, nor of memory."""
    body = helper.make_graph(
        [node("Add", ["before", "row"], ["after"])],
        "body",
        [helper.make_tensor_value_info(name, FLOAT, [2]) for name in ("before", "row")],
        [helper.make_tensor_value_info("after", FLOAT, [2])],
    )
    client = put(graph([node("Scan", ["first", "rows"], ["y"], body=body, num_scan_inputs=1)],
                       [("first", FLOAT, ["a"]), ("rows", FLOAT, ["b", "c"])], [("y", FLOAT, None)]))  # fmt: skip
    tensors = [
        {"name": "first", "datatype": "FP32", "shape": [2], "data": [0, 0]},
        {"name": "rows", "datatype": "FP32", "shape": [3, 2], "data": [1, 2, 3, 4, 5, 6]},
    ]
    assert client.post("/v2/models/m/infer", json={"inputs": tensors}).json()["outputs"][0]["data"] == [9, 12]
