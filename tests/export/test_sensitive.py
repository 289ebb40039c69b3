"""What a file, and a server, tell of features that are sensitive: nothing that a single person of training had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from serving.engine import golden
from serving.engine.session import OnnxSession
from serving.engine.signature import Signature
from serving.export import Exported, export
from serving.http_api.app import create_app
from serving.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # the converters' own deprecations are not ours to mend

RNG = np.random.default_rng(3)
X = pd.DataFrame(
    {
        "income": RNG.lognormal(8, 1, 400),
        "born": RNG.permutation(np.arange(10_007, 30_007, 50)),
        "city": ["Rareville", *["Bern", "Chur", "Genf"] * 133],
        "rooms": RNG.uniform(1, 9, 400),
    }
)
HIDDEN = {"income", "born", "city"}
SINGLE = {*X["income"].astype(np.float32), *X["income"], *X["born"], "Rareville"}


@pytest.fixture(scope="module")
def model() -> Any:
    encoder = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["city"]), remainder="passthrough")
    return make_pipeline(encoder, LogisticRegression()).fit(X, X["rooms"] > 5)


def own(value: Any, at: str = "") -> list[str]:
    """Where a document has a value that one person of training had."""
    if isinstance(value, dict):
        return [place for key, each in value.items() for place in own(each, f"{at}/{key}")]
    if isinstance(value, list | tuple):
        return [place for key, each in enumerate(value) for place in own(each, f"{at}/{key}")]
    return [f"{at}: {value}"] if value in SINGLE or np.float32(value if type(value) is float else 0) in SINGLE else []


def written(made: Exported, folder: Path) -> OnnxSession:
    (folder / "m" / "1").mkdir(parents=True)
    path = folder / "m" / "1" / "model.onnx"
    path.write_bytes(made.content)
    return OnnxSession(path)


def hidden_part(signature: Signature) -> list[Any]:
    rows = [signature.example or {}, *signature.background, *(signature.golden.rows if signature.golden else ())]
    return [
        [{name: row[name] for name in row if name in HIDDEN} for row in rows],
        [f.model_dump() for f in signature.features if f.name in HIDDEN],
        [r.model_dump(exclude={"counts", "other"}) for r in signature.reference if r.name in HIDDEN],
    ]


def test_a_file_has_no_persons_own_value_of_a_sensitive_feature(model: Any, tmp_path: Path) -> None:
    """Example, golden and background rows, ranges, bins and categories: all have stand-ins, and golden rows hold."""
    plain = export(model, train=X, held_out=X[:50])
    assert own(hidden_part(plain.signature))  # or the test would see nothing
    made = export(model, train=X, held_out=X[:50], sensitive=sorted(HIDDEN))
    session = written(made, tmp_path)
    assert own(hidden_part(session.signature)) == []
    assert golden.check(session) == 0
    assert session.signature.golden is not None
    rows = pd.DataFrame(session.signature.golden.rows)
    assert rows["rooms"].tolist() == X["rooms"][:5].tolist()  # what is not sensitive stays
    said = np.array(session.signature.golden.outputs["probabilities"])
    assert said == pytest.approx(model.predict_proba(rows), abs=1e-4)


def test_a_server_hides_what_model_toml_calls_sensitive(model: Any, tmp_path: Path) -> None:
    """Then a file that was exported without marks is told of without single persons' values too."""
    written(export(model, train=X, held_out=X[:50]), tmp_path)
    (tmp_path / "m" / "model.toml").write_text(f"[privacy]\nsensitive = {sorted(HIDDEN)}")
    with TestClient(create_app(Settings(models=tmp_path, strict=True))) as client:
        told = client.get("/v1/models/m").json()
        assert own(told) == []
        assert own(client.get("/v1/models/m/drift").json()) == []
        document = client.get("/openapi.json").json()
        assert own(document) == []
        assert "Rareville" not in json.dumps([told, document])
        body = {"instances": [told["example"]], "explain": True}
        assert client.post("/v1/models/m:predict", json=body).status_code == 200
