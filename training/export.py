"""Turns a fitted model into one ONNX file that describes itself and answers as the original does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pandas as pd

from serving.engine.bare import Port, describe
from serving.engine.signature import METADATA_KEY, Feature, Golden, Parity, Signature
from serving.tensors import Array
from training import convert
from training.features import features_of, feeds_of, plain_row
from training.parity import compare

GOLDEN_ROWS = 5
UnknownCategory = Literal["accept", "refuse"]


@dataclass(frozen=True)
class Exported:
    """An ONNX file's bytes, with the signature that is embedded in them."""

    content: bytes
    signature: Signature


def export(
    model_or_path: Any,
    *,
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    classes: Sequence[str] | None = None,
    metrics: Mapping[str, float] | None = None,
    description: str = "",
    descriptions: Mapping[str, str] | None = None,
    unknown_category: UnknownCategory = "accept",
    tolerance: float = 1e-4,
    double: bool = False,
    reference: Callable[[pd.DataFrame], Array] | None = None,
    image: tuple[str, tuple[int, ...]] | None = None,
) -> Exported:
    """Convert, describe, and compare with the original on held-out rows.

    model_or_path: a fitted scikit-learn estimator or pipeline, a fitted XGBoost or LightGBM model with the
        scikit-learn interface, or the path of an ONNX file made elsewhere (for instance by torch.onnx.export).
    train: the rows it was fitted on, for ranges, categories and histograms. held_out: rows that it has not seen, for
        parity, the example and the golden rows. Columns are features, in order; missing values are NaN or None.
    classes: names of the classes where the model's own are numbers.
    tolerance: largest difference of a score or a prediction, relative where values are above 1.
    double: give the graph float64 inputs, for values that float32 can't hold; not every converter has it.
    reference: the original's scores or predictions for rows; wanted for a path, else the model's own are used.
    image: name and per-row shape of one tensor that all columns together make up, for instance ("image", (8, 8)).
    Raises ParityError, with the worst row and the remedy, where the file answers otherwise than the original.
    """
    if isinstance(model_or_path, str | Path):
        proto = onnx.load(str(model_or_path))
    else:
        proto = convert.to_onnx(model_or_path, train, double=double, image=image)
    found = features_of(train, descriptions=descriptions or {}, unknown_category=unknown_category, double=double)
    features = (_tensor_feature(found, image, proto),) if image else found
    base = _graph_signature(proto)
    layout: Literal["matrix", "columns"] = (
        "matrix" if len(base.inputs) == 1 and len(found) > 1 and not image else "columns"
    )
    class_names = _class_names(model_or_path, classes) if base.label else None
    feeds = feeds_of(held_out, base.inputs, layout=layout, image=image[1] if image else None)
    outputs = dict(zip((o.name for o in base.outputs), _run(proto, feeds), strict=True))
    parity = _parity(model_or_path, base, outputs, held_out, feeds, tolerance, reference)
    example = {image[0]: feeds[0][0].tolist()} if image else plain_row(held_out, 0)
    golden = min(GOLDEN_ROWS, len(held_out))
    rows = [{image[0]: feeds[0][i].tolist()} if image else plain_row(held_out, i) for i in range(golden)]
    signature = Signature(
        task="classification" if base.label else "regression" if len(base.outputs) == 1 else "other",
        description=description,
        inputs=base.inputs,
        outputs=base.outputs,
        layout=layout,
        features=features,
        label=base.label,
        scores=base.scores,
        classes=tuple(class_names) if class_names else None,
        metrics={name: round(float(value), 4) for name, value in (metrics or {}).items()},
        parity=parity,
        example=example,
        golden=Golden(
            rows=tuple(rows),
            outputs={name: array[:golden].tolist() for name, array in outputs.items()},
            tolerance=tolerance,
        ),
        tools={name: version(name) for name in ("scikit-learn", "skl2onnx", "onnx", "onnxruntime")},
    )
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {METADATA_KEY: signature.model_dump_json(exclude_defaults=True)})
    return Exported(proto.SerializeToString(deterministic=True), signature)


def _graph_signature(proto: onnx.ModelProto) -> Signature:
    session = _session(proto)
    inputs = [Port(p.name, p.type, tuple(p.shape)) for p in session.get_inputs()]
    outputs = [Port(p.name, p.type, tuple(p.shape)) for p in session.get_outputs()]
    names = [port.name for port in inputs]

    def probe(arrays: tuple[Array, ...]) -> list[Any] | None:
        try:
            return list(session.run(None, dict(zip(names, arrays, strict=True))))
        except Exception:
            return None  # made-up rows may be refused; the held-out rows will tell

    signature, zipped = describe(inputs, outputs, probe)
    if zipped:
        raise ValueError("the file answers with maps (ZipMap): export it with zipmap=False")
    return signature


def _session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(proto: onnx.ModelProto, feeds: tuple[Array, ...]) -> list[Any]:
    session = _session(proto)
    names = [port.name for port in session.get_inputs()]
    return list(session.run(None, dict(zip(names, feeds, strict=True))))


def _class_names(model: Any, classes: Sequence[str] | None) -> list[Any] | None:
    if classes is not None:
        return [str(name) for name in classes]
    own = getattr(model, "classes_", None)
    return None if own is None else [value.item() if hasattr(value, "item") else value for value in own]


def _tensor_feature(found: tuple[Feature, ...], image: tuple[str, tuple[int, ...]], proto: onnx.ModelProto) -> Feature:
    return Feature(
        name=image[0],
        datatype=found[0].datatype,
        shape=image[1],
        minimum=min(f.minimum for f in found if f.minimum is not None),
        maximum=max(f.maximum for f in found if f.maximum is not None),
    )


def _parity(  # noqa: PLR0917  all of what one comparison needs
    model: Any,
    base: Signature,
    outputs: dict[str, Array],
    held_out: pd.DataFrame,
    feeds: tuple[Array, ...],
    tolerance: float,
    reference: Callable[[pd.DataFrame], Array] | None,
) -> Parity | None:
    name = base.scores or ("scores" if "scores" in outputs else base.outputs[0].name)
    if reference is None and isinstance(model, str | Path):
        return None
    if reference is None:
        rows = convert.original_rows(model, held_out)
        own = "decision_function" if name == "scores" else "predict_proba" if base.scores else "predict"
        expected = np.asarray(getattr(model, own)(rows))
    else:
        expected = np.asarray(reference(held_out))
    return compare(expected, outputs[name], rows=held_out, feeds=feeds, tolerance=tolerance, labels=bool(base.scores))
