"""What the exporter promises: the same answers as the original, or a refusal that says what to do."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from serving.engine.session import OnnxSession
from serving.engine.signature import METADATA_KEY, Signature
from serving.errors import InvalidRequest
from serving.export import Exported, ParityError, export, publish
from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conftest import MODELS

pytestmark = pytest.mark.filterwarnings("ignore")  # the converters' own deprecations are not ours to mend

DATA = load_iris(as_frame=True)
ROWS: pd.DataFrame = DATA.data.astype("float32")
TRAIN, HELD_OUT = ROWS[::2], ROWS[1::2]
TARGET = DATA.target[::2]


def served(exported: Exported, root: Path, rows: list[Any]) -> list[Any]:
    """Publish, start the application on the folder, and predict."""
    publish(exported, name="m", root=root)
    with TestClient(create_app(Settings(models=root, strict=True))) as client:
        answer = client.post("/v1/models/m:predict", json={"instances": rows})
        assert answer.status_code == 200, answer.text
        predictions: list[Any] = answer.json()["predictions"]
        return predictions


def classifier(kind: str) -> Any:
    if kind == "xgboost":
        from xgboost import XGBClassifier

        return XGBClassifier(n_estimators=10)
    if kind == "lightgbm":
        from lightgbm import LGBMClassifier

        return LGBMClassifier(n_estimators=10, verbose=-1)
    if kind == "margins":
        return LinearSVC()
    return HistGradientBoostingClassifier(max_iter=10) if kind == "histogram" else LogisticRegression(max_iter=500)


@pytest.mark.parametrize("kind", ["logistic", "margins", "histogram", "lightgbm", "xgboost"])
def test_a_fitted_classifier_serves_as_it_predicts(kind: str, tmp_path: Path) -> None:
    """scikit-learn, LightGBM and XGBoost classifiers answer over HTTP what they predict themselves."""
    nameless = kind in ("lightgbm", "xgboost")  # fitted on bare arrays, as many are
    # Whole millimetres: LightGBM compares doubles, and a row that lies on a split may fall to the other side.
    table = ((TRAIN * 10).round(), (HELD_OUT * 10).round())
    model = classifier(kind).fit(table[0].to_numpy() if nameless else table[0], TARGET)
    exported = export(model, train=table[0], held_out=table[1], classes=list(DATA.target_names))
    assert exported.signature.parity is not None
    assert exported.signature.parity.label_agreement == 1.0
    rows = table[1][::10]
    given = [{name: float(value) for name, value in row.items()} for _, row in rows.iterrows()]
    ask = model.decision_function if kind == "margins" else model.predict_proba
    own = ask(rows.to_numpy() if nameless else rows)
    key = "scores" if kind == "margins" else "probabilities"
    for prediction, expected in zip(served(exported, tmp_path, given), own, strict=True):
        assert list(prediction[key]) == list(DATA.target_names)
        np.testing.assert_allclose(list(prediction[key].values()), expected, atol=1e-4)


def test_column_names_stay_as_they_are() -> None:
    """Names that are no C identifiers are the names that callers use."""
    exported = export(LogisticRegression(max_iter=500).fit(TRAIN, TARGET), train=TRAIN, held_out=HELD_OUT)
    assert next(f.name for f in exported.signature.features) == "sepal length (cm)"


def clock() -> tuple[pd.DataFrame, LinearRegression]:
    """Make seconds since 1970, and a model that gives the seconds since 1,700,000,000."""
    seconds = np.arange(1_700_000_000, 1_700_000_200, dtype="float64")
    table = pd.DataFrame({"timestamp": seconds, "x": np.sin(np.arange(200.0))})
    model = LinearRegression().fit(table - [1_700_000_000, 0], np.arange(200.0))
    model.intercept_ -= 1_700_000_000 * model.coef_[0]
    return table, model


def test_values_too_large_for_float32_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """A timestamp that float32 can't hold is refused, with the worst row and `double=True`; so nothing is published."""
    table, model = clock()
    with pytest.raises(ParityError) as refused:
        publish(export(model, train=table, held_out=table), name="clock", root=tmp_path)
    assert "double=True" in str(refused.value)
    assert "timestamp" in str(refused.value)
    assert not (tmp_path / "clock").exists()


