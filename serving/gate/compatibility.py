"""Whether callers of one version can go on with another as they are: a pure comparison of two signatures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serving.engine.signature import Feature, Signature, TensorSpec

_WIDER = {
    "FP16": {"FP32", "FP64"},
    "FP32": {"FP64"},
    "INT8": {"INT16", "INT32", "INT64"},
    "INT16": {"INT32", "INT64"},
    "INT32": {"INT64"},
    "UINT8": {"UINT16", "UINT32", "UINT64", "INT16", "INT32", "INT64"},
    "UINT16": {"UINT32", "UINT64", "INT32", "INT64"},
    "UINT32": {"UINT64", "INT64"},
}


def breaking(old: Signature, new: Signature) -> list[str]:
    """List what a caller of `old` would find broken in `new`, each in a sentence; empty where nothing is.

    Breaking: a feature that is gone, new, retyped, reshaped or no longer nullable, or that refuses categories that it
    took; features or classes in another order (rows by position and scores by position would change their meaning); an
    output or a class that is gone; tensors with another name, datatype or rank. A class or an output more is not.
    """
    return [
        *_features(old, new),
        *_tensors("input", old.inputs, new.inputs),
        *_tensors("output", old.outputs, new.outputs),
        *_classes(old, new),
    ]


def _features(old: Signature, new: Signature) -> Iterable[str]:
    before = {feature.name: feature for feature in old.features}
    after = {feature.name: feature for feature in new.features}
    if gone := [name for name in before if name not in after]:
        yield f"features are gone: {_listed(gone)}"
    if new_ones := [name for name in after if name not in before]:
        yield f"features are new, and callers do not send them: {_listed(new_ones)}"
    for name in sorted(before.keys() & after.keys()):
        yield from _feature(before[name], after[name])
    if before.keys() == after.keys() and list(before) != list(after):
        yield "the features are in another order: rows by position would change their meaning"


def _feature(old: Feature, new: Feature) -> Iterable[str]:
    name = old.name
    if new.datatype != old.datatype and new.datatype not in _WIDER.get(old.datatype, ()):
        yield f"feature {name!r} was {old.datatype} and is {new.datatype}"
    if not _takes(old.shape, new.shape):
        yield f"feature {name!r} had shape {list(old.shape)} and has {list(new.shape)}"
    if old.nullable and not new.nullable:
        yield f"feature {name!r} could be missing and can't be any more"
    if old.allow_non_finite and not new.allow_non_finite:
        yield f"feature {name!r} took values that are not finite and does not any more"
    if new.categories is not None and new.unknown_category == "refuse":
        if old.categories is None or old.unknown_category == "accept":
            yield f"feature {name!r} took any value and refuses unknown categories now"
        elif gone := [c for c in old.categories if c not in new.categories]:
            yield f"feature {name!r} refuses categories that it took: {_listed(gone)}"


def _tensors(kind: str, old: tuple[TensorSpec, ...], new: tuple[TensorSpec, ...]) -> Iterable[str]:
    after = {spec.name: spec for spec in new}
    for spec in old:
        now = after.get(spec.name)
        if now is None:
            yield f"{kind} tensor {spec.name!r} is gone"
        elif now.datatype != spec.datatype:
            yield f"{kind} tensor {spec.name!r} was {spec.datatype} and is {now.datatype}"
        elif kind == "input" and not _takes(spec.shape, now.shape):
            yield f"{kind} tensor {spec.name!r} had shape {list(spec.shape)} and has {list(now.shape)}"
        elif len(now.shape) != len(spec.shape):
            yield f"{kind} tensor {spec.name!r} had {len(spec.shape)} dimensions and has {len(now.shape)}"


def _takes(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether all that fits `old` fits `new`."""
    return len(old) == len(new) and all(n in (-1, o) for o, n in zip(old, new, strict=True))


def _classes(old: Signature, new: Signature) -> Iterable[str]:
    if old.task != new.task:
        yield f"the task was {old.task} and is {new.task}"
    for role in ("label", "scores"):
        if getattr(old, role) is not None and getattr(old, role) != getattr(new, role):
            yield f"the {role} was output {getattr(old, role)!r} and is {getattr(new, role)!r}"
    if old.classes is None:
        return
    now = new.classes or ()
    if gone := [c for c in old.classes if c not in now]:
        yield f"classes are gone: {_listed(gone)}"
    elif now[: len(old.classes)] != old.classes:
        yield "the classes are in another order: scores by position would change their meaning"


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more
