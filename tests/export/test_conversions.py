"""What converts, in short: one of each kind of `cases`; `python -m tests.export.conversions` tries all of them."""

from __future__ import annotations

import pytest

from tests.export.cases import cases
from tests.export.conversions import faults, outcomes
from tests.export.fitted import Case

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the converters' own deprecations are not ours to mend
    pytest.mark.timeout(400),  # the first test waits for all of them
]

CHOSEN = {
    "floats": [
        "SGDClassifier(hinge)",
        "CalibratedClassifierCV(LinearSVC)",
        "VotingClassifier(soft)",
        "VotingClassifier(hard)",
        "QuadraticDiscriminantAnalysis",
        "KMeans",
        "PCA",
        "KNNImputer",
        "KBinsDiscretizer(onehot)",
        "GaussianMixture",
        "DBSCAN",
        "ColumnTransformer by name",
        "PCA in a pipeline",
        "FunctionTransformer(log1p)",
        "a step of one's own",
        "SimpleImputer(add_indicator)",
        "LinearSVC, two classes",
        "SVC, two classes",
        "RandomForestClassifier, booleans",
        "LinearSVC, booleans",
        "LogisticRegression, integers from 5",
        "MultiOutputClassifier",
        "RandomForestClassifier of two targets",
        "CalibratedClassifierCV(isotonic) of a pipeline",
        "CalibratedClassifierCV of a FrozenEstimator",
        "CalibratedClassifierCV(LGBM), two classes",
        "VotingClassifier(weights)",
        "MultiOutputClassifier, booleans",
        "LinearDiscriminantAnalysis, two classes",
        "RandomizedSearchCV of a pipeline",
        "a pipeline with a step passed through",
        "ColumnTransformer by mask",
        "ColumnTransformer by a slice of names",
        "TunedThresholdClassifierCV",
        "LGBMClassifier(rf)",
        "xgboost.Booster(multi:softmax)",
        "xgboost.Booster(binary:logistic)",
        "lightgbm.Booster of categories",
    ],
    "missing numbers": ["RandomForestClassifier", "SimpleImputer of a column without values"],
    "DataFrame": [
        "XGBClassifier",
        "lightgbm.Booster(binary)",
        "xgboost.Booster",
        "StandardScaler, XGBClassifier",
        "StandardScaler, LGBMClassifier",
        "StandardScaler, XGBClassifier, double=True",
        "VotingClassifier(soft) of XGB and LGBM",
        "MultiOutputRegressor(XGB)",
    ],
    "pandas categories": ["XGBClassifier", "GridSearchCV of LGBMClassifier", "VotingClassifier of XGBClassifiers"],
    "categories with missing values": ["LGBMClassifier"],
    "categories of integers": ["LGBMRegressor"],
    "strings, numbers, integers, booleans": [
        "ColumnTransformer, XGBClassifier",
        "OneHotEncoder(error)",
        "OneHotEncoder of integers and booleans",
        "HistGradientBoosting(categorical_features)",
    ],
    "strings, missing as NaN": ["SimpleImputer(most_frequent)", "OneHotEncoder"],
    "strings, missing as None": ["SimpleImputer(constant)"],
    "strings, missing as pd.NA": ["SimpleImputer(most_frequent)"],
    "pandas' Int64 with pd.NA": ["SimpleImputer(mean)"],
    "strings, both empty and missing": ["OneHotEncoder"],
    "one column of texts": [
        "CountVectorizer",
        "TfidfVectorizer, LinearSVC",
        "HashingVectorizer",
        "TfidfVectorizer(sublinear_tf)",
        "TfidfVectorizer(token_pattern)",
        "CountVectorizer, XGBClassifier",
        "CalibratedClassifierCV of a pipeline of texts",
    ],
    "a column of texts beside numbers": ["ColumnTransformer(TfidfVectorizer)"],
    "numpy": ["LogisticRegression"],
    "polars": ["LogisticRegression"],
    "a Series of texts": ["TfidfVectorizer"],
    "held-out columns in another order": ["LogisticRegression"],
    "integers": ["RandomForestClassifier"],
    "booleans": ["RandomForestClassifier"],
    "dates": ["RandomForestClassifier"],
    "no rows": ["LogisticRegression"],
}


@pytest.fixture(scope="module")
def tried() -> dict[tuple[str, str], list[str]]:
    """Try them all on one server: what came out otherwise than it should."""
    chosen = [case for case in cases() if case.name in CHOSEN.get(case.data, ())]
    assert len(chosen) == sum(len(names) for names in CHOSEN.values())
    return {(case.data, case.name): faults([(case, came, text)]) for case, came, text in outcomes(chosen)}


@pytest.mark.parametrize(("data", "name"), [(data, name) for data, names in CHOSEN.items() for name in names])
def test_what_converts_serves_as_the_original_answers(
    data: str, name: str, tried: dict[tuple[str, str], list[str]]
) -> None:
    """One of each kind is served and answers its example and held-out rows as it did, or is refused with its step."""
    assert tried[data, name] == []


def test_every_case_is_tried_once() -> None:
    """No two lines of the table are the same."""

    def line(case: Case) -> tuple[str, str, str]:
        return case.group, case.name, case.data

    assert len({line(case) for case in cases()}) == len(cases())
