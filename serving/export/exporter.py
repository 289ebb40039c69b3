"""Turns a fitted model into one ONNX file that describes itself and answers as the original does."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd

from serving.engine import mlflow_columns
from serving.engine.reference import columns_of, reference_of
from serving.engine.sensitive import veiled
from serving.engine.signature import Feature, Reference, Signature
from serving.errors import ModelInvalid
from serving.export import mlflow_folder, networks
from serving.export.asked import Asked, Image, UnknownCategory
from serving.export.asked import Reference as Says
from serving.export.exported import Exported, golden_of, sealed
from serving.export.features import plain_row
from serving.export.graph import add_label, plain_outputs, rename
from serving.export.mlflow_folder import MLflowFolder
from serving.export.original import Original, with_class
from serving.export.parity import Compared, Gap, ParityError, differences
from serving.export.progress import progress
from serving.export.refusal import CannotExport
from serving.export.session import Session
from serving.export.table import table_of
from serving.export.trial import Trial, proven
from serving.tensors import Array, Tensors

GOLDEN_ROWS = 5
BACKGROUND_ROWS, LEAST_BACKGROUND, BACKGROUND_CELLS = 32, 8, 4096
"""Of the rows that explanations stand on: what a file has of them at most, at least, and in cells."""


def export(
    model_or_path: Any,
    *,
    train: Any = None,
    held_out: Any = None,
    classes: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    description: str = "",
    descriptions: Mapping[str, str] | None = None,
    sensitive: Collection[str] = (),
    unknown_category: UnknownCategory = "accept",
    tolerance: float = 1e-4,
    double: bool = False,
    reference: Says | None = None,
    image: Image | None = None,
) -> Exported:
    """Convert, describe, and compare with the original on held-out rows and on rows at the edge of their ranges.

    model_or_path: a fitted scikit-learn estimator or pipeline, a model or booster of XGBoost, LightGBM or CatBoost,
        a network of PyTorch or Keras that takes one tensor, the path of an ONNX file made elsewhere, or that of an
        MLflow model folder with the onnx flavour, whose signature and example do where `train` is left out.
    train: the rows it was fitted on, for types, ranges, categories and reference: a DataFrame of pandas or polars, an
        array, or a Series of texts. held_out: rows that it has not seen, for parity, the example and the golden rows;
        its columns may be in another order. Columns are features; missing values are NaN, None or pandas' NA. Whole
        numbers and booleans are asked for as such.
    classes: names of the classes where the model's own are 0, 1, 2 and so on, or false and true. A file or network
        that answers with one score for each gets a label: the class of the highest.
    sensitive: names of features whose values no server keeps, whatever it keeps of requests. Where the file has rows,
        ranges and categories, it has of these features only what its histogram tells of ten rows or more.
    unknown_category: whether callers may send categories that training did not see. Where the model itself refuses
        them, or its file would answer otherwise for them, they are refused in any case.
    tolerance: largest difference of a score or a prediction, relative where values are above 1.
    double: give the graph float64 inputs, for values that float32 can't hold; not every converter has it.
    reference: the original's scores or predictions for rows; wanted for a path, else the model's own are used.
    image: name and per-row shape of one tensor that all columns together make up, for instance ("image", (8, 8)).
    Raises CannotExport, with the step, the reason and what to write instead, where there is no ONNX form, and
    ParityError, with the worst row and a remedy that was tried, where the file answers otherwise than the original.
    """
    path = Path(model_or_path) if isinstance(model_or_path, str | Path) else None
    if path is not None and mlflow_folder.is_one(path):
        folder = mlflow_folder.read(path)
        if train is None:
            return _of_mlflow(folder, description, metrics or {}, tolerance, sensitive)
        path = folder.model
    for what, given in (("train", train), ("held_out", held_out)):
        if given is None:
            raise CannotExport(what, "is left out", f"give `{what}=`, rows for its features and to compare with")
    rows = table_of(train, what="train")
    asked = Asked(
        train=rows,
        held_out=table_of(held_out, what="held_out", like=rows),
        classes=classes,
        metrics=metrics or {},
        description=description,
        descriptions=descriptions or {},
        sensitive=sensitive,
        unknown_category=unknown_category,
        tolerance=tolerance,
        double=double,
        reference=reference,
        image=image,
    )
    with progress() as say, tempfile.TemporaryDirectory(prefix="export-") as scratch:
        output = None
        if networks.family_of(model_or_path):
            say("converting")
            path = Path(scratch) / "network.onnx"
            own = networks.write(model_or_path, asked.held_out, path, image)
            asked = replace(asked, reference=reference or own)
            output = "scores" if classes else "prediction"
        if path is not None:
            made, compared = _of_path(path, asked, output), None
            names: Sequence[Any] | None = classes or made.keys
            label, scores = made.session.signature.label, made.session.signature.scores
        else:
            model = with_class(model_or_path)
            original = Original(model)
            names = _class_names(original, classes)
            made, compared = proven(model, asked, say)
            label, scores = _roles(original, made)
        if asked.reference is not None:
            compared = _referred(asked.reference, made, asked)
        say("writing the signature")
        return _written(made, asked, compared, label=label, scores=scores, classes=names if label else None)


def _marked(signature: Signature, sensitive: Collection[str], session: Session) -> Signature:
    """Mark features as sensitive, and take single rows' values of them out. Raises CannotExport for a name that none
    has.
    """
    unknown = sorted(set(sensitive) - {feature.name for feature in signature.features})
    if unknown:
        raise CannotExport("sensitive", f"names {', '.join(unknown)}", "name features")
    if not sensitive:
        return signature
    made = veiled(signature, sensitive)
    if made.golden is None:
        return made
    return made.model_copy(update={"golden": golden_of(made, made.golden.rows, session, made.golden.tolerance)})


def _of_mlflow(
    folder: MLflowFolder, description: str, metrics: Mapping[str, float], tolerance: float, sensitive: Collection[str]
) -> Exported:
    """Take over what an MLflow folder says: nothing is compared, since its original is not there."""
    proto = onnx.load(str(folder.model))
    keys = plain_outputs(proto)
    session = Session(proto)
    base = session.signature
    signature = base.model_copy(
        update={
            "task": "classification" if base.label and (keys or base.scores) else base.task,
            "classes": keys if base.label else None,
            "description": description,
            "metrics": _rounded(metrics),
        }
    )
    try:
        signature = mlflow_columns.describe(signature, folder.columns)
    except ModelInvalid as error:
        raise CannotExport(str(folder.model.parent), error.message, mlflow_folder.LOG) from None
    if rows := tuple(folder.rows([feature.name for feature in signature.features])[:GOLDEN_ROWS]):
        golden = golden_of(signature, rows, session, tolerance)
        signature = signature.model_copy(update={"example": rows[0], "golden": golden})
    return sealed(proto, Signature.model_validate(_marked(signature, sensitive, session).model_dump()))


def _of_path(path: Path, asked: Asked, output: str | None) -> Trial:
    """Load a file made elsewhere. output: the name that its only output gets."""
    proto = onnx.load(str(path))
    keys = plain_outputs(proto)
    if output is not None and len(proto.graph.output) == 1:
        rename(proto, {proto.graph.output[0].name: output})
    session = Session(proto)
    if asked.classes and session.signature.label is None:
        add_label(proto, len(asked.classes))
        session = Session(proto)
    inputs, columns = session.signature.inputs, len(asked.train.columns)
    matrix = len(inputs) == 1 and columns > 1
    if not matrix and columns != len(inputs) and not asked.image:
        names = ", ".join(spec.name for spec in inputs)
        raise CannotExport(path.name, f"takes the inputs {names}", f"give {len(inputs)} columns, in this order")
    asked = replace(asked, double=inputs[0].datatype == "FP64")
    return Trial(proto, session, asked, "matrix" if matrix else "columns", keys)


def _referred(reference: Says, made: Trial, asked: Asked) -> Compared:
    """Compare scores, or the only output, with what somebody else's code says of the rows."""
    signature = made.session.signature
    name = next(
        (n for n in ("probabilities", "scores") if n in made.outputs), signature.scores or next(iter(made.outputs))
    )
    expected = {name: np.asarray(reference(asked.held_out))}
    try:
        compared = differences(expected, made.outputs, rows=asked.held_out, tolerance=asked.tolerance)
    except Gap as gap:
        raise ParityError(f"{gap}. The file answers otherwise than `reference` says: one of them is wrong.") from gap
    agreement = None
    if signature.scores:
        agreement = float((expected[name].argmax(axis=1) == made.outputs[name].argmax(axis=1)).mean())
    return replace(compared, parity=compared.parity.model_copy(update={"label_agreement": agreement}))


