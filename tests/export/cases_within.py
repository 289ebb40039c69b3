"""Exports of models within models, of columns chosen otherwise than by name, and of what converters get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from sklearn import (
    calibration,
    compose,
    ensemble,
    frozen,
    impute,
    linear_model,
    model_selection,
    multioutput,
    naive_bayes,
    pipeline,
    preprocessing,
    svm,
    tree,
)
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from tests.export.fitted import (
    COLOURS,
    NUMBERS,
    ROWS,
    SUM,
    TEXT_TABLE,
    TEXTS,
    THREE,
    TOPICS,
    TWO,
    Case,
    Fitted,
    fit,
    fit_texts,
    holes,
    mixed,
)

LOGISTIC = linear_model.LogisticRegression(max_iter=500)
GROUP = "models within models"


def within() -> list[Case]:
    """List them all."""
    import lightgbm
    import xgboost

    calibrated, chosen = calibration.CalibratedClassifierCV, compose.ColumnTransformer
    scaled, trees = preprocessing.StandardScaler(), ensemble.RandomForestClassifier(5, random_state=0)
    xgb, lgbm = (
        xgboost.XGBClassifier(n_estimators=5),
        lightgbm.LGBMClassifier(n_estimators=5, verbose=-1, min_child_samples=5),
    )
    gaps = holes(NUMBERS)
    categories = mixed().astype({"colour": "category", "size": "category"})
    enabled = xgboost.XGBClassifier(n_estimators=5, enable_categorical=True)
    made: dict[str, dict[str, Callable[[], Fitted]]] = {
        "floats": {
            "CalibratedClassifierCV of a pipeline": lambda: fit(
                calibrated(pipeline.make_pipeline(scaled, svm.LinearSVC()), cv=2), target=TWO
            ),
            "CalibratedClassifierCV(isotonic) of a pipeline": lambda: fit(
                calibrated(pipeline.make_pipeline(scaled, LOGISTIC), cv=2, method="isotonic")
            ),
            "CalibratedClassifierCV of a FrozenEstimator": lambda: fit(
                calibrated(frozen.FrozenEstimator(trees.fit(NUMBERS[::2], THREE[::2])))
            ),
            "CalibratedClassifierCV(XGB)": lambda: fit(calibrated(xgb, cv=2)),
            "CalibratedClassifierCV(LGBM), two classes": lambda: fit(calibrated(lgbm, cv=2), target=TWO),
            "MultiOutputClassifier, booleans": lambda: fit(
                multioutput.MultiOutputClassifier(LOGISTIC), target=np.stack([TWO, THREE], 1) > 0
            ),
            "VotingClassifier(weights)": lambda: fit(
                ensemble.VotingClassifier(
                    [("a", LOGISTIC), ("b", naive_bayes.GaussianNB())], voting="soft", weights=[1, 2]
                )
            ),
            "LinearDiscriminantAnalysis, two classes": lambda: fit(LinearDiscriminantAnalysis(), target=TWO),
            "HistGradientBoostingRegressor(poisson)": lambda: fit(
                ensemble.HistGradientBoostingRegressor(max_iter=5, loss="poisson"), target=SUM
            ),
            "RandomizedSearchCV of a pipeline": lambda: fit(
                model_selection.RandomizedSearchCV(
                    pipeline.make_pipeline(scaled, LOGISTIC), {"logisticregression__C": [1, 2]}, n_iter=2, cv=2
                )
            ),
            "a pipeline with a step passed through": lambda: fit(
                pipeline.Pipeline([("scale", "passthrough"), ("model", LOGISTIC)])
            ),
            "ColumnTransformer by mask": lambda: fit(
                pipeline.make_pipeline(chosen([("s", scaled, [True, True, False, True])]), LOGISTIC)
            ),
            "ColumnTransformer by a slice of names": lambda: fit(
                pipeline.make_pipeline(chosen([("s", scaled, slice("height", "depth"))]), LOGISTIC)
            ),
            "TunedThresholdClassifierCV": lambda: fit(
                model_selection.TunedThresholdClassifierCV(LOGISTIC, cv=2), target=TWO
            ),
            "LGBMRegressor(linear_tree)": lambda: fit(
                lightgbm.LGBMRegressor(n_estimators=5, verbose=-1, linear_tree=True), target=SUM
            ),
            "LGBMClassifier(rf)": lambda: fit(
                lightgbm.LGBMClassifier(
                    n_estimators=5, verbose=-1, boosting_type="rf", bagging_freq=1, bagging_fraction=0.6
                )
            ),
            "xgboost.Booster(multi:softprob)": lambda: _booster("multi:softprob", THREE, num_class=3),
            "xgboost.Booster(multi:softmax)": lambda: _booster("multi:softmax", THREE, num_class=3),
            "xgboost.Booster(binary:logistic)": lambda: _booster("binary:logistic", TWO),
            "lightgbm.Booster of categories": _lightgbm_booster,
        },
        "pandas categories": {
            "GridSearchCV of LGBMClassifier": lambda: fit(
                model_selection.GridSearchCV(lgbm, {"max_depth": [2, 3]}, cv=2), categories
            ),
            "VotingClassifier of XGBClassifiers": lambda: fit(
                ensemble.VotingClassifier([("a", enabled), ("b", enabled)], voting="soft"), categories
            ),
            "CalibratedClassifierCV(LGBM)": lambda: fit(calibrated(lgbm, cv=2), categories),
        },
        "missing numbers": {
            "DecisionTreeClassifier": lambda: fit(tree.DecisionTreeClassifier(max_depth=5, random_state=0), gaps),
            "RandomForestClassifier": lambda: fit(trees, gaps),
            "ExtraTreesRegressor": lambda: fit(ensemble.ExtraTreesRegressor(5, random_state=0), gaps, SUM),
            "SimpleImputer of a column without values": lambda: fit(
                pipeline.make_pipeline(impute.SimpleImputer(), scaled, LOGISTIC), gaps.assign(nothing=np.nan)
            ),
        },
        "one column of texts": {
            "CalibratedClassifierCV of a pipeline of texts": lambda: fit_texts(
                calibrated(pipeline.make_pipeline(TfidfVectorizer(), svm.LinearSVC()), cv=2)
            ),
            "TfidfVectorizer(sublinear_tf)": lambda: fit_texts(TfidfVectorizer(sublinear_tf=True), LOGISTIC),
            "TfidfVectorizer(token_pattern)": _accents,
            "CountVectorizer, XGBClassifier": lambda: fit_texts(CountVectorizer(), xgb),
        },
        "a column of texts beside numbers": {
            "ColumnTransformer(CountVectorizer), XGBClassifier": lambda: fit(
                pipeline.make_pipeline(
                    chosen([("t", CountVectorizer(), "text"), ("n", "passthrough", ["price"])], sparse_threshold=1),
                    xgb,
                ),
                TEXT_TABLE,
                TOPICS,
            )
        },
        "strings, both empty and missing": {"OneHotEncoder": _empty_and_missing},
    }
    refused = {
        "TunedThresholdClassifierCV": "best_threshold_",
        "LGBMRegressor(linear_tree)": "linear_tree",
        "LGBMClassifier(rf)": "boosting_type='gbdt'",
        "VotingClassifier of CatBoostClassifier": "put it last",
        "HistGradientBoostingRegressor(poisson)": "LGBMRegressor",
        "CalibratedClassifierCV of a pipeline of texts": "vectorizer in front of it",
        "SimpleImputer of a column without values": "keep_empty_features",
        "OneHotEncoder": "make one of them of both before fit",
    }
    catboost: dict[str, Callable[[], Fitted]] = {
        "StandardScaler, CatBoostClassifier": lambda: fit(pipeline.make_pipeline(scaled, _catboost("Classifier"))),
        "ColumnTransformer, CatBoostRegressor": lambda: fit(
            pipeline.make_pipeline(
                compose.make_column_transformer(
                    (preprocessing.OneHotEncoder(), ["colour", "size"]), remainder="passthrough"
                ),
                _catboost("Regressor"),
            ),
            mixed(),
            SUM,
        ),
        "GridSearchCV of CatBoostClassifier": lambda: fit(
            model_selection.GridSearchCV(_catboost("Classifier"), {"l2_leaf_reg": [2, 3]}, cv=2)
        ),
        "VotingClassifier of CatBoostClassifier": lambda: fit(
            ensemble.VotingClassifier([("a", LOGISTIC), ("b", _catboost("Classifier"))], voting="soft")
        ),
        "CatBoostClassifier, booleans": lambda: fit(_catboost("Classifier"), target=TWO.astype(bool)),
        "CatBoostClassifier, two integers from 5, MultiClass": lambda: fit(
            _catboost("Classifier", loss_function="MultiClass"), target=TWO + 5
        ),
    }
    return [
        Case(name, GROUP, data, make, refused.get(name, ""))
        for data, cases in made.items()
        for name, make in cases.items()
    ] + [Case(name, GROUP, "DataFrame", make, refused.get(name, ""), "catboost") for name, make in catboost.items()]


def _catboost(kind: str, **options: Any) -> Any:
    import catboost

    return getattr(catboost, f"CatBoost{kind}")(
        iterations=5, depth=3, verbose=False, allow_writing_files=False, **options
    )


def _booster(objective: str, target: Any, **options: Any) -> Fitted:
    import xgboost

    model = xgboost.train({"objective": objective, **options}, xgboost.DMatrix(NUMBERS[::2], target[::2]), 5)

    def ask(rows: Any) -> dict[str, Any]:
        said = model.predict(xgboost.DMatrix(rows))
        if objective == "multi:softmax":
            return {"predict": said.astype(int)}
        return {"predict_proba": np.stack([1 - said, said], 1) if said.ndim == 1 else said}

    return Fitted(model, NUMBERS[::2], NUMBERS[1::2], ask=ask)


def _lightgbm_booster() -> Fitted:
    import lightgbm

    table = NUMBERS.assign(colour=pd.Categorical(COLOURS[np.arange(ROWS) % 3]))
    model = lightgbm.train(
        {"objective": "regression", "verbose": -1, "min_data_in_leaf": 5}, lightgbm.Dataset(table[::2], SUM[::2]), 5
    )
    return Fitted(model, table[::2], table[1::2], ask=lambda rows: {"predict": model.predict(rows)})


def _accents() -> Fitted:
    texts = [text.replace("e", "é") for text in TEXTS]
    model = pipeline.make_pipeline(TfidfVectorizer(token_pattern=r"\b\w+\b"), LOGISTIC).fit(texts[::2], TOPICS[::2])
    table = pd.DataFrame({"text": texts})
    return Fitted(model, table[::2], table[1::2])


def _empty_and_missing() -> Fitted:
    table = mixed(None)
    table.loc[np.arange(ROWS) % 5 == 1, "colour"] = ""
    encoder = pipeline.make_pipeline(
        impute.SimpleImputer(strategy="most_frequent", missing_values=None),
        preprocessing.OneHotEncoder(handle_unknown="ignore"),
    )
    parts = compose.make_column_transformer((encoder, ["colour"]), ("passthrough", ["depth"]))
    return fit(pipeline.make_pipeline(parts, LOGISTIC), table[["colour", "depth"]], np.where(table.colour == "", 0, 1))
