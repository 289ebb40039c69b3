"""What skl2onnx is taught: converters that it lacks, and those that answer otherwise than the model, mended."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import onnx

Convert: TypeAlias = Callable[[Any, Any, Any], None]


@cache
def register() -> None:
    """Teach skl2onnx the converters of onnxmltools, so that boosted trees convert wherever they stand.

    And that scikit-learn's own trees see float32, whatever is computed before them; that counts of words are damped as
    scikit-learn does it; and that isotonic calibration draws lines between its points.
    """
    from skl2onnx import update_registered_converter  # noqa: PLC0415
    from skl2onnx.common import _registration  # noqa: PLC0415
    from skl2onnx.common.shape_calculator import (  # noqa: PLC0415
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )
    from skl2onnx.operator_converters import calibrated_classifier_cv  # noqa: PLC0415
    from skl2onnx.operator_converters.linear_classifier import convert_sklearn_linear_classifier  # noqa: PLC0415
    from sklearn.svm import LinearSVC  # noqa: PLC0415

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
    from skl2onnx import _supported_operators  # noqa: PLC0415
    from skl2onnx.common import _registration  # noqa: PLC0415

    alias = _supported_operators.sklearn_operator_name_map.get(type(model))
    return alias is not None and "raw_scores" in (_registration._converter_pool[alias]._options or {})


def _exactly(convert: Convert) -> Convert:
    """Make a converter of trees keep to what the trees do.

    Values are float32, thresholds stay on their side, missing values go where they went in training, and zeros of a
    sparse matrix are missing where they are so to XGBoost.
    """

    def converted(scope: Any, operator: Any, container: Any) -> None:
        from skl2onnx.common.data_types import DoubleTensorType  # noqa: PLC0415

        raw = container.get_options(operator.raw_operator, {"raw_scores": False}, fail=False)
        floored = _Floored(container, _trees(operator.raw_operator), raw=bool(raw and raw.get("raw_scores")))
        if getattr(operator.raw_operator, "zero_is_missing", False):
            given = operator.inputs[0]
            names = [scope.get_unique_variable_name(f"sparse_{part}") for part in ("zero", "nan", "at", "rows")]
            element = onnx.TensorProto.DOUBLE if isinstance(given.type, DoubleTensorType) else onnx.TensorProto.FLOAT
            container.add_initializer(names[0], element, [1], [0.0])
            container.add_initializer(names[1], element, [1], [float("nan")])
            container.add_node("Equal", [given.full_name, names[0]], [names[2]])
            container.add_node("Where", [names[2], names[1], given.full_name], [names[3]])
            operator = _Renamed(operator, [_Single(names[3], given, given.type)], operator.outputs)
        if not isinstance(operator.inputs[0].type, DoubleTensorType):
            convert(scope, operator, floored)
            return
        single = _Single(scope.get_unique_variable_name("single"), operator.inputs[0])
        container.add_node("Cast", [operator.inputs[0].full_name], [single.full_name], to=onnx.TensorProto.FLOAT)
        outputs = [_Single(scope.get_unique_variable_name("of_single"), variable) for variable in operator.outputs]
        convert(scope, _Renamed(operator, [single], outputs), floored)
        for output, inner in zip(operator.outputs, outputs, strict=True):
            double = isinstance(output.type, DoubleTensorType)
            kind, more = ("Cast", {"to": onnx.TensorProto.DOUBLE}) if double else ("Identity", {})
            container.add_node(kind, [inner.full_name], [output.full_name], **more)

    return converted


def _sublinear(convert: Convert) -> Convert:
    """Make the converter of TfidfTransformer damp counts as scikit-learn does: 1 + log(count), and 0 stays 0."""

    def converted(scope: Any, operator: Any, container: Any) -> None:
        model = operator.raw_operator
        if model.sublinear_tf:
            model, given = copy.copy(model), operator.inputs[0]
            model.sublinear_tf = False
            one, least, logged, most, damped = (scope.get_unique_variable_name(f"damped_{i}") for i in range(5))
            container.add_initializer(one, given.type.to_onnx_type().tensor_type.elem_type, [1], [1.0])
            container.add_node("Max", [given.full_name, one], [least], op_version=13)
            container.add_node("Log", [least], [logged])
            container.add_node("Min", [given.full_name, one], [most], op_version=13)
            container.add_node("Add", [logged, most], [damped])
            operator = _Renamed(operator, [_Single(damped, given, given.type)], operator.outputs)
            operator.raw_operator = model
        convert(scope, operator, container)

    return converted


def _isotonic(  # noqa: PLR0917  as the library calls it
    scope: Any, container: Any, model: Any, scores: str, k: int, dtype: Any, _: int
) -> str:
    """Draw lines between the points of an isotonic regression, in float64; the library's own takes the nearest."""
    points = model.calibrators[k]
    x, y = (np.asarray(v, dtype=np.float64) for v in (points.X_thresholds_, points.y_thresholds_))
    steps = np.diff(x)
    names: dict[str, str] = {
        part: scope.get_unique_variable_name(f"isotonic_{part}")
        for part in ("from", "to", "zero", "slope", "least", "rows", "x", "past", "up", "within", "rise", "y", "out")
    }
    double = onnx.TensorProto.DOUBLE
    slopes = np.diff(y) / np.where(steps > 0, steps, 1)
    for part, shape, values in (
        ("from", [1, len(steps)], x[:-1]),
        ("to", [1, len(steps)], steps),
        ("zero", [1], [0.0]),
        ("slope", [len(steps), 1], slopes),
        ("least", [1], y[:1]),
    ):
        container.add_initializer(names[part], double, shape, values)
    container.add_initializer(names["rows"], onnx.TensorProto.INT64, [2], [-1, 1])
    column = scope.get_unique_variable_name("isotonic_column")
    container.add_node("Reshape", [scores, names["rows"]], [column], op_version=13)
    for operator, given, made, options in (
        ("Cast", [column], "x", {"to": double}),
        ("Sub", [names["x"], names["from"]], "past", {}),
        ("Max", [names["past"], names["zero"]], "up", {}),
        ("Min", [names["up"], names["to"]], "within", {}),
        ("MatMul", [names["within"], names["slope"]], "rise", {}),
        ("Add", [names["rise"], names["least"]], "y", {}),
        ("Cast", [names["y"]], "out", {"to": double if dtype == np.float64 else onnx.TensorProto.FLOAT}),
    ):
        container.add_node(operator, given, [names[made]], op_version=13, **options)
    return names["out"]


class _Single:
    """A variable of skl2onnx by another name, with float32 for float64."""

    def __init__(self, name: str, variable: Any, kept: Any = None) -> None:
        from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType  # noqa: PLC0415

        self.full_name = self.onnx_name = self.raw_name = name
        kind = variable.type
        self.type = kept or (FloatTensorType(kind.shape) if isinstance(kind, DoubleTensorType) else kind)


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


class _Renamed:
    """An operator of skl2onnx, with other variables at its ends."""

    def __init__(self, operator: Any, inputs: list[_Single], outputs: list[_Single]) -> None:
        self._operator = operator
        self.inputs = inputs
        self.outputs = outputs
        self.input_full_names = [variable.full_name for variable in inputs]
        self.output_full_names = [variable.full_name for variable in outputs]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)
