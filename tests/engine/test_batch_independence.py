"""Requests run together only where it is proved that no row has a part in another's answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import quantize_dynamic
from skl2onnx import to_onnx
from sklearn.ensemble import GradientBoostingClassifier, IsolationForest, RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.svm import SVC

from serving.engine.batch_independence import prove
from serving.engine.batching import Independence
from serving.engine.session import OnnxSession
from tests.conftest import MODELS
from tests.drills.hidden_graphs import of_numbers, of_values
from tests.drills.mixing_graphs import FLOAT, graph, mixing, node
from tests.drills.ordinary_graphs import ordinary

MIXING, ORDINARY = mixing(), ordinary()
HIDDEN = of_numbers() | of_values()


def proof(path: Path, model: onnx.ModelProto) -> Independence:
    path.write_bytes(model.SerializeToString())
    return prove(OnnxSession(path, warm_rows=4), path)


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_have_a_part_in_each_other_are_found_out(tmp_path: Path, name: str) -> None:
    """Whatever computes over rows, or with their number or places, is not proved, and the reason names a node."""
    found = proof(tmp_path / "model.onnx", MIXING[name])
    assert not found.proved
    assert found.reason.split()[0] in {n.op_type for n in MIXING[name].graph.node}
    assert found.quantised == (name == "quantised_as_it_runs")


@pytest.mark.parametrize("name", HIDDEN)
def test_rows_that_meet_where_no_trial_sees_it_are_found_out(tmp_path: Path, name: str) -> None:
    """Whatever mixes rows of unusual values only, or from some number of rows on, is not proved."""
    found = proof(tmp_path / "model.onnx", HIDDEN[name])
    assert not found.proved
    assert "tried" not in found.reason


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_graphs_are_proved(tmp_path: Path, name: str) -> None:
    """Networks, encoders and recurrent ones, in the ways in which exporters write them, run together."""
    assert proof(tmp_path / "model.onnx", ORDINARY[name]) == Independence(proved=True)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*/model.onnx")), ids=lambda p: f"{p.parts[-3]}-{p.parts[-2]}")
def test_the_shipped_models_are_proved(path: Path) -> None:
    """What ships runs together."""
    assert prove(OnnxSession(path), path) == Independence(proved=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["transformer", "convolutions", "lstm_by_row"])
def test_dynamic_quantisation_is_told_from_other_mixing(tmp_path: Path, name: str) -> None:
    """What onnxruntime's own tool quantises shares a scale, and nothing else: an owner may allow that."""
    (tmp_path / "whole.onnx").write_bytes(ORDINARY[name].SerializeToString())
    quantize_dynamic(tmp_path / "whole.onnx", tmp_path / "int8.onnx")
    found = prove(OnnxSession(tmp_path / "int8.onnx", warm_rows=2), tmp_path / "int8.onnx")
    assert (found.proved, found.quantised) == (False, True)


CLASSICAL = {
    "forest": RandomForestRegressor(5),
    "boosted": make_pipeline(StandardScaler(), GradientBoostingClassifier(n_estimators=3)),
    "network": make_pipeline(MinMaxScaler(), MLPClassifier((6,), max_iter=5)),
    "logistic": LogisticRegression(),
    "bayes": GaussianNB(),
    "support": SVC(probability=True),
    "neighbours": KNeighborsClassifier(3),
    "outliers": IsolationForest(n_estimators=5),
}


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.filterwarnings("ignore")
def test_classical_models_are_proved(tmp_path: Path, name: str) -> None:
    """scikit-learn's models as its converter writes them, maps among their outputs, run together."""
    rows = np.random.default_rng(3).normal(size=(60, 4)).astype(np.float32)
    fitted = CLASSICAL[name].fit(rows, (rows[:, 0] > 0).astype(int))
    opset = {"": 15, "ai.onnx.ml": 3, "com.microsoft": 1}
    options = {id(fitted): {"optim": "cdist"}} if name == "neighbours" else {}
    assert proof(tmp_path / "model.onnx", to_onnx(fitted, rows[:1], target_opset=opset, options=options)).proved


def test_what_fills_up_shorter_texts_must_not_count(tmp_path: Path) -> None:
    """Texts of a batch are filled up to the longest: where a vocabulary has the filling, they run alone."""
    words = ["#", "red", "blue"]

    def counting(padding: str) -> onnx.ModelProto:
        nodes = [
            node("Tokenizer", "x", "t", domain="com.microsoft", mark=0, mincharnum=1, pad_value=padding,
                 tokenexp="[a-z]+|#"),
            node("TfIdfVectorizer", "t", "y", min_gram_length=1, max_gram_length=1, max_skip_count=0, mode="TF",
                 ngram_counts=[0], ngram_indexes=[0, 1, 2], pool_strings=words),
        ]  # fmt: skip
        return graph(nodes, [("x", onnx.TensorProto.STRING, ["n"])], [("y", FLOAT, ["n", 3])])

    assert proof(tmp_path / "a.onnx", counting("~")).proved
    assert not proof(tmp_path / "b.onnx", counting("#")).proved


def test_many_free_dimensions_ask_for_no_more_than_there_is(tmp_path: Path) -> None:
    """Rows are made up of sizes that fit into memory, however many dimensions are free."""
    free = ["n", *"abcdef"]
    assert proof(tmp_path / "m.onnx", graph([node("Neg", "x", "y")], [("x", FLOAT, free)], [("y", FLOAT, free)])).proved


@pytest.mark.parametrize(
    ("names", "operator", "together"),
    [
        (("a", "b"), "Add", False),
        (("a", "b"), "Concat", True),
        (("n", "n"), "Add", True),
        (("unk__1", "unk__2"), "Add", True),
    ],
)
def test_inputs_that_may_differ_in_rows_run_alone(
    tmp_path: Path, names: tuple[str, str], operator: str, together: bool
) -> None:
    """Where a graph names the rows of two inputs differently, and takes different numbers, they run alone."""
    attributes = {"axis": 1} if operator == "Concat" else {}
    width = 4 if operator == "Concat" else 2
    inputs = [(name, FLOAT, [rows, 2]) for name, rows in zip("xy", names, strict=True)]
    model = graph([node(operator, "x y", "z", **attributes)], inputs, [("z", FLOAT, [None, width])])
    found = proof(tmp_path / "m.onnx", model)
    assert found.proved == together
    assert together or found.reason == "input 'y' may have another number of rows than the first"
