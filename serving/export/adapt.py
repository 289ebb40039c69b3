"""Makes a copy of a fitted model that the converters take: what it answers stays the same."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pandas as pd

from serving.export.refusal import CannotExport, parts, step_of

VECTORIZERS = ("CountVectorizer", "TfidfVectorizer")
WORD = r"(?u)\b\w\w+\b"
WORDS_OF_A_GRAPH = r"[\p{L}\p{N}_]{2,}"
"""What WORD finds, for the tokenizer of onnxruntime, whose \\w and \\b know ASCII only."""


def adapted(model: Any) -> Any:
    """Copy a model, and change what the converters don't know to the same thing in their words.

    A missing string is "" to a graph; a model fitted on a DataFrame has names in its trees; some options have forms
    that differ only in the container they answer with. Raises CannotExport for what they would get wrong in silence.
    """
    made = copy.deepcopy(model)
    for _, part in list(parts(made)):
        kind = type(part).__name__
        if kind.startswith("XGB") and part.__sklearn_is_fitted__():
            _xgboost(made, part)
        elif kind == "SimpleImputer" and hasattr(part, "statistics_"):
            _imputer(made, part)
        elif kind in VECTORIZERS:
            _vectorizer(made, part)
        elif kind == "VotingClassifier":
            part.flatten_transform = False
        elif kind == "KBinsDiscretizer" and part.encode == "onehot":
            part.encode = "onehot-dense"
        elif kind in ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder") and hasattr(part, "categories_"):
            if kind == "OrdinalEncoder" and any(pd.isna(v) for values in part.categories_ for v in values):
                raise CannotExport(
                    step_of(made, part),
                    "has a number for missing values, which its converter does not know",
                    "put SimpleImputer(strategy='constant') in front of it",
                )
            part.categories_ = [_categories(values) for values in part.categories_]
            if getattr(part, "handle_unknown", "") == "warn":
                part.handle_unknown = "ignore"
        elif kind.startswith("HistGradientBoosting") and np.any(getattr(part, "is_categorical_", False)):
            raise CannotExport(
                step_of(made, part),
                "has categorical features, which its converter does not know",
                "put an OrdinalEncoder in front, and leave categorical_features out",
            )
    return made


def _xgboost(model: Any, part: Any) -> None:
    nameless(part.get_booster())
    if part.objective == "multi:softmax":  # the same trees, and predict_proba, which its converter leaves out
        part.objective = "multi:softprob"
    config = json.loads(part.get_booster().save_config())["learner"]
    regressor = type(part).__name__.endswith("Regressor")
    for bad, why, instead in (
        (
            part.booster not in (None, "gbtree"),
            f"is a {part.booster!r} booster, and its converter knows trees only",
            "fit it with booster='gbtree'",
        ),
        (
            part.missing == part.missing,
            f"takes {part.missing} for a missing value, and a graph takes NaN",
            "leave missing= out, and write NaN where a value is missing",
        ),
        (
            regressor and str(part.objective) in ("reg:logistic", "binary:logistic"),
            f"has the objective {part.objective!r}, whose last step its converter leaves out",
            "use XGBClassifier, whose probabilities are the same",
        ),
        (
            regressor and int(config["learner_model_param"]["num_target"]) > 1,
            "predicts several targets, and its converter knows one",
            "use MultiOutputRegressor(XGBRegressor())",
        ),
    ):
        if bad:
            raise CannotExport(step_of(model, part), why, instead)


def nameless(booster: Any) -> None:
    """Forget the names in a booster of XGBoost, and the types that write a split in forms its converter can't read."""
    booster.feature_names = None
    types = booster.feature_types
    if types is not None:
        booster.feature_types = ["c" if kind == "c" else "float" for kind in types] if "c" in types else None


def _vectorizer(model: Any, vectorizer: Any) -> None:
    if vectorizer.stop_words and vectorizer.ngram_range[1] > 1:
        raise CannotExport(
            step_of(model, vectorizer),
            "joins words over the stop words between them, which its converter does not",
            "leave stop_words out, or use ngram_range=(1, 1)",
        )


def _imputer(model: Any, imputer: Any) -> None:
    if imputer.add_indicator:
        raise CannotExport(
            step_of(model, imputer),
            "adds columns that say what was missing, which its converter leaves out",
            "leave add_indicator out, or make those columns before the model",
        )
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
        if kind in ("StandardScaler", "RobustScaler"):
            # As scikit-learn does it, and not by a product: a tree behind it may split at the very value.
            options[id(part)] = {"div": "div"}
        if kind in VECTORIZERS and hasattr(part, "vocabulary_"):
            # The converter's default, en_US, is missing on small machines. "C" lowers ASCII, which is all that a
            # vocabulary of ASCII needs; every current Linux has "C.UTF-8".
            ascii_only = all(word.isascii() for word in part.vocabulary_)
            chosen: dict[str, Any] = {"locale": "C" if ascii_only else "C.UTF-8"}
            if part.analyzer == "word" and part.token_pattern == WORD:
                chosen["tokenexp"] = WORDS_OF_A_GRAPH
            options[id(part)] = chosen
    return options
