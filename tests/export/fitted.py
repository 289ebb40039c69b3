"""The tables and the scikit-learn models that `cases` fits and exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from sklearn import (
    calibration,
    cluster,
    compose,
    covariance,
    cross_decomposition,
    decomposition,
    discriminant_analysis,
    dummy,
    ensemble,
    feature_selection,
    gaussian_process,
    kernel_approximation,
    linear_model,
    mixture,
    model_selection,
    multiclass,
    naive_bayes,
    neighbors,
    neural_network,
    preprocessing,
    svm,
    tree,
)
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.impute import KNNImputer
from sklearn.pipeline import make_pipeline


@dataclass(frozen=True)
class Fitted:
    """A fitted model, rows it saw, rows it did not, and what `export` is told besides."""

    model: Any
    train: Any
    held_out: Any
    options: dict[str, Any] = field(default_factory=dict)
    ask: Callable[[Any], Any] | None = None
    """What the original says of rows, where that is none of its own methods."""


@dataclass(frozen=True)
class Case:
    """One export: what is fitted on what, and whether it converts."""

    name: str
    group: str
    data: str
    fit: Callable[[], Fitted]
    refused: str = ""
    """What the refusal's text must have in it, where the model can't be converted."""
    needs: str = ""
    """A package that is not among the project's own."""


RANDOM = np.random.default_rng(0)
ROWS = 160
NAMES = ["width (cm)", "height", "depth", "weight/kg"]
COLOURS = np.array(["red", "green", "blue"])


def numbers(dtype: str = "float32") -> pd.DataFrame:
    """Make measurements; whole ones where the type is one of integers."""
    values = np.random.default_rng(1).normal(5, 2, (ROWS, 4)).clip(0.25)
    return pd.DataFrame((values * 8).round() / (1 if "int" in dtype.lower() else 8), columns=NAMES).astype(dtype)


NUMBERS = numbers()
SUM = NUMBERS.sum(axis=1).to_numpy() + NUMBERS["depth"].to_numpy() ** 2 / 4
THREE = np.digitize(SUM, np.quantile(SUM, [0.3, 0.7]))
TWO = (np.median(SUM) < SUM).astype(int)
WORDS = np.array(["low", "mid", "top"])[THREE]


def holes(table: pd.DataFrame, missing: Any = np.nan) -> pd.DataFrame:
    """Take some values out of each column."""
    out = table.copy()
    for index, name in enumerate(out.columns):
        out.loc[(np.arange(len(out)) + index) % 9 == 0, name] = missing
    return out