def _roles(original: Original, made: Trial) -> tuple[str | None, str | None]:
    """Name the outputs that are label and scores of a classifier, or of an outlier detector."""
    outputs = [spec.name for spec in made.session.signature.outputs]
    if original.targets is not None or next(iter(original.answers)) != "label":
        return None, None
    return outputs[0], outputs[1] if len(outputs) > 1 and "distances" not in original.answers else None


def _class_names(original: Original, classes: Sequence[str] | None) -> Sequence[Any] | None:
    own = original.classes
    if classes is None:
        if own is None:
            return None
        if original.boolean:
            return ["false", "true"]
        return [int(v) if isinstance(v, float) and v.is_integer() else v for v in own.tolist()]
    names = [str(name) for name in classes]
    if own is not None and names != [str(value) for value in own]:
        if len(names) != len(own):
            raise CannotExport("classes", f"names {len(names)}, and the model has {len(own)}", "name each class")
        if not original.boolean and (own.dtype.kind not in "iuf" or own.tolist() != list(range(len(own)))):
            why = (
                f"renames the classes {own.tolist()[:10]}, and only 0, 1, 2 and so on are positions in a list of names"
            )
            raise CannotExport("classes", why, "leave it out, or fit on such labels")
    return names


def _written(
    made: Trial,
    asked: Asked,
    compared: Compared | None,
    *,
    label: str | None,
    scores: str | None,
    classes: Sequence[Any] | None,
) -> Exported:
    base, image = made.session.signature, asked.image
    count = min(GOLDEN_ROWS, len(asked.held_out))
    if image:
        rows = [{image[0]: made.feeds[0][i].tolist()} for i in range(count)]
    else:
        rows = [plain_row(asked.held_out, i, made.features) for i in range(count)]
    classifies = bool(label) and (classes is not None or compared is None or bool(scores))
    signature = Signature(
        task="classification" if classifies else "regression" if len(base.outputs) == 1 else "other",
        description=asked.description,
        inputs=base.inputs,
        outputs=base.outputs,
        layout=made.layout,
        features=(_tensor_feature(made.features, image),) if image else made.features,
        label=label,
        scores=scores,
        classes=tuple(classes) if classes else None,
        metrics=_rounded(asked.metrics),
        parity=compared.parity if compared else None,
        example=rows[0],
        background=() if image else _background(asked.train, made.features),
    )
    changed = {
        "golden": golden_of(signature, tuple(rows), made.session, asked.tolerance),
        "reference": _reference(signature, made.feeds_of(asked.train), made.outputs),
    }
    signature = _marked(signature.model_copy(update=changed), asked.sensitive, made.session)
    return sealed(made.proto, signature, compared.worst if compared else None)


