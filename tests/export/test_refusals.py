"""What is said when a model or its rows can't be exported: the step, the reason, and a remedy that was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fastapi.testclient import TestClient
from sklearn.compose import make_column_transformer
from sklearn.ensemble import RandomForestClassifier
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from serving.export import CannotExport, Exported, ParityError, export, publish
from serving.http_api.app import create_app
from serving.settings import Settings
from tests.export.fitted import NUMBERS, SUM, THREE, TWO, Doubling, fit, mixed, numbers

pytestmark = pytest.mark.filterwarnings("ignore")  # the converters' own deprecations are not ours to mend


def exported(model: Any, table: Any = None, target: Any = THREE, **options: Any) -> Exported:
    """Fit on one half, and export with the other."""
    made = fit(model, table, target)
    return export(made.model, train=made.train, held_out=made.held_out, **options)


def test_a_step_without_a_converter_is_named_as_its_author_named_it() -> None:
    """The refusal is one line: the step's name and class, the reason, and what to write instead."""
    model = make_pipeline(StandardScaler(), Doubling(), LogisticRegression())
    with pytest.raises(CannotExport) as refused:
        exported(model)
    assert "'doubling' (Doubling)" in str(refused.value)
    assert "Instead: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_remedy_is_named_after_it_helped() -> None:
    """A Gaussian process needs float64: that is tried, its difference is said, and it then works."""
    table = NUMBERS.astype("float64")
    with pytest.raises(ParityError, match=r"Tried: with double=True the file agrees to \d"):
        exported(GaussianProcessRegressor(alpha=0.1), table, SUM)
    assert exported(GaussianProcessRegressor(alpha=0.1), table, SUM, double=True).signature.inputs[0].datatype == "FP64"


def test_what_does_not_help_is_not_named_as_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the converter of a step is wrong, that step is named, and double=True is no remedy."""
    from serving.export import convert

    def wrong(model: Any, *given: Any, **more: Any) -> Any:
        scaler = model.steps[0][1] if hasattr(model, "steps") else model
        scaler.mean_ = scaler.mean_ + 1
        return right(model, *given, **more)

    right = convert._sklearn
    monkeypatch.setattr(convert, "_sklearn", wrong)
    with pytest.raises(
        ParityError, match=r"'standardscaler' \(StandardScaler\) answers otherwise.*double=True differs"
    ):
        exported(make_pipeline(StandardScaler(), LinearRegression()), target=SUM)


@pytest.mark.parametrize(
    ("train", "held_out", "said"),
    [
        (NUMBERS[:0], NUMBERS, "train: has no rows"),
        (NUMBERS, NUMBERS[:0], "held_out: has no rows"),
        (NUMBERS, NUMBERS.drop(columns="height"), "held_out: lacks columns that train has: height"),
        (NUMBERS.assign(day=pd.Timestamp("2024-01-01")), NUMBERS, "column 'day' of train: holds times"),
        (NUMBERS, NUMBERS.assign(height="tall"), "column 'height': is FP32 in train and BYTES in held_out"),
    ],
)
def test_rows_that_can_not_be_are_named(train: Any, held_out: Any, said: str) -> None:
    """An empty table, a missing column, dates and another type are refused by the table's and the column's name."""
    model = LogisticRegression(max_iter=500).fit(NUMBERS, THREE)
    with pytest.raises(CannotExport) as refused:
        export(model, train=train, held_out=held_out)
    assert said in str(refused.value)


def ask(content: Exported, root: Path, row: dict[str, Any]) -> Any:
    """Serve the model, and return the status and what is answered for a row."""
    publish(content, name="m", root=root)
    with TestClient(create_app(Settings(models=root))) as client:
        example = client.post("/v1/models/m:predict", json={"instances": [content.signature.example]})
        assert example.status_code == 200, example.text
        answer = client.post("/v1/models/m:predict", json={"instances": [row]})
        return answer.status_code, answer.json()


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    """Where training had whole numbers 4.5 is refused by the column's name; 4, 4.0 and the example are accepted."""
    content = exported(RandomForestClassifier(3, random_state=0), numbers("int64"))
    assert {feature.datatype for feature in content.signature.features} == {"INT64"}
    assert content.signature.example is not None
    row = content.signature.example
    status, said = ask(content, tmp_path, row | {"height": 4.5})
    assert status == 422
    assert "/instances/0/height" in str(said)
    with TestClient(create_app(Settings(models=tmp_path))) as client:
        for body in (
            {"instances": [row]},
            {"instances": [{name: float(value) for name, value in row.items()}]},
            {"instances": [[float(value) for value in row.values()]]},
            {"inputs": {name: [float(value)] for name, value in row.items()}},
        ):
            answer = client.post("/v1/models/m:predict", json=body)
            assert answer.status_code == 200, answer.text
        assert (
            "/inputs/height/0"
            in client.post(
                "/v1/models/m:predict", json={"inputs": {name: [value + 0.5] for name, value in row.items()}}
            ).text
        )


