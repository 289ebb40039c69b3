"""What skl2onnx is taught: converters that it lacks, and those that answer otherwise than the model, mended."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import onnx
from skl2onnx import _supported_operators, update_registered_converter
from skl2onnx.algebra import onnx_ops as ops
from skl2onnx.common import _registration
from skl2onnx.common._topology import Variable
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
from skl2onnx.common.shape_calculator import (
    calculate_linear_classifier_output_shapes,
    calculate_linear_regressor_output_shapes,
)
from skl2onnx.operator_converters import calibrated_classifier_cv
from skl2onnx.operator_converters.linear_classifier import convert_sklearn_linear_classifier
from sklearn.svm import LinearSVC

Convert: TypeAlias = Callable[[Any, Any, Any], None]


@cache
def register() -> None:
    """Teach skl2onnx the converters of onnxmltools, so that boosted trees convert wherever they stand.

    And that scikit-learn's own trees see float32, whatever is computed before them; that counts of words are damped as
    scikit-learn does it; and that isotonic calibration draws lines between its points.
    """

    # Its pool is the one place where a converter of its own can be wrapped; to register it anew would lose its options.
    def mend(alias: str, mended: Callable[[Convert], Convert]) -> None:
        known = _registration._converter_pool[alias]
        _registration._converter_pool[alias] = _registration.RegisteredConverter(mended(known._fct), known._options)

    for name in ("DecisionTree", "ExtraTree", "RandomForest", "ExtraTrees", "GradientBoosting"):
        for role in ("Classifier", "Regressor"):
            mend(f"Sklearn{name}{role}", _exactly)
    mend("SklearnTfidfTransformer", _sublinear)
    calibrated_classifier_cv._transform_isotonic = _isotonic
    # Without it skl2onnx takes no options for whatever stands in front of these.
    linear = {key: [True, False] for key in ("nocl", "output_class_labels", "raw_scores", "zipmap")}
    update_registered_converter(
        LinearSVC,
        "SklearnLinearSVC",
        calculate_linear_classifier_output_shapes,
        convert_sklearn_linear_classifier,
        options=linear,
    )
    choices = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    for family, prefix, name, kinds in (
        ("lightgbm", "LGBM", "LightGbm", ("Classifier", "Regressor", "Ranker")),
        ("xgboost", "XGB", "XGBoost", ("Classifier", "Regressor", "RFClassifier", "RFRegressor", "Ranker")),
    ):
        try:
            module = import_module(family)
        except ImportError:
            continue
        # Which imports the library that it converts, and may do so only where that is there.
        converters = import_module(f"onnxmltools.convert.{family}.operator_converters.{name}")
        convert = getattr(converters, f"convert_{family}")
        for kind in kinds:
            answers_classes = kind.endswith("Classifier")
            update_registered_converter(
                getattr(module, f"{prefix}{kind}"),
                f"{family}{prefix}{kind}",
                calculate_linear_classifier_output_shapes
                if answers_classes
                else calculate_linear_regressor_output_shapes,
                _exactly(convert),
                options=choices | ({"raw_scores": [True, False]} if family == "lightgbm" else {})
                if answers_classes
                else {"split": None},
            )


def answers_raw(model: Any) -> bool:
    """Tell whether the converter of a classifier can be asked for what its decision function says."""
    alias = _supported_operators.sklearn_operator_name_map.get(type(model))
    return alias is not None and "raw_scores" in (_registration._converter_pool[alias]._options or {})


def _exactly(convert: Convert) -> Convert:
    """Make a converter of trees keep to what the trees do.

    Values are float32, thresholds stay on their side, missing values go where they went in training, and zeros of a
    sparse matrix are missing where they are so to XGBoost.
    """

    def converted(scope: Any, operator: Any, container: Any) -> None:
        raw = container.get_options(operator.raw_operator, {"raw_scores": False}, fail=False)
        floored = _Floored(container, _trees(operator.raw_operator), raw=bool(raw and raw.get("raw_scores")))
        version = container.target_opset
        (given,), outputs = operator.inputs, list(operator.outputs)
        if getattr(operator.raw_operator, "zero_is_missing", False):
            number = np.float64 if isinstance(given.type, DoubleTensorType) else np.float32
            zero, missing = (np.array([value], dtype=number) for value in (0, np.nan))
            empty = ops.OnnxEqual(given, zero, op_version=version)
            rows = _variable(scope, given.type)
            ops.OnnxWhere(empty, missing, given, op_version=version, output_names=[rows]).add_to(scope, container)
            given = rows
        if not isinstance(given.type, DoubleTensorType):
            convert(scope, _between(operator, [given], outputs), floored)
            return
        single = _variable(scope, FloatTensorType(given.type.shape))
        to_single = ops.OnnxCast(given, to=onnx.TensorProto.FLOAT, op_version=version, output_names=[single])
        to_single.add_to(scope, container)
        made = [
            _variable(scope, FloatTensorType(output.type.shape))
            if isinstance(output.type, DoubleTensorType)
            else output
            for output in outputs
        ]
        convert(scope, _between(operator, [single], made), floored)
        for output, inner in zip(outputs, made, strict=True):
            if inner is not output:
                wide = ops.OnnxCast(inner, to=onnx.TensorProto.DOUBLE, op_version=version, output_names=[output])
                wide.add_to(scope, container)

    return converted


def _sublinear(convert: Convert) -> Convert:
    """Make the converter of TfidfTransformer damp counts as scikit-learn does: 1 + log(count), and 0 stays 0."""

    def converted(scope: Any, operator: Any, container: Any) -> None:
        model = operator.raw_operator
        if model.sublinear_tf:
            (given,), version = operator.inputs, container.target_opset
            one = np.array([1], dtype=np.float64 if isinstance(given.type, DoubleTensorType) else np.float32)
            logged = ops.OnnxLog(ops.OnnxMax(given, one, op_version=version), op_version=version)
            damped = _variable(scope, given.type)
            least = ops.OnnxMin(given, one, op_version=version)
            ops.OnnxAdd(logged, least, op_version=version, output_names=[damped]).add_to(scope, container)
            operator = _between(operator, [damped], list(operator.outputs))
            operator.raw_operator = copy.copy(model)
            operator.raw_operator.sublinear_tf = False
        convert(scope, operator, container)

    return converted


def _isotonic(  # noqa: PLR0917  as the library calls it
    scope: Any, container: Any, model: Any, scores: str, k: int, dtype: Any, _: int
) -> str:
    """Draw lines between the points of an isotonic regression, in float64; the library's own takes the nearest."""
    points = model.calibrators[k]
    x, y = (np.asarray(v, dtype=np.float64) for v in (points.X_thresholds_, points.y_thresholds_))
    steps = np.diff(x)
    slopes = np.diff(y) / np.where(steps > 0, steps, 1)
    version = {"op_version": container.target_opset}
    kind = (DoubleTensorType if dtype == np.float64 else FloatTensorType)([None, 1])
    column = ops.OnnxReshape(_variable(scope, kind, scores), np.array([-1, 1]), **version)
    past = ops.OnnxSub(ops.OnnxCast(column, to=onnx.TensorProto.DOUBLE, **version), x[None, :-1], **version)
    within = ops.OnnxMin(ops.OnnxMax(past, np.array([0.0]), **version), steps[None], **version)
    line = ops.OnnxAdd(ops.OnnxMatMul(within, slopes[:, None], **version), y[:1], **version)
    element = onnx.TensorProto.DOUBLE if dtype == np.float64 else onnx.TensorProto.FLOAT
    made = _variable(scope, kind)
    ops.OnnxCast(line, to=element, output_names=[made], **version).add_to(scope, container)
    return str(made.onnx_name)