def test_double_holds_what_float32_cannot(tmp_path: Path) -> None:
    """With double=True large values are exact, end to end."""
    table, model = clock()
    exported = export(model, train=table, held_out=table, double=True, tolerance=1e-3)
    (got,) = served(exported, tmp_path, [{"timestamp": 1_700_000_123, "x": float(table.x[123])}])
    assert got == pytest.approx(123, abs=1e-3)


def test_a_file_that_answers_otherwise_is_refused() -> None:
    """An ONNX file that does not answer as the reference says is refused, and the worst row is shown."""
    path = MODELS / "diabetes" / "1" / "model.onnx"
    signature = OnnxSession(path).signature
    assert signature.golden is not None
    held_out = pd.DataFrame(list(signature.golden.rows)).astype("float32")
    right = np.ravel(signature.golden.outputs["prediction"])

    def wrong(rows: pd.DataFrame) -> Any:
        return np.add(right, [0, 0, 50, 0, 0])

    assert export(path, train=held_out, held_out=held_out, reference=lambda _: right).signature.parity is not None
    with pytest.raises(ParityError, match="row 2"):
        export(path, train=held_out, held_out=held_out, reference=wrong)


def test_a_network_made_elsewhere_gets_a_signature(tmp_path: Path) -> None:
    """The ONNX file of a network (as torch.onnx.export writes it) is described by a table and serves by name."""
    weights = np.array([[1.0], [2.0]], dtype=np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["input.1", "fc.weight"], ["12"])],
        "main_graph",
        [onnx.helper.make_tensor_value_info("input.1", onnx.TensorProto.FLOAT, ["batch_size", 2])],
        [onnx.helper.make_tensor_value_info("12", onnx.TensorProto.FLOAT, ["batch_size", 1])],
        [onnx.numpy_helper.from_array(weights, "fc.weight")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    table = pd.DataFrame({"width": [1.0, 2.0, 3.0], "height": [0.5, 0.25, 4.0]}).astype("float32")
    exported = export(path, train=table, held_out=table, reference=lambda rows: rows.width + 2 * rows.height)
    assert served(exported, tmp_path / "models", [{"width": 3, "height": 4}]) == [11.0]


def test_an_isolation_forest_converts(tmp_path: Path) -> None:
    """An isolation forest, whose converter wants an older opset, serves its labels and scores."""
    model = IsolationForest(n_estimators=10, random_state=0).fit(TRAIN)
    exported = export(model, train=TRAIN, held_out=HELD_OUT)
    row = {name: float(value) for name, value in HELD_OUT.iloc[0].items()}
    (got,) = served(exported, tmp_path, [row])
    expected = model.decision_function(HELD_OUT[:1])[0]
    assert got["scores"] == pytest.approx(expected, abs=1e-4)
    assert got["label"] == model.predict(HELD_OUT[:1])[0]


def test_text_needs_no_locale_of_the_machine() -> None:
    """A TF-IDF graph asks for the C locale: en_US, the converter's default, is missing on small machines."""
    texts = pd.DataFrame({"text": ["red apple", "green pear", "red cherry", "green lime"] * 5})
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts.text.tolist(), [0, 1] * 10)
    exported = export(model, train=texts, held_out=texts)
    content = onnx.load_from_string(exported.content)
    locales = [a.s for node in content.graph.node for a in node.attribute if a.name == "locale"]
    assert locales
    assert set(locales) == {b"C"}


def test_a_regressor_and_missing_values_are_described() -> None:
    """Ranges, the reference and missing values are read from the training rows, the outputs' from held-out ones."""
    table = TRAIN.copy()
    table.iloc[3, 1] = np.nan
    model = HistGradientBoostingClassifier(max_iter=5).fit(table, TARGET)
    signature = export(model, train=table, held_out=HELD_OUT).signature
    first, second, *_ = signature.features
    assert not first.nullable
    assert second.nullable
    assert first.minimum == pytest.approx(TRAIN.iloc[:, 0].min())
    reference = {one.name: one for one in signature.reference}
    of_first, of_second = reference[first.name], reference[second.name]
    assert sum(of_first.counts) == len(TRAIN)
    assert (sum(of_second.counts), of_second.missing) == (len(TRAIN) - 1, 1)
    assert of_first.edges is not None
    values = TRAIN.iloc[:, 0].astype("float32")
    for low, high, count in list(zip(of_first.edges, of_first.edges[1:], of_first.counts, strict=False))[:-1]:
        assert ((values >= low) & (values < high)).sum() == count
    assert sum(reference["output label"].counts) == len(HELD_OUT)
    assert len(signature.background) == 32
    assert signature.background[0].keys() == {f.name for f in signature.features}
    regressor = RandomForestRegressor(n_estimators=5, random_state=0).fit(TRAIN, TARGET.astype(float))
    assert export(regressor, train=TRAIN, held_out=HELD_OUT).signature.task == "regression"