def _reference(signature: Signature, feeds: Tensors, outputs: Mapping[str, Array]) -> tuple[Reference, ...]:
    """Describe features by training rows, and outputs by held-out ones: of what it has seen a model is too sure."""
    answered = tuple(np.asarray(outputs[spec.name]) for spec in signature.outputs)
    known = {feature.name: feature.categories for feature in signature.features}
    found = (
        reference_of(column, column.values(feeds), known[column.name])
        if column.of == "input"
        else reference_of(column, column.values(answered))
        for column in columns_of(signature)
    )
    return tuple(reference for reference in found if reference is not None)


def _background(train: pd.DataFrame, features: tuple[Feature, ...]) -> tuple[dict[str, Any], ...]:
    count = min(len(train), max(LEAST_BACKGROUND, min(BACKGROUND_ROWS, BACKGROUND_CELLS // len(features))))
    chosen = np.random.default_rng(0).choice(len(train), count, replace=False)
    return tuple(plain_row(train, int(index), features) for index in chosen)


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in metrics.items()}


def _tensor_feature(found: tuple[Feature, ...], image: Image) -> Feature:
    return Feature(
        name=image[0],
        datatype="FP32",
        shape=image[1],
        minimum=min(f.minimum for f in found if f.minimum is not None),
        maximum=max(f.maximum for f in found if f.maximum is not None),
    )