def test_truth_is_asked_for_and_answered(tmp_path: Path) -> None:
    """A model of booleans takes true and answers true or false, as fitted."""
    table = (NUMBERS > 5).set_axis(["a", "b", "c", "d"], axis=1)
    made = fit(RandomForestClassifier(3, random_state=0), table, TWO.astype(bool))
    content = export(made.model, train=made.train, held_out=made.held_out)
    row = {"a": True, "b": True, "c": False, "d": True}
    status, said = ask(content, tmp_path, row)
    assert status == 200, said
    (prediction,) = said["predictions"]
    assert prediction["label"] is bool(made.model.predict(pd.DataFrame([row]))[0])
    assert list(prediction["probabilities"]) == ["false", "true"]


def test_a_category_that_the_model_refuses_is_refused(tmp_path: Path) -> None:
    """An encoder that raises for an unseen category has it refused by the server, with no option asked for."""
    encoded = make_column_transformer((OneHotEncoder(), ["colour", "rooms"]), ("passthrough", ["depth"]))
    content = exported(make_pipeline(encoded, LogisticRegression(max_iter=500)), mixed()[["colour", "rooms", "depth"]])
    refuses = {f.name: f.unknown_category for f in content.signature.features}
    assert refuses == {"colour": "refuse", "rooms": "refuse", "depth": "accept"}
    assert ask(content, tmp_path, {"colour": "pink", "rooms": 1, "depth": 1})[0] == 422


def test_a_difference_at_the_edge_is_found() -> None:
    """A file that is right for all held-out rows and wrong for a value between them is refused, with the cell."""
    table = mixed()[["rooms", "depth"]].astype(float)
    encoded = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["rooms"]), ("passthrough", ["depth"]))
    with pytest.raises(ParityError, match=r"column 'rooms' with 2\.5\d* \(between\).*Tried: with whole"):
        exported(make_pipeline(encoded, LogisticRegression(max_iter=500)), table)
    exported(make_pipeline(encoded, LogisticRegression(max_iter=500)), table.astype({"rooms": "int64"}))


def test_a_file_that_answers_with_maps_becomes_plain(tmp_path: Path) -> None:
    """An ONNX file as skl2onnx and CatBoost write it, with ZipMap, is described, compared, and answers by class."""
    from skl2onnx import to_onnx

    made = fit(LogisticRegression(max_iter=500), NUMBERS.to_numpy())
    path = tmp_path / "zipped.onnx"
    path.write_bytes(to_onnx(made.model, made.train[:1]).SerializeToString())
    content = export(
        path, train=made.train, held_out=made.held_out, reference=lambda rows: made.model.predict_proba(rows.to_numpy())
    )
    assert content.signature.parity is not None
    row = dict(zip(["f0", "f1", "f2", "f3"], map(float, made.held_out[0]), strict=True))
    status, said = ask(content, tmp_path / "models", row)
    assert status == 200
    assert said["predictions"][0]["probabilities"] == pytest.approx(
        dict(zip("012", made.model.predict_proba(made.held_out[:1])[0], strict=True)), abs=1e-5
    )