def mixed(missing: Any = "none", dtype: Any = object) -> pd.DataFrame:
    """Make a table of strings, floats, integers and booleans; `missing` is put into its strings and floats."""
    table = NUMBERS.iloc[:, 1:3].copy()
    table.insert(0, "colour", pd.Series(COLOURS[np.arange(ROWS) % 3], dtype=object))
    table["size"] = pd.Series(np.array(["S", "M", "L", "XL"])[(np.arange(ROWS) // 3) % 4], dtype=object)
    table["rooms"] = np.arange(ROWS) % 5 + 1
    table["sea view"] = np.arange(ROWS) % 7 < 3
    if not (isinstance(missing, str) and missing == "none"):
        table.loc[np.arange(ROWS) % 8 == 0, "colour"] = missing
        table.loc[np.arange(ROWS) % 9 == 0, "height"] = np.nan
    return table.astype({"colour": dtype, "size": dtype})


def fit(model: Any, table: Any = None, target: Any = THREE, **options: Any) -> Fitted:
    """Fit on even rows, and keep the odd ones."""
    table = NUMBERS if table is None else table
    half = [table.iloc[s] if hasattr(table, "iloc") else table[s] for s in (slice(None, None, 2), slice(1, None, 2))]
    even = target if target is None else target[::2]
    model = clone(model) if "catboost" not in type(model).__module__ else model
    return Fitted(model.fit(half[0], even) if even is not None else model.fit(half[0]), *half, options)


def columns(*steps: Any, **options: Any) -> Any:
    """Make a ColumnTransformer of the usual two halves, or of what is given."""
    return compose.make_column_transformer(*steps, **options)


TEXTS = [
    f"{a} {b} {c} {a}"
    for a in ("red", "Green", "blue")
    for b in ("apple", "pear", "plum pudding")
    for c in ("for sale", "sold out", "tomorrow")
] * 6
TOPICS = np.array([["apple", "pear", "plum"].index(text.split()[1]) for text in TEXTS])
TEXT_TABLE = pd.DataFrame({"text": TEXTS, "price": np.arange(len(TEXTS), dtype="float32") % 7})


def fit_texts(*steps: Any) -> Fitted:
    """Fit a pipeline on a list of texts; the table's only column is that list."""
    model = clone(make_pipeline(*steps)).fit(TEXTS[::2], TOPICS[::2])
    return Fitted(model, TEXT_TABLE[["text"]][::2], TEXT_TABLE[["text"]][1::2])


class Doubling(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A user's own step."""

    def fit(self, x: Any, y: Any = None) -> Doubling:
        self.n_features_in_ = x.shape[1]
        return self

    def transform(self, x: Any) -> Any:
        return np.asarray(x) * 2


def classifiers() -> dict[str, Any]:
    """Make scikit-learn's classifiers, of three classes."""
    logistic = linear_model.LogisticRegression(max_iter=500)
    trees = tree.DecisionTreeClassifier(max_depth=3, random_state=0)
    return {
        "LogisticRegression": logistic,
        "LogisticRegressionCV": linear_model.LogisticRegressionCV(
            Cs=2, cv=2, max_iter=500, use_legacy_attributes=False, l1_ratios=(0,)
        ),
        "RidgeClassifier": linear_model.RidgeClassifier(),
        "SGDClassifier(hinge)": linear_model.SGDClassifier(random_state=0),
        "SGDClassifier(log_loss)": linear_model.SGDClassifier(loss="log_loss", random_state=0),
        "Perceptron": linear_model.Perceptron(random_state=0),
        "LinearSVC": svm.LinearSVC(),
        "SVC": svm.SVC(),
        "NuSVC": svm.NuSVC(nu=0.2),
        "KNeighborsClassifier": neighbors.KNeighborsClassifier(),
        "NearestCentroid": neighbors.NearestCentroid(),
        "GaussianNB": naive_bayes.GaussianNB(),
        "BernoulliNB": naive_bayes.BernoulliNB(binarize=5.0),
        "MultinomialNB": naive_bayes.MultinomialNB(),
        "ComplementNB": naive_bayes.ComplementNB(),
        "LinearDiscriminantAnalysis": discriminant_analysis.LinearDiscriminantAnalysis(),
        "QuadraticDiscriminantAnalysis": discriminant_analysis.QuadraticDiscriminantAnalysis(),
        "DecisionTreeClassifier": trees,
        "ExtraTreeClassifier": tree.ExtraTreeClassifier(max_depth=4, random_state=0),
        "RandomForestClassifier": ensemble.RandomForestClassifier(5, random_state=0),
        "ExtraTreesClassifier": ensemble.ExtraTreesClassifier(5, random_state=0),
        "GradientBoostingClassifier": ensemble.GradientBoostingClassifier(n_estimators=5),
        "HistGradientBoostingClassifier": ensemble.HistGradientBoostingClassifier(max_iter=5),
        "AdaBoostClassifier": ensemble.AdaBoostClassifier(n_estimators=5, random_state=0),
        "BaggingClassifier": ensemble.BaggingClassifier(n_estimators=3, random_state=0),
        "MLPClassifier": neural_network.MLPClassifier((5,), max_iter=30, random_state=0),
        "CalibratedClassifierCV(LinearSVC)": calibration.CalibratedClassifierCV(svm.LinearSVC(), cv=2),
        "CalibratedClassifierCV(isotonic)": calibration.CalibratedClassifierCV(trees, method="isotonic", cv=2),
        "VotingClassifier(soft)": ensemble.VotingClassifier([("a", logistic), ("b", trees)], voting="soft"),
        "VotingClassifier(hard)": ensemble.VotingClassifier([("a", logistic), ("b", trees)]),
        "StackingClassifier": ensemble.StackingClassifier([("a", logistic), ("b", trees)], cv=2),
        "OneVsRestClassifier": multiclass.OneVsRestClassifier(logistic),
        "OneVsOneClassifier": multiclass.OneVsOneClassifier(logistic),
        "OutputCodeClassifier": multiclass.OutputCodeClassifier(logistic, random_state=0),
        "GaussianProcessClassifier": gaussian_process.GaussianProcessClassifier(optimizer=None),
        "GridSearchCV(RandomForestClassifier)": model_selection.GridSearchCV(
            ensemble.RandomForestClassifier(3, random_state=0), {"max_depth": [2, 3]}, cv=2
        ),
        "DummyClassifier": dummy.DummyClassifier(),
    }


def regressors() -> dict[str, Any]:
    """Make scikit-learn's regressors."""
    trees = tree.DecisionTreeRegressor(max_depth=3, random_state=0)
    linear = linear_model.LinearRegression()
    return {
        "LinearRegression": linear,
        "Ridge": linear_model.Ridge(),
        "Lasso": linear_model.Lasso(0.01),
        "ElasticNet": linear_model.ElasticNet(0.01),
        "BayesianRidge": linear_model.BayesianRidge(),
        "HuberRegressor": linear_model.HuberRegressor(max_iter=1000),
        "QuantileRegressor": linear_model.QuantileRegressor(),
        "PoissonRegressor": linear_model.PoissonRegressor(max_iter=1000),
        "GammaRegressor": linear_model.GammaRegressor(max_iter=1000),
        "TweedieRegressor": linear_model.TweedieRegressor(power=1.5, max_iter=1000),
        "RANSACRegressor": linear_model.RANSACRegressor(random_state=0),
        "SVR": svm.SVR(),
        "LinearSVR": svm.LinearSVR(max_iter=20000),
        "KNeighborsRegressor": neighbors.KNeighborsRegressor(),
        "DecisionTreeRegressor": trees,
        "RandomForestRegressor": ensemble.RandomForestRegressor(5, random_state=0),
        "ExtraTreesRegressor": ensemble.ExtraTreesRegressor(5, random_state=0),
        "GradientBoostingRegressor": ensemble.GradientBoostingRegressor(n_estimators=5),
        "HistGradientBoostingRegressor": ensemble.HistGradientBoostingRegressor(max_iter=5),
        "AdaBoostRegressor": ensemble.AdaBoostRegressor(n_estimators=3, random_state=0),
        "BaggingRegressor": ensemble.BaggingRegressor(n_estimators=3, random_state=0),
        "MLPRegressor": neural_network.MLPRegressor(hidden_layer_sizes=(5,), max_iter=30, random_state=0),
        "GaussianProcessRegressor": gaussian_process.GaussianProcessRegressor(alpha=0.1),
        "PLSRegression": cross_decomposition.PLSRegression(2),
        "VotingRegressor": ensemble.VotingRegressor([("a", linear), ("b", trees)]),
        "StackingRegressor": ensemble.StackingRegressor([("a", linear), ("b", trees)], cv=2),
        "TransformedTargetRegressor": compose.TransformedTargetRegressor(linear, func=np.log1p, inverse_func=np.expm1),
        "DummyRegressor": dummy.DummyRegressor(),
    }


def transformers() -> dict[str, Any]:
    """Make what answers with something else than a prediction: clusters, components, bins, outliers."""
    return {
        "KMeans": cluster.KMeans(3, n_init=1, random_state=0),
        "MiniBatchKMeans": cluster.MiniBatchKMeans(3, n_init=1, random_state=0),
        "GaussianMixture": mixture.GaussianMixture(2, random_state=0),
        "IsolationForest": ensemble.IsolationForest(n_estimators=5, random_state=0),
        "OneClassSVM": svm.OneClassSVM(),
        "LocalOutlierFactor": neighbors.LocalOutlierFactor(novelty=True),
        "EllipticEnvelope": covariance.EllipticEnvelope(random_state=0),
        "DBSCAN": cluster.DBSCAN(),
        "PCA": decomposition.PCA(2),
        "PCA(whiten)": decomposition.PCA(2, whiten=True),
        "TruncatedSVD": decomposition.TruncatedSVD(2, random_state=0),
        "FastICA": decomposition.FastICA(2, whiten="unit-variance", random_state=0, max_iter=2000),
        "NMF": decomposition.NMF(2, max_iter=500),
        "KernelPCA": decomposition.KernelPCA(2, kernel="rbf"),
        "StandardScaler": preprocessing.StandardScaler(),
        "MinMaxScaler": preprocessing.MinMaxScaler(),
        "RobustScaler": preprocessing.RobustScaler(),
        "MaxAbsScaler": preprocessing.MaxAbsScaler(),
        "Normalizer": preprocessing.Normalizer(),
        "Binarizer": preprocessing.Binarizer(threshold=5),
        "PolynomialFeatures": preprocessing.PolynomialFeatures(2),
        "PowerTransformer": preprocessing.PowerTransformer(),
        "QuantileTransformer": preprocessing.QuantileTransformer(n_quantiles=20),
        "SplineTransformer": preprocessing.SplineTransformer(),
        "KBinsDiscretizer(ordinal)": preprocessing.KBinsDiscretizer(
            4, encode="ordinal", quantile_method="averaged_inverted_cdf"
        ),
        "KBinsDiscretizer(onehot)": preprocessing.KBinsDiscretizer(
            4, encode="onehot-dense", quantile_method="averaged_inverted_cdf"
        ),
        "SelectKBest": feature_selection.SelectKBest(k=2),
        "VarianceThreshold": feature_selection.VarianceThreshold(),
        "Nystroem": kernel_approximation.Nystroem(n_components=5, random_state=0),
        "KNNImputer": KNNImputer(),
    }
