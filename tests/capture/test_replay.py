"""Captured requests, scored again by another version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from pyarrow import parquet
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from typer.testing import CliRunner, Result

from serving.command_line import app
from serving.export import CannotExport, export, publish
from serving.gate.gate import Gate
from tests.conftest import with_grpc

NAMES = ("age", "income")
RNG = np.random.default_rng(7)
X = pd.DataFrame({"age": RNG.uniform(18, 80, 400), "income": RNG.uniform(0, 10, 400)}).astype(np.float32)


def fitted(flip: bool) -> Any:
    """A classifier by income; where `flip`, callers over 60 get the other class."""
    model = LogisticRegression(C=1e4)
    target = X["income"] > 5
    return model.fit(X, np.where((X["age"] > 60) & flip, ~target, target).astype(int))


def paint(rows: pd.DataFrame, unknown: Any) -> Any:
    """A classifier by colour and size."""
    encoder = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["colour"]), remainder="passthrough")
    model = make_pipeline(encoder, LogisticRegression()).fit(rows, (rows["size"] > 0.5).astype(int))
    return export(model, train=rows, held_out=rows[:30], unknown_category=unknown)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, examiner: Gate) -> Path:
    """A folder with `models` and with `captured`, which has what callers asked of the first versions of two."""
    root = tmp_path_factory.mktemp("replay")
    paints = pd.DataFrame({"colour": ["red", "blue", "green"] * 100, "size": RNG.uniform(0, 1, 300)})
    for flip in (False, True):
        marked = ["age"] if flip else []
        made = export(fitted(flip), train=X, held_out=X[:50], classes=["no", "yes"], sensitive=marked)
        publish(made, name="credit", root=root / "models", examiner=examiner)
    for made in (paint(paints, "accept"), paint(paints[paints["colour"] != "green"], "refuse")):
        publish(made, name="paint", root=root / "models", allow_breaking=True, examiner=examiner)
    with TestClient(with_grpc(root / "models", capture_dir=root / "captured", capture_share=1)) as client:
        for name, rows in (
            ("credit", X[:200].astype(float).to_dict("records")),
            ("paint", [{"colour": colour, "size": 0.25} for colour in ("red", "green", "blue")]),
        ):
            assert client.post(f"/v1/models/{name}:predict", json={"instances": rows}).status_code == 200
    return root


def run(place: Path, *flags: str, captured: str = "captured", model: str = "credit") -> Result:
    where = ["replay", str(place / captured), "--model", model, "--models", str(place / "models")]
    return CliRunner().invoke(app, [*where, *flags], env={"COLUMNS": "200"})


def test_a_version_agrees_with_itself(place: Path) -> None:
    """What version 1 was asked and answered, version 1 answers again, and keeps every bound."""
    result = run(place, "--version", "1", "--json", "--min-agreement", "1", "--max-difference", "1e-6")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["rows"], found["agreement"], found["refused"]) == (0, 200, 1.0, 0)
    assert found["difference"]["max"] < 1e-6
    assert found["worst"] == [] or found["worst"][0]["difference"] < 1e-6
    assert json.loads(run(place, "--version", "2", "--json", "--worst", "0").stdout)["worst"] == []


def test_another_version_is_compared_with_what_was_answered(place: Path) -> None:
    """Agreement, differences, shift and worst rows are those that the two fitted models themselves have."""
    one, two = fitted(False), fitted(True)
    asked = X[:200]
    result = run(place, "--version", "2", "--json", "--segment", "age", "--min-agreement", "0.999", "--worst", "3")
    found = json.loads(result.stdout)
    agree = one.predict(asked) == two.predict(asked)
    old, new = one.predict_proba(asked), two.predict_proba(asked)
    apart = np.abs(new - old).max(axis=1)
    assert found["agreement"] == pytest.approx(agree.mean())
    assert found["difference"]["max"] == pytest.approx(apart.max(), abs=1e-4)
    assert found["difference"]["p99"] == pytest.approx(np.quantile(apart, 0.99), abs=1e-4)
    assert found["shift"]["yes"] == pytest.approx((new - old)[:, 1].mean(), abs=1e-4)
    worst = sorted(range(200), key=lambda i: -(2 * (not agree[i]) + apart[i]))[:3]
    assert [row["row"] for row in found["worst"]] == worst
    assert found["worst"][0]["features"] == pytest.approx(dict(asked.iloc[worst[0]]))
    quarters = np.quantile(asked["age"], [0, 0.25, 0.5, 0.75, 1])
    oldest = asked["age"].to_numpy() >= quarters[3]
    assert found["segments"]["age"][3]["rows"] == oldest.sum()
    assert found["segments"]["age"][3]["agreement"] == pytest.approx(agree[oldest].mean())
    assert result.exit_code == 1
    assert "below 99.90%" in found["broken"][0]
    shown = run(place, "--version", "2", "--segment", "age").stdout
    assert f"{agree.mean():.2%}" in shown
    assert "rows that differ most" in shown


def test_what_was_not_captured_is_the_same_for_both_versions(place: Path) -> None:
    """A sensitive feature has the example's value for both, and the report says so; refused rows break any bound."""
    settings = place / "models/credit/model.toml"
    settings.write_text('[privacy]\nsensitive = ["income"]\n')
    with TestClient(with_grpc(place / "models", capture_dir=place / "redacted", capture_share=1)) as client:
        rows = X[:20].astype(float).to_dict("records")
        client.post("/v1/models/credit:predict", json={"instances": rows})
    settings.unlink()
    result = run(place, "--version", "1", "--json", "--min-agreement", "1", captured="redacted")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["agreement"], list(found["filled"])) == (0, 1.0, ["income"])
    said = run(place, "--version", "1", "--segment", "income", captured="redacted")
    assert said.exit_code == 2
    assert "--segment income: is no feature that was captured" in said.stderr
    assert "there is no version 9 of credit" in run(place, "--version", "9").stderr
    assert "nothing of credit was captured there" in run(place, "--version", "1", captured="models").stderr


def test_a_feature_that_is_marked_in_the_file_is_not_captured(place: Path) -> None:
    """What `export` marks as sensitive is left out without any setting; a name that no feature has is refused."""
    with TestClient(with_grpc(place / "models", capture_dir=place / "marked", capture_share=1)) as client:
        row = {"age": 33.25, "income": 2.5}
        client.post("/v1/models/credit/versions/2:predict", json={"instances": [row]})
    (file,) = (place / "marked").glob("*/*/*.parquet")
    assert [name for name in parquet.read_schema(file).names if name[:8] == "features"] == ["features.income"]
    with pytest.raises(CannotExport, match="agee"):
        export(fitted(False), train=X, held_out=X[:50], sensitive=["agee"])


def test_rows_that_a_version_refuses_are_named(place: Path) -> None:
    """A version that takes no such category refuses the rows that have it: they agree with nothing."""
    found = json.loads(run(place, "--version", "2", "--json", model="paint").stdout)
    assert (found["rows"], found["refused"], found["agreement"]) == (3, 1, pytest.approx(2 / 3))
    assert "colour" in next(iter(found["reasons"]))
    assert found["worst"][0]["features"]["colour"] == "green"
    assert run(place, "--version", "2", "--max-difference", "1", model="paint").exit_code == 1
    assert run(place, "--version", "9", "--max-difference", "1", model="paint").exit_code == 2, "nothing was compared"
