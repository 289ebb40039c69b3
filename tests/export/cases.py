"""Every export that is tried: a model on a form of data, and whether it converts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from sklearn import (
    calibration,
    cluster,
    compose,
    decomposition,
    ensemble,
    impute,
    linear_model,
    model_selection,
    multioutput,
    preprocessing,
    svm,
)
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.pipeline import make_pipeline, make_union

from tests.export.fitted import (
    NUMBERS,
    SUM,
    TEXT_TABLE,
    THREE,
    TOPICS,
    TWO,
    WORDS,
    Case,
    Doubling,
    Fitted,
    classifiers,
    fit,
    fit_texts,
    holes,
    mixed,
    numbers,
    regressors,
    transformers,
)

NO_CONVERTER = {
    "OutputCodeClassifier",
    "DummyClassifier",
    "DummyRegressor",
    "TransformedTargetRegressor",
    "FastICA",
    "GaussianProcessClassifier",
    "EllipticEnvelope",
    "DBSCAN",
    "NMF",
    "SplineTransformer",
    "Nystroem",
    "NearestCentroid",
}

LOGISTIC = linear_model.LogisticRegression(max_iter=500)
MIXED = "strings, numbers, integers, booleans"


def cases() -> list[Case]:
    """List them all."""
    from tests.export.cases_within import within

    return [
        *_sklearn(),
        *_boosters(),
        *_catboost(),
        *_pipelines(),
        *_missing(),
        *_texts(),
        *_answers(),
        *_tables(),
        *within(),
    ]


def _named(group: str, data: str, made: dict[str, Callable[[], Fitted]], refused: dict[str, str]) -> list[Case]:
    return [Case(name, group, data, make, refused.get(name, "")) for name, make in made.items()]


def _sklearn() -> list[Case]:
    made = []
    refused = {name: name.split("(")[0] for name in NO_CONVERTER}
    for group, models, target in (
        ("classifiers", classifiers(), THREE),
        ("regressors", regressors(), SUM),
        ("transformers, clusters, outliers", transformers(), THREE),
    ):
        for name, model in models.items():
            if name == "GaussianProcessRegressor":
                make = lambda model=model, target=target: fit(model, NUMBERS.astype(float), target, double=True)  # noqa: E731
            else:
                make = lambda model=model, target=target: fit(model, NUMBERS, target)  # noqa: E731
            made += _named(group, "floats", {name: make}, refused)
    return made


def _boosters() -> list[Case]:
    import lightgbm
    import xgboost

    def xgb(kind: str = "Classifier", **options: Any) -> Any:
        return getattr(xgboost, f"XGB{kind}")(n_estimators=5, **options)

    def lgbm(kind: str = "Classifier", **options: Any) -> Any:
        return getattr(lightgbm, f"LGBM{kind}")(n_estimators=5, verbose=-1, min_child_samples=5, **options)

    def booster(objective: str, target: Any) -> Fitted:
        table = NUMBERS[::2]
        parameters = {"objective": objective, "verbose": -1, "min_data_in_leaf": 5}
        if objective == "multiclass":
            parameters["num_class"] = 3
        model = lightgbm.train(parameters, lightgbm.Dataset(table, target[::2]), 5)
        way = "predict" if objective == "regression" else "predict_proba"

        def ask(rows: Any) -> dict[str, Any]:
            said = model.predict(rows)
            return {way: np.stack([1 - said, said], 1) if objective == "binary" else said}

        return Fitted(model, table, NUMBERS[1::2], ask=ask)

    def xgb_booster() -> Fitted:
        table = NUMBERS[::2]
        model = xgboost.train({"objective": "reg:squarederror"}, xgboost.DMatrix(table, SUM[::2]), 5)
        return Fitted(model, table, NUMBERS[1::2], ask=lambda rows: {"predict": model.predict(xgboost.DMatrix(rows))})

    categories = mixed().astype({"colour": "category", "size": "category"})
    gaps = mixed(None).astype({"colour": "category", "size": "category"})
    whole = NUMBERS.assign(rooms=pd.Categorical(np.arange(len(NUMBERS)) % 4 * 10))
    array, gappy = NUMBERS.to_numpy(), holes(NUMBERS)
    forms = {
        "DataFrame": (NUMBERS, {}),
        "numpy": (array, {}),
        "missing numbers": (gappy, {}),
        "integers": (numbers("int64"), {}),
        "pandas categories": (categories, {"enable_categorical": True}),
        "categories with missing values": (gaps, {"enable_categorical": True}),
        "categories of integers": (whole, {"enable_categorical": True}),
    }
    made = []
    for data, (table, wanted) in forms.items():
        for name, make, options in (("XGB", xgb, wanted), ("LGBM", lgbm, {})):
            made += [
                Case(
                    f"{name}Classifier",
                    "boosted trees",
                    data,
                    lambda make=make, table=table, o=options: fit(make(**o), table),  # type: ignore[misc]
                ),
                Case(
                    f"{name}Regressor",
                    "boosted trees",
                    data,
                    lambda make=make, table=table, o=options: fit(make("Regressor", **o), table, SUM),  # type: ignore[misc]
                ),
            ]
    scaled = preprocessing.StandardScaler
    made += _named(
        "boosted trees",
        "DataFrame",
        {
            "XGBClassifier, two classes": lambda: fit(xgb(), target=TWO),
            "XGBClassifier, early stopping": lambda: _early(xgb(early_stopping_rounds=2)),
            "XGBRFRegressor": lambda: fit(xgb("RFRegressor"), target=SUM),
            "XGBRegressor(count:poisson)": lambda: fit(xgb("Regressor", objective="count:poisson"), target=TWO),
            "LGBMClassifier, two classes": lambda: fit(lgbm(), target=TWO),
            "LGBMClassifier, classes of strings": lambda: fit(lgbm(), target=WORDS),
            "LGBMRegressor(poisson)": lambda: fit(lgbm("Regressor", objective="poisson"), target=SUM),
            "LGBMRegressor(dart)": lambda: fit(lgbm("Regressor", boosting_type="dart"), target=SUM),
            "lightgbm.Booster(regression)": lambda: booster("regression", SUM),
            "lightgbm.Booster(binary)": lambda: booster("binary", TWO),
            "lightgbm.Booster(multiclass)": lambda: booster("multiclass", THREE),
            "xgboost.Booster": xgb_booster,
            "StandardScaler, XGBClassifier": lambda: fit(make_pipeline(scaled(), xgb())),
            "StandardScaler, XGBRegressor": lambda: fit(make_pipeline(scaled(), xgb("Regressor")), target=SUM),
            "StandardScaler, LGBMClassifier": lambda: fit(make_pipeline(scaled(), lgbm())),
            "StandardScaler, LGBMRegressor": lambda: fit(make_pipeline(scaled(), lgbm("Regressor")), target=SUM),
            "StandardScaler(pandas), XGBClassifier": lambda: fit(
                make_pipeline(scaled().set_output(transform="pandas"), xgb())
            ),
            "VotingClassifier(soft) of XGB and LGBM": lambda: fit(
                ensemble.VotingClassifier([("x", xgb()), ("l", lgbm())], voting="soft")
            ),
            "CalibratedClassifierCV(LGBM)": lambda: fit(calibration.CalibratedClassifierCV(lgbm(), cv=2)),
            "MultiOutputRegressor(XGB)": lambda: fit(
                multioutput.MultiOutputRegressor(xgb("Regressor")), target=np.stack([SUM, -SUM], 1)
            ),
            "StandardScaler, XGBClassifier, double=True": lambda: fit(
                make_pipeline(scaled(), xgb()), NUMBERS.astype(float) / 10, double=True
            ),
            "StandardScaler, LGBMRegressor, double=True": lambda: fit(
                make_pipeline(scaled(), lgbm("Regressor")), NUMBERS.astype(float) / 10, SUM, double=True
            ),
        },
        {
            "StandardScaler, LGBMRegressor, double=True": "float32 before fit",
        },
    )
    made += [
        Case("ColumnTransformer, XGBClassifier", "boosted trees", MIXED, lambda: fit(_columns(xgb()), mixed())),
        Case("ColumnTransformer, LGBMRegressor", "boosted trees", MIXED, lambda: fit(_columns(lgbm()), mixed())),
    ]
    return made


def _early(model: Any) -> Fitted:
    half = NUMBERS[::2]
    return Fitted(
        model.fit(half, THREE[::2], eval_set=[(NUMBERS[1::2], THREE[1::2])], verbose=False), half, NUMBERS[1::2]
    )


def _catboost() -> list[Case]:
    def make(kind: str, target: Any) -> Fitted:
        import catboost  # type: ignore[import-not-found]

        model = getattr(catboost, kind)(iterations=5, depth=3, verbose=False, allow_writing_files=False)
        return fit(model, target=target)

    def strings() -> Fitted:
        import catboost

        model = catboost.CatBoostClassifier(
            iterations=5, depth=3, verbose=False, allow_writing_files=False, cat_features=["colour", "size"]
        )
        return fit(model, mixed())

    return [
        Case(
            "CatBoostClassifier",
            "boosted trees",
            "DataFrame",
            lambda: make("CatBoostClassifier", THREE),
            "",
            "catboost",
        ),
        Case(
            "CatBoostClassifier, two classes",
            "boosted trees",
            "DataFrame",
            lambda: make("CatBoostClassifier", TWO),
            "",
            "catboost",
        ),
        Case(
            "CatBoostClassifier, classes of strings",
            "boosted trees",
            "DataFrame",
            lambda: make("CatBoostClassifier", WORDS),
            "",
            "catboost",
        ),
        Case("CatBoostRegressor", "boosted trees", "DataFrame", lambda: make("CatBoostRegressor", SUM), "", "catboost"),
        Case("CatBoostClassifier(cat_features)", "boosted trees", MIXED, strings, "categor", "catboost"),
    ]


def _columns(last: Any, encoder: Any = None, numeric: Any = None) -> Any:
    """Make the pipeline of most tutorials: strings encoded, numbers scaled, the rest passed on."""
    encoder = preprocessing.OneHotEncoder(handle_unknown="ignore") if encoder is None else encoder
    numeric = preprocessing.StandardScaler() if numeric is None else numeric
    return make_pipeline(
        compose.make_column_transformer(
            (encoder, ["colour", "size"]), (numeric, ["height", "depth"]), remainder="passthrough"
        ),
        last,
    )


def _pipelines() -> list[Case]:
    one_hot, ordinal, target = preprocessing.OneHotEncoder, preprocessing.OrdinalEncoder, preprocessing.TargetEncoder
    trees = ensemble.RandomForestClassifier(5, random_state=0)
    scaled = preprocessing.StandardScaler()
    only_numbers = compose.make_column_transformer(
        (scaled, ["width (cm)", "height"]), (preprocessing.MinMaxScaler(), ["depth"]), remainder="passthrough"
    )
    logged = preprocessing.FunctionTransformer(np.log1p)
    made = _named(
        "pipelines",
        "floats",
        {
            "ColumnTransformer by name": lambda: fit(make_pipeline(only_numbers, LOGISTIC)),
            "ColumnTransformer alone": lambda: fit(only_numbers),
            "ColumnTransformer by position, numpy": lambda: fit(
                make_pipeline(compose.make_column_transformer((scaled, [0, 2]), ("passthrough", [1])), LOGISTIC),
                NUMBERS.to_numpy(),
            ),
            "FeatureUnion(PCA, SelectKBest)": lambda: fit(
                make_pipeline(
                    make_union(decomposition.PCA(2), preprocessing.MinMaxScaler()),
                    LOGISTIC,
                )
            ),
            "KMeans in a pipeline": lambda: fit(make_pipeline(scaled, cluster.KMeans(3, n_init=1, random_state=0))),
            "PCA in a pipeline": lambda: fit(make_pipeline(scaled, decomposition.PCA(2))),
            "KBinsDiscretizer, LogisticRegression": lambda: fit(
                make_pipeline(preprocessing.KBinsDiscretizer(4, quantile_method="averaged_inverted_cdf"), LOGISTIC)
            ),
            "GridSearchCV of a pipeline": lambda: fit(
                model_selection.GridSearchCV(
                    make_pipeline(only_numbers, LOGISTIC), {"logisticregression__C": [1, 2]}, cv=2
                )
            ),
            "FunctionTransformer(log1p)": lambda: fit(make_pipeline(logged, LOGISTIC)),
            "FunctionTransformer(), which passes on": lambda: fit(
                make_pipeline(preprocessing.FunctionTransformer(), LOGISTIC)
            ),
            "a step of one's own": lambda: fit(make_pipeline(Doubling(), LOGISTIC)),
        },
        {"FunctionTransformer(log1p)": "functiontransformer", "a step of one's own": "doubling"},
    )
    made += _named(
        "pipelines",
        MIXED,
        {
            "OneHotEncoder(ignore), StandardScaler": lambda: fit(_columns(LOGISTIC), mixed()),
            "OneHotEncoder(error)": lambda: fit(_columns(LOGISTIC, one_hot()), mixed()),
            "OneHotEncoder(drop=first)": lambda: fit(_columns(trees, one_hot(drop="first")), mixed()),
            "OneHotEncoder(min_frequency)": lambda: fit(
                _columns(LOGISTIC, one_hot(min_frequency=20, handle_unknown="infrequent_if_exist")), mixed()
            ),
            "OneHotEncoder(dense)": lambda: fit(_columns(trees, one_hot(sparse_output=False)), mixed()),
            "OrdinalEncoder": lambda: fit(_columns(trees, ordinal()), mixed()),
            "OrdinalEncoder(use_encoded_value)": lambda: fit(
                _columns(trees, ordinal(handle_unknown="use_encoded_value", unknown_value=-1)), mixed()
            ),
            "TargetEncoder": lambda: fit(_columns(LOGISTIC, target(random_state=0)), mixed(), TWO),
            "VotingClassifier(soft)": lambda: fit(
                _columns(ensemble.VotingClassifier([("a", LOGISTIC), ("b", trees)], voting="soft")), mixed()
            ),
            "HistGradientBoosting behind OrdinalEncoder": lambda: fit(
                _columns(ensemble.HistGradientBoostingClassifier(max_iter=5), ordinal()), mixed()
            ),
            "HistGradientBoosting(categorical_features)": lambda: fit(
                ensemble.HistGradientBoostingClassifier(max_iter=5, categorical_features="from_dtype"),
                mixed().astype({"colour": "category", "size": "category"}),
            ),
            "OneHotEncoder of integers and booleans": lambda: fit(
                make_pipeline(
                    compose.make_column_transformer(
                        (one_hot(handle_unknown="ignore"), ["rooms", "sea view", "size"]), ("passthrough", ["depth"])
                    ),
                    LOGISTIC,
                ),
                mixed(),
            ),
        },
        {"HistGradientBoosting(categorical_features)": "OrdinalEncoder"},
    )
    return made


def _missing() -> list[Case]:
    one_hot = preprocessing.OneHotEncoder
    made = []
    for shown, missing, dtype in (
        ("NaN", np.nan, object),
        ("None", None, object),
        ("pandas' str", np.nan, "str"),
        ("pd.NA", pd.NA, "string"),
    ):
        table = mixed(missing, dtype)
        sign = pd.NA if missing is pd.NA else None if missing is None else np.nan
        for strategy in ("most_frequent", "constant"):
            filled = impute.SimpleImputer(
                strategy=strategy, missing_values=sign, fill_value="none" if strategy == "constant" else None
            )
            encoder = make_pipeline(filled, one_hot(handle_unknown="ignore"))
            made.append((f"SimpleImputer({strategy})", shown, table, encoder))
        if missing is not pd.NA:  # which encoders don't take
            made.append(("OneHotEncoder", shown, table, one_hot(handle_unknown="ignore")))
            made.append(("OneHotEncoder(error)", shown, table, one_hot()))
    ordinal = preprocessing.OrdinalEncoder(encoded_missing_value=-2)
    made.append(("OrdinalEncoder(encoded_missing_value)", "NaN", mixed(np.nan), ordinal))
    median = make_pipeline(impute.SimpleImputer(strategy="median"), preprocessing.StandardScaler())
    gaps = holes(NUMBERS)
    nullable = holes(numbers("Int64"), pd.NA)
    return [
        *(
            Case(
                name,
                "missing values",
                f"strings, missing as {shown}",
                lambda t=t, e=e: fit(_columns(LOGISTIC, e, median), t),
                "SimpleImputer" if name.startswith("Ordinal") else "",
            )  # type: ignore[misc]
            for name, shown, t, e in made
        ),
        Case("SimpleImputer(median)", "missing values", "floats", lambda: fit(make_pipeline(median, LOGISTIC), gaps)),
        Case(
            "SimpleImputer(add_indicator)",
            "missing values",
            "floats",
            lambda: fit(make_pipeline(impute.SimpleImputer(add_indicator=True), LOGISTIC), gaps),
            "simpleimputer",
        ),
        Case(
            "HistGradientBoosting",
            "missing values",
            "floats",
            lambda: fit(ensemble.HistGradientBoostingClassifier(max_iter=5), gaps),
        ),
        Case(
            "SimpleImputer(mean)",
            "missing values",
            "pandas' Int64 with pd.NA",
            lambda: fit(make_pipeline(impute.SimpleImputer(), LOGISTIC), nullable),
        ),
    ]


def _texts() -> list[Case]:
    def in_columns(vectorizer: Any) -> Fitted:
        parts = compose.make_column_transformer((vectorizer, "text"), (preprocessing.StandardScaler(), ["price"]))
        return fit(make_pipeline(parts, LOGISTIC), TEXT_TABLE, TOPICS)

    return _named(
        "texts",
        "one column of texts",
        {
            "CountVectorizer": lambda: fit_texts(CountVectorizer(), LOGISTIC),
            "TfidfVectorizer": lambda: fit_texts(TfidfVectorizer(), LOGISTIC),
            "TfidfVectorizer(ngram_range, stop_words)": lambda: fit_texts(
                TfidfVectorizer(ngram_range=(1, 2), stop_words="english", token_pattern="[a-zA-Z]+"), LOGISTIC
            ),
            "TfidfVectorizer(stop_words)": lambda: fit_texts(TfidfVectorizer(stop_words="english"), LOGISTIC),
            "TfidfVectorizer(lowercase=False)": lambda: fit_texts(TfidfVectorizer(lowercase=False), LOGISTIC),
            "TfidfVectorizer, LinearSVC": lambda: fit_texts(TfidfVectorizer(), svm.LinearSVC()),
            "TfidfVectorizer, TruncatedSVD": lambda: fit_texts(
                TfidfVectorizer(), decomposition.TruncatedSVD(3, random_state=0), LOGISTIC
            ),
            "CountVectorizer alone": lambda: fit_texts(CountVectorizer()),
            "TfidfVectorizer(analyzer=char)": lambda: fit_texts(TfidfVectorizer(analyzer="char"), LOGISTIC),
            "TfidfVectorizer(analyzer=char_wb)": lambda: fit_texts(
                TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 3)), LOGISTIC
            ),
            "FeatureUnion of two vectorizers": lambda: fit_texts(
                make_union(TfidfVectorizer(), CountVectorizer(ngram_range=(2, 2))), LOGISTIC
            ),
            "HashingVectorizer": lambda: fit_texts(HashingVectorizer(n_features=32), LOGISTIC),
        },
        {
            "HashingVectorizer": "hashingvectorizer",
            "TfidfVectorizer(analyzer=char_wb)": "analyzer",
            "TfidfVectorizer(ngram_range, stop_words)": "stop_words",
        },
    ) + _named(
        "texts",
        "a column of texts beside numbers",
        {
            "ColumnTransformer(TfidfVectorizer)": lambda: in_columns(TfidfVectorizer()),
            "ColumnTransformer(CountVectorizer)": lambda: in_columns(CountVectorizer()),
        },
        {},
    )


def _answers() -> list[Case]:
    both = np.stack([THREE, TWO], 1)
    trees = ensemble.RandomForestClassifier(5, random_state=0)
    bools = TWO.astype(bool)
    return _named(
        "answers",
        "floats",
        {
            "LinearSVC, two classes": lambda: fit(svm.LinearSVC(), target=TWO),
            "SGDClassifier(hinge), two classes": lambda: fit(linear_model.SGDClassifier(random_state=0), target=TWO),
            "SVC, two classes": lambda: fit(svm.SVC(), target=TWO),
            "CalibratedClassifierCV, two classes": lambda: fit(
                calibration.CalibratedClassifierCV(svm.LinearSVC(), cv=2), target=TWO
            ),
            "LogisticRegression, booleans": lambda: fit(LOGISTIC, target=bools),
            "RandomForestClassifier, booleans": lambda: fit(trees, target=bools),
            "LinearSVC, booleans": lambda: fit(svm.LinearSVC(), target=bools),
            "LogisticRegression, strings": lambda: fit(LOGISTIC, target=WORDS),
            "LogisticRegression, integers from 5": lambda: fit(LOGISTIC, target=THREE + 5),
            "LogisticRegression, floats": lambda: fit(LOGISTIC, target=THREE.astype(float)),
            "MultiOutputClassifier": lambda: fit(multioutput.MultiOutputClassifier(LOGISTIC), target=both),
            "MultiOutputRegressor": lambda: fit(
                multioutput.MultiOutputRegressor(linear_model.Ridge()), target=np.stack([SUM, -SUM], 1)
            ),
            "LinearRegression of two targets": lambda: fit(
                linear_model.LinearRegression(), target=np.stack([SUM, -SUM], 1)
            ),
            "RandomForestClassifier of two targets": lambda: fit(trees, target=both),
            "RandomForestRegressor of two targets": lambda: fit(
                ensemble.RandomForestRegressor(3, random_state=0), target=np.stack([SUM, -SUM], 1)
            ),
        },
        {},
    )


def _tables() -> list[Case]:
    def polars() -> Fitted:
        import polars  # type: ignore[import-not-found]

        made = fit(LOGISTIC)
        return Fitted(made.model, *(polars.DataFrame(t.to_dict("list")) for t in (made.train, made.held_out)))

    def series() -> Fitted:
        made = fit_texts(TfidfVectorizer(), LOGISTIC)
        return Fitted(made.model, made.train["text"], made.held_out["text"])

    def reordered() -> Fitted:
        made = fit(LOGISTIC)
        return Fitted(made.model, made.train, made.held_out[list(NUMBERS)[::-1]])

    def clock() -> Fitted:
        rows = NUMBERS.astype("float64").assign(seconds=1.7e9 + np.arange(len(NUMBERS)))
        model = ensemble.RandomForestRegressor(5, random_state=0)
        return fit(model, rows, np.arange(len(NUMBERS)) % 10)

    whole = numbers("int64")
    trees = ensemble.RandomForestClassifier(5, random_state=0)
    flags = (NUMBERS > 5).rename(columns=str.upper)
    dates = NUMBERS.assign(day=pd.date_range("2024-01-01", periods=len(NUMBERS)))
    rows: list[tuple[str, str, Callable[[], Fitted], str, str]] = [
        ("LogisticRegression", "numpy", lambda: fit(LOGISTIC, NUMBERS.to_numpy()), "", ""),
        ("LogisticRegression", "numpy of doubles", lambda: fit(LOGISTIC, NUMBERS.to_numpy().astype(float)), "", ""),
        ("LogisticRegression", "polars", polars, "", "polars"),
        ("LogisticRegression", "held-out columns in another order", reordered, "", ""),
        ("TfidfVectorizer", "a Series of texts", series, "", ""),
        ("LogisticRegression", "integers", lambda: fit(LOGISTIC, whole), "", ""),
        ("RandomForestClassifier", "integers", lambda: fit(trees, whole), "", ""),
        (
            "StandardScaler, LogisticRegression",
            "integers",
            lambda: fit(make_pipeline(preprocessing.StandardScaler(), LOGISTIC), whole),
            "",
            "",
        ),
        ("RandomForestClassifier", "small integers (int8)", lambda: fit(trees, numbers("int8")), "", ""),
        ("LogisticRegression", "booleans", lambda: fit(LOGISTIC, flags), "", ""),
        ("RandomForestClassifier", "booleans", lambda: fit(trees, flags), "", ""),
        (
            "RandomForestClassifier",
            "integers, floats and booleans",
            lambda: fit(trees, mixed().drop(columns=["colour", "size"])),
            "",
            "",
        ),
        ("RandomForestRegressor", "times as large numbers", clock, "", ""),
        ("RandomForestClassifier", "dates", lambda: _dated(dates), "day", ""),
        ("LogisticRegression", "no rows", _empty, "train", ""),
    ]
    return [Case(name, "tables", data, make, refused, needs) for name, data, make, refused, needs in rows]


def _dated(dates: pd.DataFrame) -> Fitted:
    made = fit(linear_model.LinearRegression(), dates.assign(day=dates["day"].astype("int64") // 10**15), SUM)
    return Fitted(made.model, dates[::2], dates[1::2])


def _empty() -> Fitted:
    made = fit(LOGISTIC)
    return Fitted(made.model, made.train[:0], made.held_out)