def test_publishing_is_whole_and_only_once(tmp_path: Path) -> None:
    """Versions count up; the same bytes are one version; a bad name is refused; the manifest matches."""
    one = export(LogisticRegression(C=1, max_iter=500).fit(TRAIN, TARGET), train=TRAIN, held_out=HELD_OUT)
    two = export(LogisticRegression(C=2, max_iter=500).fit(TRAIN, TARGET), train=TRAIN, held_out=HELD_OUT)
    assert publish(one, name="m", root=tmp_path) == ("1", True)
    assert publish(two, name="m", root=tmp_path) == ("2", True)
    assert publish(one, name="m", root=tmp_path) == ("1", False)
    for name in ("../m", "", "a/b", ".m", "x" * 200):
        with pytest.raises(InvalidRequest, match="no model name"):
            publish(one, name=name, root=tmp_path)
    assert sorted(p.name for p in (tmp_path / "m").rglob("*")) == sorted(
        ["1", "2", *["gate.json", "model.onnx", "manifest.json"] * 2, "history.jsonl", "traffic.json"]
    )
    manifest = json.loads((tmp_path / "m" / "2" / "manifest.json").read_bytes())
    assert manifest["files"]["model.onnx"]["sha256"] == hashlib.sha256(two.content).hexdigest()


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*/model.onnx")), ids=lambda p: f"{p.parts[-3]}-{p.parts[-2]}")
def test_every_shipped_model_gives_its_golden_answers(path: Path) -> None:
    """Each shipped file answers its golden rows, carries its parity, and is small."""
    metadata = {m.key: m.value for m in onnx.load(str(path)).metadata_props}
    signature = Signature.model_validate_json(metadata[METADATA_KEY])
    assert signature.parity is not None
    assert signature.golden is not None
    assert signature.example is not None
    assert signature.description
    model = path.parts[-3]
    with TestClient(create_app(Settings(models=MODELS))) as client:
        body = {"instances": list(signature.golden.rows)}
        answer = client.post(f"/v1/models/{model}/versions/{path.parts[-2]}:predict", json=body).json()
    if signature.scores:
        got: Any = [list(p["probabilities"].values()) for p in answer["predictions"]]
        expected: Any = signature.golden.outputs[signature.scores]
    else:
        got = answer["predictions"]
        expected = np.ravel(signature.golden.outputs["prediction"])
    np.testing.assert_allclose(got, expected, atol=signature.golden.tolerance, rtol=1e-5)


def test_the_shipped_models_are_small() -> None:
    """All shipped models together stay under 5 MB."""
    assert sum(p.stat().st_size for p in MODELS.rglob("*") if p.is_file()) < 5_000_000


@pytest.mark.parametrize("only", ["", "lightgbm", "xgboost"])
def test_it_exports_with_what_its_extra_installs(only: str) -> None:
    """Where no library of boosted trees is there, or one without the others, scikit-learn's models convert."""
    made = f"""
import sys
for name in {{"lightgbm", "xgboost", "catboost", "httpx2", "grpc"}} - {{{only!r}}}:
    sys.modules[name] = None
import numpy
from sklearn.linear_model import LogisticRegression
from serving.export import export
rows = numpy.random.default_rng(0).normal(size=(60, 3))
model = LogisticRegression().fit(rows, rows[:, 0] > 0)
print(export(model, train=rows, held_out=rows).signature.task)
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", made], capture_output=True, text=True, check=False)
    assert ended.stdout == "classification\n", ended.stderr
