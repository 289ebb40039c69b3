"""What shap says of the rows that benchmarks.explanations gives it; run in an environment that has it."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import shap


def main():
    """Print Shapley values of each model's rows, as JSON: for the class that is predicted, or the number."""
    found = {}
    for name, its in pickle.loads(Path(sys.argv[1]).read_bytes()).items():  # benchmarks.explanations wrote it
        model, rows, background = its["model"], its["rows"], its["background"]
        if hasattr(model, "estimators_"):
            explainer = shap.TreeExplainer(model, background, feature_perturbation="interventional")
            values = explainer.shap_values(rows, check_additivity=False)
        elif hasattr(model, "coef_"):
            values = shap.LinearExplainer(model, shap.maskers.Independent(background, 1000)).shap_values(rows)
        else:
            kind, names = type(rows), list(rows.columns)

            def answer(given, model=model, kind=kind, names=names):
                return model.predict_proba(kind(given, columns=names))

            explainer = shap.explainers.Permutation(answer, shap.maskers.Independent(background, 1000), seed=0)
            values = explainer(rows, max_evals=20 * (2 * rows.shape[1] + 1)).values
        if values.ndim == 3:
            best = model.predict_proba(rows).argmax(axis=1)
            values = np.stack([row[:, k] for row, k in zip(values, best, strict=True)])
        found[name] = values.tolist()
    json.dump(found, sys.stdout)


main()
