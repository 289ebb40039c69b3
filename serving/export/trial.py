"""Converts a model, and lets the file through only where it answers as the original does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx
import pandas as pd

from serving.engine.signature import Feature
from serving.export import convert
from serving.export.edges import Edge, edge_rows, typed
from serving.export.features import features_of, feeds_of
from serving.export.original import Original
from serving.export.parity import Compared, Gap, ParityError, differences
from serving.export.progress import Say
from serving.export.refusal import CannotExport, refused, step_of
from serving.export.session import Session
from serving.tensors import Array

FLOAT32_EXACT = 2**24


@dataclass(frozen=True)
class Trial:
    """A converted file, and what it answered for the held-out rows."""

    proto: onnx.ModelProto
    session: Session
    features: tuple[Feature, ...]
    layout: Literal["matrix", "columns"]
    feeds: tuple[Array, ...]
    outputs: dict[str, Array]
    keys: tuple[Any, ...] | None = None


def proven(
    model: Any,
    original: Original,
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    *,
    descriptions: Mapping[str, str],
    unknown: Literal["accept", "refuse"],
    tolerance: float,
    double: bool,
    image: tuple[str, tuple[int, ...]] | None,
    say: Say,
) -> tuple[Trial, Compared]:
    """Convert, and compare on held-out rows and at the edges. Raises CannotExport or ParityError."""

    def attempt(
        model: Any, original: Original, rows: pd.DataFrame, double: bool, train: pd.DataFrame = train
    ) -> tuple[Trial, Compared]:
        described = partial(
            features_of, train, rows, descriptions=descriptions, unknown_category=unknown, double=double
        )
        features = described()
        expected = _asked(original, rows)
        layout: Literal["matrix", "columns"] = "matrix" if image else convert.layout_of(model, features)
        say(f"converting{' to float64' if double else ''}")
        codes = convert.codes_of(model, train)
        proto = convert.to_onnx(
            model,
            original,
            features,
            layout=layout,
            codes=codes,
            double=double,
            image=image,
            sparse=original.sparse(rows),
        )
        say("comparing")
        made = _run(model, proto, features, layout=layout, rows=rows, image=image)
        compared = differences(expected, made.outputs, rows=rows, tolerance=tolerance)
        if image is None:
            closed = _closed(original, made, train, rows, tolerance)
            if closed:
                made = replace(made, features=described(closed=closed))
        return made, compared

    try:
        return attempt(model, original, held_out, double)
    except Gap as gap:
        say("looking for a remedy")
        remedy = _remedy(model, original, train, held_out, double=double, attempt=attempt)
        raise ParityError(f"{gap}. {remedy}") from gap


def _asked(original: Original, rows: pd.DataFrame) -> dict[str, Array]:
    try:
        return original.ask(rows)
    except CannotExport:
        raise
    except Exception as error:
        if "NotFitted" in type(error).__name__:
            raise CannotExport("the model", "is not fitted", "call its fit first") from error
        text = " ".join(str(error).split())[:300]
        raise CannotExport(
            "held_out", f"the model itself refuses these rows: {text}", "give rows as it takes them"
        ) from error


def _run(
    model: Any,
    proto: onnx.ModelProto,
    features: tuple[Feature, ...],
    *,
    layout: Literal["matrix", "columns"],
    rows: pd.DataFrame,
    image: tuple[str, tuple[int, ...]] | None,
) -> Trial:
    try:
        session = Session(proto)
        shape = image[1] if image else None
        feeds = feeds_of(rows, session.signature.inputs, layout=layout, image=shape)
        outputs = session.run(feeds)
    except Exception as error:
        raise refused(model, error) from error
    return Trial(proto, session, features, "columns" if image else layout, feeds, outputs)


def _closed(original: Original, made: Trial, train: pd.DataFrame, held_out: pd.DataFrame, tolerance: float) -> set[str]:
    """Ask both for rows at the edge; return the columns of which values that training did not see must be refused.

    Raises Gap where they differ otherwise.
    """
    edges, rows = edge_rows(train, held_out, made.features)
    table = typed(rows, train)
    closed: set[str] = set()
    asked: list[int] = []
    for index, said in enumerate(_each(original.ask, table)):
        if said is not None:
            asked.append(index)
        elif edges[index].kind == "unseen":
            closed.add(edges[index].column)

    def file(part: pd.DataFrame) -> dict[str, Array]:
        return made.session.run(feeds_of(part, made.session.signature.inputs, layout=made.layout))

    kept = rows.iloc[asked].reset_index(drop=True)
    expected = original.ask(table.iloc[asked].reset_index(drop=True)) if asked else {}
    for position, said in enumerate(_each(file, kept)):
        edge = edges[asked[position]]
        if edge.column in closed and edge.kind == "unseen":
            continue
        one = kept.iloc[[position]].reset_index(drop=True)
        due = {name: array[[position]] for name, array in expected.items()}
        try:
            if said is None:
                raise Gap(f"the file can't answer {_shown(edge, one)}", np.ones(1, dtype=bool))
            differences(due, said, rows=one, tolerance=tolerance)
        except Gap as gap:
            if edge.kind == "unseen":
                closed.add(edge.column)
            else:
                raise Gap(f"{_shown(edge, one)}: {gap}", gap.rows) from gap
    return closed


def _each(ask: Callable[[pd.DataFrame], dict[str, Array]], table: pd.DataFrame) -> list[dict[str, Array] | None]:
    """Ask for all rows together, and for each alone where that fails: None for those that fail alone."""
    try:
        said = ask(table)
        return [{name: array[[i]] for name, array in said.items()} for i in range(len(table))]
    except Exception:
        if len(table) == 1:
            return [None]
        half = len(table) // 2
        parts = (table.iloc[:half].reset_index(drop=True), table.iloc[half:].reset_index(drop=True))
        return [one for part in parts for one in _each(ask, part)]


def _shown(edge: Edge, row: pd.DataFrame) -> str:
    if not edge.column:
        return "the least or greatest values of all columns"
    value = row[next(name for name in row.columns if str(name) == edge.column)].iloc[0]
    return f"column {edge.column!r} with {value!r} ({edge.kind})"


def _remedy(
    model: Any,
    original: Original,
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    *,
    double: bool,
    attempt: Callable[..., tuple[Trial, Compared]],
) -> str:
    """Try what may help, and say what came out."""
    empty = [name for name in train.columns if _both_empty(train[name], held_out[name])]
    if empty:
        kept = ~held_out[empty].isin([""]).any(axis=1)
        try:
            attempt(model, original, held_out[kept].reset_index(drop=True), double)
        except (Gap, CannotExport):
            pass
        else:
            return (
                f"Tried: without rows of '' in {', '.join(map(str, empty))} the file agrees. There '' is one value and "
                "a missing one another, which a graph can't tell apart: make one of them of both before fit."
            )
    tried = []
    if not double:
        try:
            _, got = attempt(model, original, held_out, True)
        except (Gap, CannotExport) as error:
            tried.append("double=True " + ("does not convert" if isinstance(error, CannotExport) else "differs too"))
        else:
            found = f"Tried: with double=True the file agrees to {got.parity.max_difference:.1g} on the held-out rows."
            large = _too_large(held_out)
            return f"{found} Export it so" + (
                f", or subtract an offset from column {large!r} before fit." if large else "."
            )
    whole = _whole(train, held_out)
    if whole:
        try:
            attempt(
                model,
                original,
                held_out.astype(dict.fromkeys(whole, int)),
                double,
                train.astype(dict.fromkeys(whole, int)),
            )
        except (Gap, CannotExport):
            pass
        else:
            return (
                f"Tried: with whole numbers for {', '.join(map(str, whole))} the file agrees, since callers can't send "
                f"others then. Give both tables so: astype({dict.fromkeys(map(str, whole), 'int64')})."
            )
    rounded = _rounded(held_out)
    if rounded.equals(held_out):
        return f"{_culprit(model, held_out, attempt)} No remedy is known{': ' + tried[0] if tried else ''}."
    try:
        _, got = attempt(model, original, rounded, double)
    except (Gap, CannotExport):
        tried.append("rows rounded to float32 differ too")
    else:
        return (
            f"Tried: for the same rows rounded to float32 the original agrees to {got.parity.max_difference:.1g}, so "
            f"the difference is in what float32 can't hold. Round to float32 before fit (X.astype('float32')), "
            f"{'' if double else 'for double=True does not help here, '}or allow it with tolerance=."
        )
    return f"{_culprit(model, held_out, attempt)} No remedy is known: {', and '.join(tried)}."


def _both_empty(*parts: pd.Series[Any]) -> bool:
    """Tell whether a column has empty strings and missing values."""
    column = pd.concat(parts)
    return bool(column.isna().any() and column.isin([""]).any() and not column.isin([""]).all())


def _too_large(rows: pd.DataFrame) -> str | None:
    for name in rows.columns:
        if pd.api.types.is_numeric_dtype(rows[name]) and float(rows[name].abs().max()) > FLOAT32_EXACT:
            return str(name)
    return None


def _whole(train: pd.DataFrame, held_out: pd.DataFrame) -> list[Any]:
    """Name the columns of floats that hold nothing but whole numbers."""
    floats = [name for name in train.columns if pd.api.types.is_float_dtype(train[name])]
    return [n for n in floats if all((t[n].notna() & (t[n] % 1 == 0)).all() for t in (train, held_out))]


def _rounded(rows: pd.DataFrame) -> pd.DataFrame:
    floats = [name for name in rows.columns if rows[name].dtype == np.float64]
    return rows.astype(dict.fromkeys(floats, np.float32)).astype(dict.fromkeys(floats, np.float64))


def _culprit(model: Any, held_out: pd.DataFrame, attempt: Callable[..., tuple[Trial, Compared]]) -> str:
    """Name the first step of a pipeline whose file answers otherwise."""
    steps = getattr(model, "steps", [])
    for count in range(1, len(steps)):
        part = model[:count]
        try:
            attempt(part, Original(part), held_out, False)
        except Gap:
            return f"The converter of {step_of(model, steps[count - 1][1])} answers otherwise: replace that step."
        except Exception:
            return "The converter of one of the steps answers otherwise."
    last = steps[-1][1] if steps else model
    return f"The converter of {step_of(model, last)} answers otherwise: replace that step."
