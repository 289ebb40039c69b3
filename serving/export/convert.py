"""Converts fitted models to ONNX with clean names: which converter takes what is known here and nowhere else."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from serving.engine.signature import Feature
from serving.export.adapt import adapted, nameless, options_of
from serving.export.graph import (
    Entrance,
    accept_image,
    cast_output,
    name_alike,
    plain_outputs,
    rename,
    reshape_label,
    split_targets,
    swap_columns,
)
from serving.export.original import Original
from serving.export.refusal import CannotExport, parts, refused

# Isolation forests and some scalers convert only up to the first; KNNImputer wants more. onnxruntime runs them all.
OPSETS = ({"": 17, "ai.onnx.ml": 3}, {"": 18, "ai.onnx.ml": 3})

BY_COLUMN = ("ColumnTransformer", "OneHotEncoder", "OrdinalEncoder", "TargetEncoder")
"""Steps that treat columns apart: they get each with its own type."""

Codes = Mapping[str, Mapping[Any, float]]


def layout_of(model: Any, features: Sequence[Feature]) -> Literal["matrix", "columns"]:
    """Choose one matrix for a table of numbers, or one input a column where they are of different kinds."""
    if len(features) == 1 or any(feature.datatype == "BYTES" or feature.categories for feature in features):
        return "columns"
    return "columns" if any(type(part).__name__ in BY_COLUMN for _, part in parts(model)) else "matrix"


def to_onnx(
    model: Any,
    original: Original,
    features: Sequence[Feature],
    *,
    layout: Literal["matrix", "columns"],
    codes: Codes,
    double: bool,
    image: tuple[str, tuple[int, ...]] | None,
) -> onnx.ModelProto:
    """Convert a fitted model: one matrix input `features`, or one input a column, and outputs named as `original` has.

    codes: numbers of the categories of columns that the model takes as numbers. Raises CannotExport.
    """
    family = type(model).__module__.split(".")[0]
    if double and family in ("lightgbm", "xgboost", "catboost"):
        raise CannotExport(type(model).__name__, "its converter knows no float64", "export it with double=False")
    register()
    try:
        made = adapted(model)
        if family == "catboost":
            proto = _catboost(made)
        elif type(model).__name__ == "Booster":
            proto = _booster(made, family, len(features))
        else:
            proto = _sklearn(made, features, layout=layout, codes=codes, double=double)
    except CannotExport:
        raise
    except Exception as error:
        raise refused(model, error) from error
    plain_outputs(proto)
    _name(proto, original, layout)
    if image is not None:
        accept_image(proto, *image)
    elif layout == "columns":
        entrance = Entrance(proto)
        outputs = {port.name for port in proto.graph.output}
        for feature in features:
            # The tensor of a column that is called like an output has a name of its own; callers see the feature's.
            name = f"{feature.name}_" if feature.name in outputs else feature.name
            entrance.add(name, feature.datatype, codes.get(feature.name))
        entrance.close()
    name_alike(proto)
    return proto


def _name(proto: onnx.ModelProto, original: Original, layout: str) -> None:
    """Name inputs and outputs, leave out outputs that the original does not have, and answer in its types."""
    inner = [port.name for port in proto.graph.input]
    names = ["features"] if layout == "matrix" else [f"{name}_column" for name in inner]
    outputs = [port.name for port in proto.graph.output]
    del proto.graph.output[len(original.answers) if original.targets is None else len(outputs) :]
    wanted = list(original.answers)
    if len(outputs) > 2:
        wanted = ["label", *(f"probabilities_{index}" for index in range(len(outputs) - 1))]
    rename(proto, dict(zip(inner, names, strict=True)) | dict(zip(outputs, wanted, strict=False)))
    if original.targets is not None and len(outputs) == 2:
        split_targets(proto, "probabilities", [len(classes) for classes in original.targets])
    single = original.targets is None and wanted[0] == "label"
    if single and len(proto.graph.output[0].type.tensor_type.shape.dim) != 1:
        reshape_label(proto)
    if (
        "scores" in wanted
        and original.classes is not None
        and len(original.classes) == 2
        and original.is_a("SVC", "NuSVC")
    ):
        swap_columns(proto, wanted[1])  # its converter shows the margin of the second class as the first's
    if original.boolean:
        cast_output(proto, wanted[0], "BOOL")


def _sklearn(model: Any, features: Sequence[Feature], *, layout: str, codes: Codes, double: bool) -> onnx.ModelProto:
    from skl2onnx import to_onnx as convert  # noqa: PLC0415  slow to import, and not wanted for a path
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, StringTensorType  # noqa: PLC0415

    number = DoubleTensorType if double else FloatTensorType
    texts = [feature.datatype == "BYTES" and feature.name not in codes for feature in features]
    apart = layout == "columns" and (
        len(set(texts)) > 1 or any(type(part).__name__ == "ColumnTransformer" for _, part in parts(model))
    )
    if apart:
        kinds = [StringTensorType if text else number for text in texts]
        types = [(feature.name, kind([None, 1])) for feature, kind in zip(features, kinds, strict=True)]
    else:
        types = [("features", (StringTensorType if texts[0] else number)([None, len(features)]))]
    problems: list[Exception] = []
    for opset in OPSETS:
        try:
            proto: onnx.ModelProto = convert(
                model, initial_types=types, options=options_of(model) or None, target_opset=opset
            )
        except Exception as error:
            problems.append(error)
        else:
            return proto
    raise problems[0]


@cache
def register() -> None:
    """Teach skl2onnx the converters of onnxmltools, so that boosted trees convert wherever they stand.

    And that scikit-learn's own trees see float32, whatever is computed before them.
    """
    from skl2onnx import update_registered_converter  # noqa: PLC0415
    from skl2onnx.common import _registration  # noqa: PLC0415
    from skl2onnx.common.shape_calculator import (  # noqa: PLC0415
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )
    from skl2onnx.operator_converters.linear_classifier import convert_sklearn_linear_classifier  # noqa: PLC0415
    from sklearn.svm import LinearSVC  # noqa: PLC0415

    for name in ("DecisionTree", "ExtraTree", "RandomForest", "ExtraTrees", "GradientBoosting"):
        for role in ("Classifier", "Regressor"):
            alias = f"Sklearn{name}{role}"
            known = _registration._converter_pool[alias]
            _registration._converter_pool[alias] = _registration.RegisteredConverter(
                _exactly(known._fct), known._options
            )
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
                options=choices if answers_classes else {"split": None},
            )


def _exactly(convert: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Make a converter of trees keep to what the trees do: values are float32, and thresholds stay on their side."""

    def converted(scope: Any, operator: Any, container: Any) -> None:
        from skl2onnx.common.data_types import DoubleTensorType  # noqa: PLC0415

        floored = _Floored(container)
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


