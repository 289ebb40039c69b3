"""Makes a copy of a fitted model that the converters take: what it answers stays the same."""

from __future__ import annotations

import copy
import json
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
            _xgboost(made, part)
            part.zero_is_missing = sparse
        elif kind == "Pipeline":
            part.steps = list(_steps(part)) or part.steps
        elif kind == "ColumnTransformer" and hasattr(part, "transformers_"):
            part.transformers_ = [(name, step, _columns(part, name, which)) for name, step, which in part.transformers_]
        elif kind == "SimpleImputer" and hasattr(part, "statistics_"):
            _imputer(made, part)
        elif kind in VECTORIZERS:
            _vectorizer(made, part)
        elif kind in ("VotingClassifier", "VotingRegressor"):
            part.flatten_transform = False
            part.weights = None if part.weights is None else np.asarray(part.weights)
        elif kind == "LinearDiscriminantAnalysis" and len(part.classes_) == 2:
            # Its converter takes the softmax of both margins, where scikit-learn takes the sigmoid of one.
            part.coef_, part.intercept_ = part.coef_ / 2, part.intercept_ / 2
        elif kind == "KBinsDiscretizer" and part.encode == "onehot":
            part.encode = "onehot-dense"
        elif kind in ("OneHotEncoder", "OrdinalEncoder", "TargetEncoder") and hasattr(part, "categories_"):
            _encoder(made, part, kind)
    return made


def _refuse(model: Any, part: Any, kind: str) -> None:
    """Refuse what a converter leaves out in silence. Raises CannotExport."""
    loss = str(part.get_param("loss_function")).split(":")[0] if kind.startswith("CatBoost") else ""
    left_out = f"has the loss {loss!r}, whose last step CatBoost's own file leaves out"
    lightgbm = part.get_params() if kind.startswith("LGBM") else {}
    targets = getattr(part, "classes_", None)
    for bad, why, instead in (
        (
            isinstance(targets, list)
            and kind != "MultiOutputClassifier"
            and any(t.dtype.kind in "UO" for t in targets),
            "answers several targets with strings, and its converter knows numbers only",
            f"use MultiOutputClassifier({kind}())",
        ),
        (
            kind.startswith("HistGradientBoosting") and np.any(getattr(part, "is_categorical_", False)),
            "has categorical features, which its converter does not know",
            "put an OrdinalEncoder in front, and leave categorical_features out",
        ),
        (
            kind == "TunedThresholdClassifierCV",
            "has a threshold of its own, which its converter leaves out",
            "export its estimator_, and compare its probability with best_threshold_ where the answer is read",
        ),
        (
            kind == "HistGradientBoostingRegressor" and part.loss in ("poisson", "gamma"),
            "predicts by an exponential function, which its converter leaves out",
            "use LGBMRegressor(objective='poisson'), or fit it on the logarithm of the target",
        ),
        (
            kind == "CalibratedClassifierCV" and part.method == "temperature",
            "scales by a temperature, which its converter does not know",
            "use method='sigmoid' or 'isotonic'",
        ),
        (
            kind == "OneVsRestClassifier" and getattr(part, "multilabel_", False),
            "answers several targets, and its converter one",
            "use MultiOutputClassifier",
        ),
        (
            callable(lightgbm.get("objective")),
            "has an objective of your own, and its converter knows LightGBM's",
            "use one of these",
        ),
        (
            lightgbm.get("linear_tree"),
            "has linear models in its leaves, which its converter leaves out",
            "fit it without linear_tree",
        ),
        (
            lightgbm.get("boosting_type") == "rf",
            "averages its trees, and its converter adds them up",
            "fit it with boosting_type='gbdt', or use RandomForestClassifier",
        ),
        (
            loss.startswith("Multi") and kind == "CatBoostRegressor",
            "predicts several targets, and CatBoost's own file has one",
            "fit and export a model for each target",
        ),
        (loss == "MultiClassOneVsAll", left_out, "use MultiClass"),
        (loss in ("Poisson", "Tweedie", "LogLinQuantile"), left_out, "fit RMSE on the logarithm of the target"),
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


def _encoder(model: Any, part: Any, kind: str) -> None:
    if kind == "OrdinalEncoder" and any(pd.isna(v) for values in part.categories_ for v in values):
        raise CannotExport(
            step_of(model, part),
            "has a number for missing values, which its converter does not know",
            "put SimpleImputer(strategy='constant') in front of it",
        )
    part.categories_ = [_categories(values) for values in part.categories_]
    if getattr(part, "handle_unknown", "") == "warn":
        part.handle_unknown = "ignore"


def _unwrapped(model: Any) -> Any:
    """Copy a model without searches and the like around it, a booster of XGBoost as a class of scikit-learn's kind."""
    if type(model).__name__ == "Booster" and type(model).__module__.startswith("xgboost"):
        return _with_class(model)
    inner = {"FrozenEstimator": "estimator"}
    memo: dict[int, Any] = {}
    for _, part in reversed(list(parts(model))):
        name = "best_estimator_" if hasattr(part, "best_estimator_") else inner.get(type(part).__name__)
        if name:
            memo[id(part)] = copy.deepcopy(getattr(part, name), memo)
    return copy.deepcopy(model, memo)


def _with_class(booster: Any) -> Any:
    """Give a booster of XGBoost the class of scikit-learn's kind that answers as it does."""
    import xgboost  # noqa: PLC0415

    made = copy.deepcopy(booster)
    made.set_attr(best_iteration=None)  # up to which such a class answers, and a booster does not
    objective = json.loads(made.save_config())["learner"]["objective"]["name"]
    classes = objective in ("binary:logistic", "multi:softprob", "multi:softmax")
    model = xgboost.XGBClassifier() if classes else xgboost.XGBRegressor()
    model.load_model(made.save_raw())
    return model


def _columns(transformer: Any, name: str, which: Any) -> Any:
    """Give columns that are chosen by a mask, or by a slice of names, as their places."""
    mask = isinstance(which, slice) or (np.ndim(which) == 1 and np.asarray(which).dtype == bool)
    return [int(place) for place in transformer._transformer_to_input_indices[name]] if mask else which


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
            regressor and str(part.objective) == "binary:hinge",
            "has the objective 'binary:hinge', whose last step its converter leaves out",
            "use objective='binary:logistic'",
        ),
        (
            int(config["learner_model_param"]["num_target"]) > 1,
            "predicts several targets, and its converter knows one",
            "use MultiOutputRegressor(XGBRegressor())" if regressor else "use MultiOutputClassifier(XGBClassifier())",
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
    if pd.isna(imputer.statistics_).any() and not imputer.keep_empty_features:
        raise CannotExport(
            step_of(model, imputer),
            "drops a column of which no value was there, which its converter does not",
            "leave that column out, or use keep_empty_features=True",
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
