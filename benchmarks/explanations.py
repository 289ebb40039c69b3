"""How explanations rank features beside shap, on trees and on linear models.

.venv/bin/python -m benchmarks.explanations; shap runs in an environment of its own, which the first run makes.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fastapi.testclient import TestClient
from scipy.stats import spearmanr
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from serving.export import export, publish
from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conformance.environments import environment

ROWS = 20
CASES: dict[str, tuple[Any, Any]] = {
    "linear": (LinearRegression(), load_diabetes),
    "logistic": (make_pipeline(StandardScaler(), LogisticRegression()), load_breast_cancer),
    "boosted-trees": (GradientBoostingRegressor(random_state=0), load_diabetes),
    "forest": (RandomForestClassifier(100, random_state=0), load_wine),
}


def main() -> None:
    """Explain rows of each model by this server and by shap, and print how both rank the features."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        asked: dict[str, Any] = {}
        for name, (model, load) in CASES.items():
            data = load(as_frame=True)
            rows = data.data.astype("float32")
            model.fit(rows, data.target)
            exported = export(model, train=rows, held_out=rows[::5])
            publish(exported, name=name, root=root)
            background = pd.DataFrame(list(exported.signature.background), columns=rows.columns).astype("float32")
            asked[name] = {"model": model, "rows": rows[::7][:ROWS], "background": background}
        (Path(folder) / "asked").write_bytes(pickle.dumps(asked))
        python = environment("shap") / "bin" / "python"
        command = [str(python), "benchmarks/explanations_shap.py", str(Path(folder) / "asked")]
        theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        with TestClient(create_app(Settings(models=root))) as client:
            for name, its in asked.items():
                body = {"instances": its["rows"].to_numpy().tolist(), "explain": True}
                said = client.post(f"/v1/models/{name}:predict", json=body).json()["explanations"]
                ours = [list(row["contributions"].values()) for row in said]
                ranks = [spearmanr(a, b).statistic for a, b in zip(ours, theirs[name], strict=True)]
                print(f"{name}: rank correlation {np.mean(ranks):.3f} on average, {min(ranks):.3f} at least")


if __name__ == "__main__":
    main()