class _Single:
    """A variable of skl2onnx by another name, with float32 for float64."""

    def __init__(self, name: str, variable: Any) -> None:
        from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType  # noqa: PLC0415

        self.full_name = self.onnx_name = self.raw_name = name
        kind = variable.type
        self.type = FloatTensorType(kind.shape) if isinstance(kind, DoubleTensorType) else kind


class _Floored:
    """A container of skl2onnx that rounds thresholds down to float32.

    LightGBM asks `x <= threshold` in float64. For an x of float32 the greatest float32 below asks the same, and the
    nearest, which its converter takes, may lie above.
    """

    def __init__(self, container: Any) -> None:
        self._container = container

    def add_node(self, op_type: str, *places: Any, **attributes: Any) -> None:
        if op_type.startswith("TreeEnsemble") and "nodes_values" in attributes:
            values = np.asarray(attributes["nodes_values"], dtype=np.float64)
            singles = values.astype(np.float32)
            above = (singles > values) & (np.asarray(attributes["nodes_modes"]) == "BRANCH_LEQ")
            attributes["nodes_values"] = np.where(above, np.nextafter(singles, np.float32(-np.inf)), singles).tolist()
        self._container.add_node(op_type, *places, **attributes)

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


def _booster(model: Any, family: str, width: int) -> onnx.ModelProto:
    from onnxmltools import convert_lightgbm, convert_xgboost  # noqa: PLC0415
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    types = [("features", FloatTensorType([None, width]))]
    if family == "lightgbm":
        proto: onnx.ModelProto = convert_lightgbm(model, initial_types=types, target_opset=15)
    else:
        nameless(model)
        proto = convert_xgboost(model, initial_types=types, target_opset=15)
    return proto


def _catboost(model: Any) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save_model(str(path), format="onnx")
        return onnx.load(str(path))


def codes_of(model: Any, table: Any) -> dict[str, dict[Any, float]]:
    """Number the categories of pandas' category columns, for models that take the numbers."""
    import pandas as pd  # noqa: PLC0415

    family = type(model).__module__.split(".")[0]
    if family not in ("lightgbm", "xgboost"):
        return {}
    return {
        str(name): {_plain(value): float(code) for code, value in enumerate(table[name].cat.categories)}
        for name in table.columns
        if isinstance(table[name].dtype, pd.CategoricalDtype)
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
