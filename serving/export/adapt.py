"""Makes a copy of a fitted model that the converters take: what it answers stays the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from serving.export.converters import answers_raw
from serving.export.refusal import CannotExport, parts, step_of

VECTORIZERS = ("CountVectorizer", "TfidfVectorizer")
WORD = re.compile(r"(?:\(\?u\))?(?:\\b)?(?P<first>(?:\\w)*)\\w(?:\+|\{(?P<more>\d+),\})(?:\\b)?")
"""Patterns that find words of so many letters or more, the usual one among them.

The tokenizer of onnxruntime is told the letters, since its \\w and \\b know ASCII only.
"""


def adapted(model: Any, *, sparse: bool = False) -> Any:
    """Copy a model, and change what the converters don't know to the same thing in their words.

    A missing string is "" to a graph; a model fitted on a DataFrame has names in its trees; some options have forms
    that differ only in the container they answer with. sparse: its last step is given a sparse matrix, whose zeros
    XGBoost takes for missing values. Raises CannotExport for what they would get wrong in silence.
    """
    made = _unwrapped(model)
    for _, part in list(parts(made)):
        kind = type(part).__name__
        _refuse(made, part, kind)
        if kind.startswith("XGB") and part.__sklearn_is_fitted__():
            _nameless(part.get_booster())
            if part.objective == "multi:softmax":  # the same trees, and predict_proba, which its converter leaves out
                part.objective = "multi:softprob"
            part.zero_is_missing = sparse
        elif kind == "Pipeline":
            part.steps = list(_steps(part)) or part.steps
        elif kind == "ColumnTransformer" and hasattr(part, "transformers_"):
            part.transformers_ = [(name, step, _columns(part, name, which)) for name, step, which in part.transformers_]
        elif kind == "SimpleImputer" and hasattr(part, "statistics_"):
            _imputer(part)
        elif kind in ("VotingClassifier", "VotingRegressor"):
            part.flatten_transform = False
            part.weights = None if part.weights is None else np.asarray(part.weights)
        elif kind == "LinearDiscriminantAnalysis" and len(part.classes_) == 2:
            # Its converter takes the softmax of both margins, where scikit-learn takes the sigmoid of one.
            part.coef_, part.intercept_ = part.coef_ / 2, part.intercept_ / 2
        elif kind == "KBinsDiscretizer" and part.encode == "onehot":
            part.encode = "onehot-dense"
        elif kind in ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder") and hasattr(part, "categories_"):
            part.categories_ = [_categories(values) for values in part.categories_]
            if getattr(part, "handle_unknown", "") == "warn":
                part.handle_unknown = "ignore"
    return made


def _refuse(model: Any, part: Any, kind: str) -> None:
    """Refuse what a converter leaves out in silence, and few rows would show. Raises CannotExport.

    What every comparison shows is left to it.
    """
    for bad, why, instead in (
        (
            kind == "TunedThresholdClassifierCV",
            "has a threshold of its own, which its converter leaves out",
            "export its estimator_, and compare its probability with best_threshold_ where the answer is read",
        ),
        (
            kind.startswith("HistGradientBoosting") and np.any(getattr(part, "is_categorical_", False)),
            "has categorical features, which its converter does not know",
            "put an OrdinalEncoder in front, and leave categorical_features out",
        ),
        (
            kind.startswith("XGB") and part.missing == part.missing,
            "has a value that stands for a missing one, and a graph takes NaN",
            "leave missing= out, and write NaN where a value is missing",
        ),
        (
            kind == "OrdinalEncoder" and any(pd.isna(v) for values in getattr(part, "categories_", ()) for v in values),
            "has a number for missing values, which its converter does not know",
            "put SimpleImputer(strategy='constant') in front of it",
        ),
        (
            kind == "SimpleImputer" and part.add_indicator,
            "adds columns that say what was missing, which its converter leaves out",
            "leave add_indicator out, or make those columns before the model",
        ),
        (
            kind == "SimpleImputer"
            and not part.keep_empty_features
            and np.any(pd.isna(np.asarray(getattr(part, "statistics_", [])))),
            "drops a column of which no value was there, which its converter does not",
            "leave that column out, or use keep_empty_features=True",
        ),
        (
            kind in VECTORIZERS and part.stop_words and part.ngram_range[1] > 1,
            "joins words over the stop words between them, which its converter does not",
            "leave stop_words out, or use ngram_range=(1, 1)",
        ),
    ):
        if bad:
            raise CannotExport(step_of(model, part), why, instead)


def _steps(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """List a pipeline's steps, those of pipelines within too, without what passes rows on."""
    for name, step in pipeline.steps:
        if type(step).__name__ == "Pipeline":
            yield from _steps(step)
        elif step not in (None, "passthrough"):
            yield name, step


