"""Cheap models of each datatype: some answer as much as they are given, some a great deal more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import TensorProto, helper, save

from benchmarks.bodies import WIDTH
from serving.engine.signature import METADATA_KEY, Feature, Signature, TensorSpec

KINDS = {
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "INT64": TensorProto.INT64,
    "INT32": TensorProto.INT32,
    "UINT64": TensorProto.UINT64,
    "BOOL": TensorProto.BOOL,
    "BYTES": TensorProto.STRING,
}
GROWN = ("FP32", "INT64", "BOOL", "BYTES", "FP16")


def long_models(folder: Path) -> None:
    """Write all of them.

    same_KIND answers what it is given, rows of WIDTH elements, same_text rows of one string; more_KIND repeats the one
    element of each row WIDTH times; words counts the strings that it knows; several has three outputs, grown from one
    number a row; classes names the WIDTH columns of its scores, few_classes three.
    """
    rows, row, one = ["rows", WIDTH], ["rows"], ["rows", 1]
    for kind, element in KINDS.items():
        node = helper.make_node("Identity", ["asked"], ["answered"])
        _write(folder, f"same_{kind.lower()}", [node], {"asked": (element, rows)}, {"answered": (element, rows)})
    for kind in GROWN:
        _write(
            folder,
            f"more_{kind.lower()}",
            _grown("asked", "answered"),
            {"asked": (KINDS[kind], one)},
            {"answered": (KINDS[kind], rows)},
        )
    node = helper.make_node("Identity", ["asked"], ["answered"])
    _write(folder, "same_text", [node], {"asked": (KINDS["BYTES"], one)}, {"answered": (KINDS["BYTES"], one)})
    numbered = helper.make_node(
        "LabelEncoder", ["asked"], ["found"], domain="ai.onnx.ml", keys_strings=["word"], values_int64s=[1]
    )
    counted = helper.make_node("ReduceMax", ["found"], ["most"], axes=[1], keepdims=1)
    _write(folder, "words", [numbered, counted], {"asked": (KINDS["BYTES"], rows)}, {"most": (KINDS["INT64"], one)})
    _write(
        folder,
        "several",
        [
            *_grown("asked", "numbers"),
            helper.make_node("Cast", ["numbers"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Cast", ["numbers"], ["flags"], to=TensorProto.BOOL),
        ],
        {"asked": (KINDS["FP32"], one)},
        {"numbers": (KINDS["FP32"], rows), "whole": (KINDS["INT64"], rows), "flags": (KINDS["BOOL"], rows)},
    )
    for name, width in (("classes", WIDTH), ("few_classes", 3)):
        classes = tuple(f"kind {i}" for i in range(width))
        signature = Signature(
            task="classification",
            inputs=(TensorSpec(name="asked", datatype="FP32", shape=(-1, 1)),),
            outputs=(
                TensorSpec(name="label", datatype="INT64", shape=(-1,)),
                TensorSpec(name="scores", datatype="FP32", shape=(-1, width)),
            ),
            layout="columns",
            features=(Feature(name="asked", datatype="FP32"),),
            label="label",
            scores="scores",
            classes=classes,
        )
        _write(
            folder,
            name,
            [
                helper.make_node(
                    "RandomUniformLike", ["asked"], ["noise"], seed=1.0, dtype=TensorProto.FLOAT, low=0.1, high=1.0
                ),
                *_grown("noise", "scores", width),
                helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
            ],
            {"asked": (KINDS["FP32"], one)},
            {"label": (KINDS["INT64"], row), "scores": (KINDS["FP32"], ["rows", width])},
            {METADATA_KEY: signature.model_dump_json(exclude_defaults=True)},
        )


def _grown(given: str, made: str, width: int = WIDTH) -> list[Any]:
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, width])
    return [
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("Expand", [given, "shape"], [made]),
    ]


def _write(  # noqa: PLR0917  a model is all of these
    folder: Path,
    name: str,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    metadata: dict[str, str] | None = None,
) -> None:
    given, made = (
        [helper.make_tensor_value_info(port, element, shape) for port, (element, shape) in ports.items()]
        for ports in (inputs, outputs)
    )
    opsets = [helper.make_opsetid("", 16), helper.make_opsetid("ai.onnx.ml", 2)]
    model = helper.make_model(helper.make_graph(nodes, name, given, made), opset_imports=opsets, ir_version=8)
    helper.set_model_props(model, metadata or {})
    (folder / name / "1").mkdir(parents=True)
    save(model, folder / name / "1" / "model.onnx")
