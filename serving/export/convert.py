"""Converts fitted models to ONNX with clean names: which converter takes what is known here and nowhere else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from skl2onnx import to_onnx as convert
from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType, StringTensorType

from serving.engine.signature import Feature
from serving.export.adapt import adapted, options_of
from serving.export.asked import Asked, Layout
from serving.export.converters import register
from serving.export.graph import (
    Column,
    accept_columns,
    accept_image,
    cast_output,
    joined,
    label_of_scores,
    name_alike,
    plain_outputs,
    rename,
    reshape_label,
    split_targets,
    swap_columns,
)
from serving.export.original import Original, takers
from serving.export.refusal import CannotExport, parts, refused

# Isolation forests and some scalers convert only up to the first; KNNImputer wants more. onnxruntime runs them all.
OPSETS = ({"": 17, "ai.onnx.ml": 3}, {"": 18, "ai.onnx.ml": 3})

BY_COLUMN = ("ColumnTransformer", "OneHotEncoder", "OrdinalEncoder", "TargetEncoder")
"""Steps that treat columns apart: they get each with its own type."""

Codes = Mapping[str, Mapping[Any, float]]


def layout_of(model: Any, features: Sequence[Feature]) -> Layout:
    """Choose one matrix for a table of numbers, or one input a column where they are of different kinds."""
    if len(features) == 1 or any(feature.datatype == "BYTES" or feature.categories for feature in features):
        return "columns"
    return "columns" if any(type(part).__name__ in BY_COLUMN for _, part in parts(model)) else "matrix"


def to_onnx(
    model: Any, original: Original, features: Sequence[Feature], asked: Asked, layout: Layout
) -> onnx.ModelProto:
    """Convert a fitted model: one matrix input `features`, or one input a column, and outputs named as `original` has.

    Raises CannotExport.
    """
    family = type(model).__module__.split(".")[0]
    if asked.double and family in ("lightgbm", "xgboost", "catboost"):
        raise CannotExport(type(model).__name__, "its converter knows no float64", "export it with double=False")
    register()
    codes = codes_of(model, asked.train)
    try:
        made = adapted(model, sparse=original.sparse(asked.held_out))
        last = made.steps[-1][1] if hasattr(made, "steps") else made
        if type(last).__module__.startswith("catboost"):
            proto = _catboost(last)
            if len(getattr(made, "steps", ())) > 1:
                proto = joined(_sklearn(made[:-1], features, layout, codes, double=asked.double), proto)
        elif type(made).__name__ == "Booster":
            proto = _lightgbm_booster(made, len(features))
        else:
            proto = _sklearn(made, features, layout, codes, double=asked.double)
    except CannotExport:
        raise
    except Exception as error:
        raise refused(model, error) from error
    plain_outputs(proto)
    _name(proto, original, layout, boolean=original.boolean and asked.classes is None)
    if asked.image is not None:
        accept_image(proto, *asked.image)
    elif layout == "columns":
        accept_columns(proto, [Column(f.name, f.datatype, codes.get(f.name)) for f in features])
    name_alike(proto)
    return proto


def _name(proto: onnx.ModelProto, original: Original, layout: Layout, *, boolean: bool) -> None:
    """Name inputs and outputs, leave out outputs that the original does not have, and answer in its types.

    boolean: whether labels are true and false; where classes are renamed, a label is the place of its name.
    """
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
    if boolean:
        cast_output(proto, wanted[0], "BOOL")


def _sklearn(model: Any, features: Sequence[Feature], layout: Layout, codes: Codes, *, double: bool) -> onnx.ModelProto:
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


def _lightgbm_booster(model: Any, width: int) -> onnx.ModelProto:
    from onnxmltools import convert_lightgbm  # noqa: PLC0415
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    types = [("features", FloatTensorType([None, width]))]
    proto: onnx.ModelProto = convert_lightgbm(model, initial_types=types, target_opset=15)
    for opset in proto.opset_import:
        if opset.domain == "ai.onnx.ml":
            opset.version = 3  # trees are the same in it, and what stands before them for categories is newer
    return proto


def _catboost(model: Any) -> onnx.ModelProto:
    """Have CatBoost write its own file, which has labels of integers and strings only: others are put in after."""
    classes = getattr(model, "classes_", [])
    metadata = model.get_metadata()
    plain = json.loads(metadata["class_params"]) if "class_params" in metadata.keys() else {}  # noqa: SIM118  no dict
    if plain.get("class_label_type") in ("Boolean", "Float"):
        plain |= {"class_label_type": "Integer", "class_names": list(range(len(classes)))}
        metadata["class_params"] = json.dumps(plain)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save_model(str(path), format="onnx")
        proto = onnx.load(str(path))
    plain_outputs(proto)
    if len(classes):
        label_of_scores(proto, np.asarray(classes))
    else:
        shape = proto.graph.output[0].type.tensor_type.shape
        if len(shape.dim) == 1:
            shape.dim.add(dim_value=1)  # it says [N], and answers [N, 1]
    return proto


def codes_of(model: Any, table: pd.DataFrame) -> Codes:
    """Number the categories of pandas' category columns, for models that take the numbers."""
    if not {type(taker).__module__.split(".")[0] for taker in takers(model)} <= {"lightgbm", "xgboost"}:
        return {}
    return {
        str(name): {value: float(code) for code, value in enumerate(table[name].cat.categories.tolist())}
        for name in table.columns
        if isinstance(table[name].dtype, pd.CategoricalDtype)
    }