def _unwrapped(model: Any) -> Any:
    """Copy a model without searches and the like around it."""
    inner = {"FrozenEstimator": "estimator"}
    memo: dict[int, Any] = {}
    for _, part in reversed(list(parts(model))):
        name = "best_estimator_" if hasattr(part, "best_estimator_") else inner.get(type(part).__name__)
        if name:
            memo[id(part)] = copy.deepcopy(getattr(part, name), memo)
    return copy.deepcopy(model, memo)


def _columns(transformer: Any, name: str, which: Any) -> Any:
    """Give columns that are chosen by a mask, or by a slice of names, as their places."""
    mask = isinstance(which, slice) or (np.ndim(which) == 1 and np.asarray(which).dtype == bool)
    return [int(place) for place in transformer._transformer_to_input_indices[name]] if mask else which


def _nameless(booster: Any) -> None:
    """Forget the names in a booster of XGBoost, and the types that write a split in forms its converter can't read."""
    booster.feature_names = None
    types = booster.feature_types
    if types is not None:
        booster.feature_types = ["c" if kind == "c" else "float" for kind in types] if "c" in types else None


def _imputer(imputer: Any) -> None:
    """Give the value that stands for a missing one as a graph has it: "" for strings, NaN or another float else."""
    if any(isinstance(value, str) for value in imputer.statistics_):
        if pd.isna(imputer.missing_values):
            imputer.missing_values = ""
    elif imputer.missing_values is None or imputer.missing_values is pd.NA:
        imputer.missing_values = np.nan
    elif isinstance(imputer.missing_values, int):
        imputer.missing_values = float(imputer.missing_values)


def _categories(values: Any) -> Any:
    if not any(isinstance(value, str) for value in values):
        return values
    return np.array(["" if pd.isna(value) else value for value in values], dtype=object)


def options_of(model: Any) -> dict[int, dict[str, Any]]:
    """Choose the converters' options for each part, by its id."""
    options: dict[int, dict[str, Any]] = {}
    for _, part in parts(model):
        kind = type(part).__name__
        for calibrated in getattr(part, "calibrated_classifiers_", ()):
            # The converter asks for what is calibrated, but not where the last step of a pipeline says it.
            last = getattr(calibrated.estimator, "steps", [("", None)])[-1][1]
            if hasattr(last, "decision_function") and answers_raw(last):
                options[id(last)] = {"raw_scores": True}
        if kind in ("StandardScaler", "RobustScaler"):
            # As scikit-learn does it, and not by a product: a tree behind it may split at the very value.
            options[id(part)] = {"div": "div"}
        if kind in VECTORIZERS and hasattr(part, "vocabulary_"):
            # The converter's default, en_US, is missing on small machines. "C" lowers ASCII, which is all that a
            # vocabulary of ASCII needs; every current Linux has "C.UTF-8".
            ascii_only = all(word.isascii() for word in part.vocabulary_)
            chosen: dict[str, Any] = {"locale": "C" if ascii_only else "C.UTF-8"}
            least = WORD.fullmatch(part.token_pattern or "") if part.analyzer == "word" else None
            if least:
                count = least["first"].count("w") + int(least["more"] or 1)
                chosen["tokenexp"] = rf"[\p{{L}}\p{{N}}_]{{{count},}}"
            options[id(part)] = chosen
    return options
