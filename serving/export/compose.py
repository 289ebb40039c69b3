"""Joins two graphs into one file, so that preprocessing travels with its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import compose as joining
from onnx import version_converter

from serving.engine.signature import METADATA_KEY, Feature, Signature
from serving.export.exported import Exported, golden_of, sealed
from serving.export.graph import plain_outputs
from serving.export.refusal import CannotExport, one_line
from serving.export.session import Session

_SAY = "say which output feeds which input: --map OUTPUT=INPUT"


def compose(first: Path | str, then: Path | str, *, joins: Mapping[str, str] | None = None) -> Exported:
    """Join two ONNX files: outputs of `first` become inputs of `then`, whose other inputs callers send themselves.

    joins: by output of `first`, the input of `then` that it feeds. Left out, equal names are joined, or the only output
    and the only input. The file answers as `then` does. Callers send what the first file's signature says, and what the
    second's says of its other inputs; class names, task, description and metrics are the second's; the golden rows are
    the first's, with the answers of the joined file. Raises CannotExport.
    """
    before, after = (_read(Path(path)) for path in (first, then))
    told = [_signature(proto) for proto in (before, after)]
    del before.metadata_props[:], after.metadata_props[:]
    plain_outputs(before)
    classes = plain_outputs(after)
    pairs = _pairs(before, after, joins or {})
    _alike(before, after)
    before = joining.add_prefix(before, "first/", rename_inputs=False)
    fed = {name: f"then/{name}" for name in pairs.values()}
    joining.add_prefix_graph(
        after.graph, "then/", rename_inputs=False, rename_outputs=False, inplace=True, name_map=fed
    )
    try:
        proto = joining.merge_models(
            before,
            after,
            io_map=[(f"first/{output}", f"then/{name}") for output, name in pairs.items()],
            outputs=[port.name for port in after.graph.output],
        )
        session = Session(proto)
    except Exception as error:
        raise CannotExport("the files", f"do not join: {one_line(error)}", _SAY) from error
    return sealed(proto, _described(session, *told, classes=classes))


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path))
    except DecodeError:
        raise CannotExport(path.name, "is not an ONNX file, or cut short", "export or copy it again") from None


def _pairs(before: onnx.ModelProto, after: onnx.ModelProto, joins: Mapping[str, str]) -> dict[str, str]:
    outputs = [port.name for port in before.graph.output]
    weights = {tensor.name for tensor in after.graph.initializer}
    inputs = [port.name for port in after.graph.input if port.name not in weights]
    alone = {outputs[0]: inputs[0]} if len(outputs) == len(inputs) == 1 else {}
    pairs = dict(joins) or {name: name for name in outputs if name in inputs} or alone
    for what, names, known in (("output", pairs, outputs), ("input", pairs.values(), inputs)):
        for name in names:
            if name not in known:
                which = "first" if what == "output" else "second"
                raise CannotExport(f"{what} {name!r}", f"is not in the {which} file", f"name one of {', '.join(known)}")
    if not pairs:
        each = f"the first answers {', '.join(outputs)}, the second takes {', '.join(inputs)}"
        raise CannotExport("the files", f"have no name in common: {each}", _SAY)
    return pairs


def _alike(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Bring both to the higher of their operator sets, which join only so. Raises CannotExport where that can't be.

    ONNX converts its own. In other domains, an operator that a later version changes has other attributes there, so
    that the joined file does not load: none means another thing in silence.
    """
    versions = [{opset.domain: opset.version for opset in proto.opset_import} for proto in (before, after)]
    for domain in versions[0].keys() & versions[1].keys():
        low, high = sorted(found[domain] for found in versions)
        older = before if versions[0][domain] == low else after
        if domain == "" and low < high:
            try:
                older.CopyFrom(version_converter.convert_version(older, high))
            except Exception as error:
                why = f"use opset {low} and {high}, and the older can't be raised: {one_line(error)}"
                raise CannotExport("the files", why, "export both with the same target_opset") from error
        for opset in older.opset_import:
            if opset.domain == domain:
                opset.version = high
    before.ir_version = after.ir_version = max(before.ir_version, after.ir_version)


def _signature(proto: onnx.ModelProto) -> Signature | None:
    """Return a file's own signature; None where it has none."""
    text = next((entry.value for entry in proto.metadata_props if entry.key == METADATA_KEY), None)
    return None if text is None else Signature.model_validate_json(text)


def _described(
    session: Session, first: Signature | None, then: Signature | None, *, classes: tuple[Any, ...] | None
) -> Signature:
    base = session.signature
    changed: dict[str, Any] = {}
    if first is not None and first.layout == "matrix" and base.inputs == first.inputs:
        changed |= {"layout": "matrix", "features": first.features}
    else:
        changed["features"] = tuple(_feature(feature, then, first) for feature in base.features)
    if then is not None:
        kept = ("task", "description", "label", "scores", "classes", "metrics")
        changed |= {name: getattr(then, name) for name in kept}
    signature = Signature.model_validate(base.model_copy(update=changed).model_dump())
    if signature.label and signature.classes is None:
        signature = signature.model_copy(update={"classes": classes})
    names = {feature.name for feature in signature.features}
    golden = first.golden.rows if first is not None and first.golden is not None else ()
    rows = tuple(row for row in golden if row.keys() == names)
    if not rows:
        return signature
    return signature.model_copy(update={"example": rows[0], "golden": golden_of(signature, rows, session)})


def _feature(bare: Feature, *told: Signature | None) -> Feature:
    """Describe an input of the joined graph as one of the files does, where it has it."""
    for signature in told:
        for feature in signature.features if signature is not None and signature.layout == "columns" else ():
            if (feature.name, feature.shape) == (bare.name, bare.shape):
                return feature
    return bare
