"""The one way in which an export is refused: which step, why, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serving.errors import ServingError

_WORDS = "use analyzer='word' or 'char', without strip_accents, and without a tokenizer or preprocessor of your own"
_WITHIN = "put the ColumnTransformer or vectorizer in front of it, and not into what it has"
_HISTOGRAMS = "put an OrdinalEncoder in front, and leave categorical_features out"
_UNLIKE = {
    "HistGradientBoostingClassifier": _HISTOGRAMS,
    "HistGradientBoostingRegressor": f"{_HISTOGRAMS}; for counts use LGBMRegressor(objective='poisson'), or fit it on "
    "the logarithm of the target",
    **dict.fromkeys(
        ("LGBMClassifier", "LGBMRegressor"),
        "fit it with boosting_type='gbdt' and one of LightGBM's own objectives, and without linear_tree",
    ),
    **dict.fromkeys(
        ("XGBClassifier", "XGBRegressor", "XGBRFClassifier", "XGBRFRegressor"),
        "fit it with booster='gbtree' on one target (MultiOutputRegressor or MultiOutputClassifier take several), and "
        "for probabilities use XGBClassifier",
    ),
    **dict.fromkeys(
        ("CatBoostClassifier", "CatBoostRegressor"),
        "put it last in the pipeline, with nothing around it but a search, and fit it without cat_features on one "
        "target, with the loss RMSE, Logloss or MultiClass",
    ),
    "CalibratedClassifierCV": f"{_WITHIN}; calibrate by 'sigmoid' or 'isotonic'",
    "OneVsRestClassifier": "for several targets use MultiOutputClassifier",
}
"""What helps where converters leave out in silence what some options do."""
_INSTEAD = _UNLIKE | {
    "FunctionTransformer": "a graph holds no Python: do it to the columns before fit and before each request, or use a "
    "transformer of scikit-learn's own (PowerTransformer for logarithms, for instance)",
    "HashingVectorizer": "use CountVectorizer or TfidfVectorizer",
    "CountVectorizer": _WORDS,
    "TfidfVectorizer": _WORDS,
    "OneHotEncoder": "make its numbers whole numbers (astype(int)) or strings before fit",
    "SimpleImputer": "fill strings and numbers in steps of their own",
    "TransformedTargetRegressor": "fit its regressor on the transformed target, and undo that where the answer is read",
    "StackingClassifier": _WITHIN,
    "StackingRegressor": _WITHIN,
    "DBSCAN": "it can't predict new rows: use KMeans",
    "NearestCentroid": "use KNeighborsClassifier",
    "CategoricalNB": "use OneHotEncoder and BernoulliNB",
    "OutputCodeClassifier": "use OneVsRestClassifier",
    "ClassifierChain": "use MultiOutputClassifier",
    "RegressorChain": "use MultiOutputRegressor",
    "DummyClassifier": "use LogisticRegression on a constant column",
    "DummyRegressor": "use LinearRegression on a constant column",
    "EllipticEnvelope": "use IsolationForest",
    "LocalOutlierFactor": "use IsolationForest",
    "NMF": "use TruncatedSVD or PCA",
    "SplineTransformer": "use KBinsDiscretizer or PolynomialFeatures",
    "Nystroem": "use SVC or KernelPCA, which hold their own kernels",
}


class CannotExport(ServingError):
    """A model or a table that has no ONNX form here: `where` it fails, `why`, and what to write `instead`."""

    def __init__(self, where: str, why: str, instead: str) -> None:
        super().__init__(f"{where}: {why}. Instead: {instead}.")
        self.where, self.why, self.instead = where, why, instead


def one_line(error: Exception) -> str:
    """Write what an error says in one line, not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def known_remedy(model: Any) -> str:
    """Say what to write instead of what a step whose file answers otherwise has in it; "" where nothing is known."""
    kinds = (type(part).__name__ for _, part in parts(model))
    found = {kind: _UNLIKE[kind] for kind in kinds if kind in _UNLIKE}
    return "; ".join(f"{kind}: {instead}" if len(found) > 1 else instead for kind, instead in found.items())


def parts(model: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Walk a fitted model: itself and every estimator within, each with the name of its step."""
    seen: set[int] = set()
    waiting = [(name or type(model).__name__.lower(), model)]
    while waiting:
        step, part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if type(part).__name__ == "_CalibratedClassifier":  # no estimator itself
            waiting.append((step, part.estimator))
        elif hasattr(part, "get_params") and not isinstance(part, type):
            yield step, part
            own = vars(part).items()
            waiting += [(step if key.endswith("_") or key == "steps" else key, value) for key, value in own]
        elif isinstance(part, tuple) and part and isinstance(part[0], str):
            waiting += [(part[0], value) for value in part[1:]]
        elif isinstance(part, list | tuple) and len(part) < 10_000:
            waiting += [(step, value) for value in part if not isinstance(value, str | bytes | int | float)]
        elif isinstance(part, dict):
            waiting += [(key if isinstance(key, str) else step, value) for key, value in part.items()]


def step_of(model: Any, part: Any) -> str:
    """Name a part of a model as its author did: "step 'scale' (StandardScaler)"."""
    kind = type(part).__name__
    name = next((step for step, found in parts(model) if found is part), None)
    if name is None:  # a copy, or a part made on the way: the first of its kind
        name = next((step for step, found in parts(model) if type(found) is type(part)), kind.lower())
    return f"step {name!r} ({kind})"


def refused(model: Any, error: Exception) -> CannotExport:
    """Make the refusal of what a converter raised: its text in one line, and the step that it was at."""
    part = next((part for _, part in parts(model) if str(type(part)) in str(error)), _at(error))
    part = model if part is None else part
    text = one_line(error).split(" You may raise an issue")[0].split(" It usually means")[0].split(" Stack trace:")[0]
    if text.startswith("<class ") or ("Unable to find" in text and "column name" not in text):
        text = "no converter knows it"
    unknown = "replace or leave out this step, or do it before the model; docs/converts.md lists what converts"
    instead = _INSTEAD.get(type(part).__name__, unknown)
    return CannotExport(step_of(model, part), f"can't be converted: {text}", instead)


def _at(error: Exception) -> Any:
    """Find the estimator that a converter was at: its functions call it by the name `operator` or `model`."""
    # Most errors of converters name no step: only the frames that they came through know which it was.
    found = None
    trace = error.__traceback__
    while trace is not None:
        operator = trace.tb_frame.f_locals.get("operator", trace.tb_frame.f_locals.get("self"))
        raw = getattr(operator, "raw_operator", None)
        found = raw if raw is not None else found
        trace = trace.tb_next
    return found
