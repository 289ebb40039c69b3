"""Asks a fitted model what it says of rows: every output that its ONNX file has, by the file's name for it."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pandas as pd

from serving.export.refusal import CannotExport
from serving.tensors import Array

VECTORIZERS = ("CountVectorizer", "TfidfVectorizer", "HashingVectorizer")


class Original:
    """A fitted model by what it can be asked; `answers` maps each output's name to the method that gives it."""

    def __init__(self, model: Any) -> None:
        self._asked = _LightGBM(model) if type(model).__name__ == "Booster" else model
        self._model = model
        if not any(hasattr(self._asked, way) for way in ("predict", "transform")):
            raise CannotExport(
                type(model).__name__, "can neither predict nor transform new rows", "give a fitted model that can"
            )
        self.answers = _answers(self._asked)
        classes = getattr(self._asked, "classes_", None) if "label" in self.answers else None
        self.targets: list[Array] | None = classes if isinstance(classes, list) else None
        self.classes: Array | None = None if classes is None or self.targets is not None else np.asarray(classes)
        self.boolean = all(each.dtype == bool for each in self.targets or (self.classes,) if each is not None)
        self.boolean &= classes is not None
        """Whether labels are true and false."""

    def is_a(self, *kinds: str) -> bool:
        """Tell whether what answers in the end is one of these classes."""
        model = self._model
        while hasattr(model, "steps") or hasattr(model, "best_estimator_"):
            model = model.steps[-1][1] if hasattr(model, "steps") else model.best_estimator_
        return type(model).__name__ in kinds

    def sparse(self, table: pd.DataFrame) -> bool:
        """Tell whether the last step of a pipeline has XGBoost in it, and is given a sparse matrix."""
        model = self._model
        while hasattr(model, "best_estimator_"):
            model = model.best_estimator_
        if len(getattr(model, "steps", ())) < 2:
            return False
        return hasattr(model[:-1].transform(self._rows(table[:1])), "toarray")

    def ask(self, table: pd.DataFrame) -> dict[str, Array]:
        """Return what it says of a table's rows, rows first: labels [rows], scores [rows, classes], and so on."""
        rows = self._rows(table)
        said: dict[str, Array] = {}
        for name, way in self.answers.items():
            got = getattr(self._asked, way)(rows)
            if isinstance(got, list):
                said |= {f"{name}_{index}": np.asarray(one) for index, one in enumerate(got)}
            else:
                said[name] = np.asarray(got.toarray() if hasattr(got, "toarray") else got)
        return said

    def _rows(self, table: pd.DataFrame) -> Any:
        if type(takers(self._model)[0]).__name__ in VECTORIZERS:
            return table.iloc[:, 0].tolist()
        named = isinstance(self._asked, _LightGBM) or hasattr(self._model, "feature_names_in_")
        return table if named or hasattr(self._model, "feature_names_") else table.to_numpy()


def _answers(model: Any) -> dict[str, str]:
    if hasattr(model, "predict_proba"):
        return {"label": "predict", "probabilities": "predict_proba"}
    if hasattr(model, "predict") and hasattr(model, "decision_function"):
        return {"label": "predict", "scores": "decision_function"}
    last = model.steps[-1][1] if hasattr(model, "steps") else model
    if getattr(last, "_estimator_type", "") == "clusterer" or hasattr(last, "cluster_centers_"):
        return {"label": "predict"} | ({"distances": "transform"} if hasattr(model, "transform") else {})
    if len(getattr(model, "classes_", ())):
        return {"label": "predict"}
    return {"prediction": "predict"} if hasattr(model, "predict") else {"transformed": "transform"}


def takers(model: Any) -> list[Any]:
    """List the estimators that rows come to first, within whatever stands around them."""
    if hasattr(model, "best_estimator_"):
        return takers(model.best_estimator_)
    if hasattr(model, "calibrated_classifiers_"):
        return [taker for one in model.calibrated_classifiers_ for taker in takers(one.estimator)]
    if type(model).__name__.startswith("Voting"):
        return [taker for one in model.estimators_ for taker in takers(one)]
    if hasattr(model, "transformer_list"):
        return [taker for _, one in model.transformer_list for taker in takers(one)]
    steps = [step for _, step in getattr(model, "steps", ()) if step not in (None, "passthrough")]
    return takers(steps[0]) if steps else [model]


class _LightGBM:
    """A booster of LightGBM, which has no class of scikit-learn's, as if it had."""

    def __init__(self, booster: Any) -> None:
        self._booster = booster
        told = booster.dump_model(num_iteration=1)
        self.classes_ = np.arange(0)
        if told["objective"].startswith(("binary", "multiclass")):
            self.classes_ = np.arange(max(2, told["num_class"]))
            self.predict_proba = self._probabilities

    def predict(self, rows: Any) -> Any:
        if len(self.classes_):
            return self.classes_[self._probabilities(rows).argmax(axis=1)]
        return self._booster.predict(rows)

    def _probabilities(self, rows: Any) -> Array:
        got = np.asarray(self._booster.predict(rows))
        return np.stack([1 - got, got], axis=1) if got.ndim == 1 else got


def with_class(model: Any) -> Any:
    """Give a booster of XGBoost the class of scikit-learn's kind that answers as it does; others stay as they are."""
    if type(model).__name__ != "Booster" or not type(model).__module__.startswith("xgboost"):
        return model
    import xgboost  # noqa: PLC0415

    booster = copy.deepcopy(model)
    booster.set_attr(best_iteration=None)  # up to which such a class answers, and a booster does not
    objective = json.loads(booster.save_config())["learner"]["objective"]["name"]
    classes = objective in ("binary:logistic", "multi:softprob", "multi:softmax")
    made = (xgboost.XGBClassifier if classes else xgboost.XGBRegressor)(enable_categorical=True)
    made.load_model(booster.save_raw())
    return made