def _variable(scope: Any, kind: Any, name: str | None = None) -> Any:
    """Make a variable of a type of skl2onnx's; name: of a tensor that is there."""
    name = name or scope.get_unique_variable_name("mended")
    return Variable(name, name, scope.name, kind)


def _between(operator: Any, inputs: list[Any], outputs: list[Any]) -> Any:
    """Copy an operator of skl2onnx, with other variables at its ends."""
    made = copy.copy(operator)
    vars(made).update(inputs=inputs, outputs=outputs)  # by their names they would be tied to it
    return made


def _trees(model: Any) -> list[Any]:
    """List the trees of scikit-learn's that one node holds in this order."""
    if type(model).__name__.startswith("GradientBoosting") or getattr(model, "n_outputs_", 1) > 1:
        return []
    return [one.tree_ for one in getattr(model, "estimators_", [model]) if hasattr(one, "tree_")]


class _Floored:
    """A container of skl2onnx that rounds thresholds down to float32, and knows where `trees` send missing values.

    LightGBM asks `x <= threshold` in float64. For an x of float32 the greatest float32 below asks the same, and the
    nearest, which its converter takes, may lie above.
    """

    def __init__(self, container: Any, trees: list[Any], *, raw: bool) -> None:
        self._container = container
        self._trees = trees
        self._raw = raw

    def add_node(self, op_type: str, *ends: Any, **attributes: Any) -> None:
        if op_type.startswith("TreeEnsemble") and "nodes_values" in attributes:
            if self._raw:
                attributes["post_transform"] = "NONE"
            values = np.asarray(attributes["nodes_values"], dtype=np.float64)
            singles = values.astype(np.float32)
            above = (singles > values) & (np.asarray(attributes["nodes_modes"]) == "BRANCH_LEQ")
            if self._trees:
                places = zip(attributes["nodes_treeids"], attributes["nodes_nodeids"], strict=True)
                left = [int(self._trees[tree].missing_go_to_left[node]) for tree, node in places]
                attributes["nodes_missing_value_tracks_true"] = left
            attributes["nodes_values"] = np.where(above, np.nextafter(singles, np.float32(-np.inf)), singles).tolist()
        self._container.add_node(op_type, *ends, **attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)
