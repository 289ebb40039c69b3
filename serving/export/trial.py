"""Converts a model, and lets the file through only where it answers as the original does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx
import pandas as pd

from serving.export.asked import Asked, Layout
from serving.export.edges import Edge, edge_rows, typed
from serving.export.features import features_of, feeds_of
from serving.export.original import Original
from serving.export.parity import Compared, Gap, ParityError, differences
from serving.export.progress import Say
from serving.export.refusal import CannotExport, known_remedy, one_line, step_of
from serving.export.session import Session
from serving.tensors import Array

FLOAT32_EXACT = 2**24


class Trial:
    """A file that was made or brought, and what it answers for the held-out rows.

    layout: how a table without an image goes in. keys: the classes of a ZipMap that it had. Raises what onnxruntime
    raises.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        session: Session,
        asked: Asked,
        layout: Layout,
        keys: tuple[Any, ...] | None = None,
    ) -> None:
        self.proto = proto
        self.session = session
        self.features = features_of(asked)
        self.layout: Layout = "columns" if asked.image else layout
        self.keys = keys
        self._image = asked.image
        self.feeds = self.feeds_of(asked.held_out)
        self.outputs = session.run(self.feeds)

    def feeds_of(self, table: pd.DataFrame) -> tuple[Array, ...]:
        """Make the file's inputs of a table's rows."""
        return feeds_of(table, self.session.signature.inputs, layout=self.layout, image=self._image)


def proven(model: Any, asked: Asked, say: Say) -> tuple[Trial, Compared]:
    """Convert, and compare on held-out rows and at the edges. Raises CannotExport or ParityError."""
    try:
        return _attempt(model, asked, say)
    except Gap as gap:
        say("looking for a remedy")
        raise _unlike(model, asked, gap) from gap


def _attempt(model: Any, asked: Asked, say: Say = lambda text: None) -> tuple[Trial, Compared]:
    """Convert and compare once. Raises CannotExport or Gap."""
    from serving.export import convert  # noqa: PLC0415  skl2onnx is slow to import, and not wanted for a file

    original = Original(model)
    features = features_of(asked)
    expected = _said(original, asked.held_out)
    layout: Layout = "matrix" if asked.image else convert.layout_of(model, features)
    say(f"converting{' to float64' if asked.double else ''}")
    proto = convert.to_onnx(model, original, features, asked, layout)
    say("comparing")
    try:
        made = Trial(proto, Session(proto), asked, layout)
    except Exception as error:
        raise Gap(f"the file can't answer: {one_line(error)}") from error
    compared = differences(expected, made.outputs, rows=asked.held_out, tolerance=asked.tolerance)
    if asked.image is None and (closed := _closed(original, made, asked)):
        made.features = features_of(asked, closed)
    return made, compared


def _said(original: Original, rows: pd.DataFrame) -> dict[str, Array]:
    try:
        return original.ask(rows)
    except CannotExport:
        raise
    except Exception as error:
        if "NotFitted" in type(error).__name__:
            raise CannotExport("the model", "is not fitted", "call its fit first") from error
        why = f"the model itself refuses these rows: {one_line(error)}"
        raise CannotExport("held_out", why, "give rows as it takes them") from error


def _closed(original: Original, made: Trial, asked: Asked) -> set[str]:
    """Ask both for rows at the edge; return the columns of which values that training did not see must be refused.

    Raises Gap where they differ otherwise.
    """
    edges, rows = edge_rows(asked.train, asked.held_out, made.features)
    said = _each(original.ask, typed(rows, asked.train))
    given = _each(lambda part: made.session.run(made.feeds_of(part)), rows)
    closed: set[str] = set()
    for position, (edge, due, got) in enumerate(zip(edges, said, given, strict=True)):
        unseen = edge.kind == "unseen"
        if due is None:  # the original refuses the row: where it is for a new category, the server does so too
            closed |= {edge.column} if unseen else set()
            continue
        one = rows.iloc[[position]].reset_index(drop=True)
        try:
            if got is None:
                raise Gap("the file can't answer it")
            differences(due, got, rows=one, tolerance=asked.tolerance)
        except Gap as gap:
            if not unseen:
                raise Gap(f"{_shown(edge, one)}: {gap}") from gap
            closed.add(edge.column)
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


class _Remedy(NamedTuple):
    """What may make a file agree: it is named only once it did."""

    what: str
    asked: Asked
    advice: str


def _unlike(model: Any, asked: Asked, gap: Gap) -> ParityError | CannotExport:
    """Say what is different, and what helps: a remedy that was tried, or what is known of the step at fault."""
    tried = []
    for remedy in _remedies(asked):
        try:
            _, got = _attempt(model, remedy.asked)
        except (Gap, CannotExport) as error:
            tried.append(f"{remedy.what} {'does not convert' if isinstance(error, CannotExport) else 'differs too'}")
        else:
            agrees = f"with {remedy.what} the file agrees to {got.parity.max_difference:.1g}"
            return ParityError(f"{gap}. Tried: {agrees}. {remedy.advice}.")
    culprit = _culprit(model, asked)
    if instead := known_remedy(culprit):
        return CannotExport(step_of(model, culprit), f"answers otherwise as a graph: {gap}", instead)
    return ParityError(
        f"{gap}. The converter of {step_of(model, culprit)} answers otherwise: replace that step. "
        f"No remedy is known{': ' if tried else ''}{', and '.join(tried)}."
    )


def _remedies(asked: Asked) -> Iterator[_Remedy]:
    """Find what may help for such rows; the likeliest first."""
    train, held_out = asked.train, asked.held_out
    empty = [name for name in train.columns if _both_empty(train[name], held_out[name])]
    if empty:
        kept = ~held_out[empty].isin([""]).any(axis=1)
        yield _Remedy(
            f"no '' in {', '.join(map(str, empty))}",
            replace(asked, held_out=held_out[kept].reset_index(drop=True)),
            "There '' is one value and a missing one another, which a graph can't tell apart: make one of them of both "
            "before fit",
        )
    if not asked.double:
        large = _too_large(held_out)
        offset = f", or subtract an offset from column {large!r} before fit" if large else ""
        yield _Remedy("double=True", replace(asked, double=True), f"Export it so{offset}")
    if whole := _whole(train, held_out):
        kinds = dict.fromkeys(whole, int)
        yield _Remedy(
            f"whole numbers for {', '.join(map(str, whole))}",
            replace(asked, train=train.astype(kinds), held_out=held_out.astype(kinds)),
            f"Callers can't send others then. Give both tables so: astype({dict.fromkeys(map(str, whole), 'int64')})",
        )
    rounded = _rounded(held_out)
    if not rounded.equals(held_out):
        yield _Remedy(
            "these rows rounded to float32",
            replace(asked, held_out=rounded),
            "The difference is in what float32 can't hold: round to float32 before fit (X.astype('float32')), or allow "
            "it with tolerance=",
        )


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


def _culprit(model: Any, asked: Asked) -> Any:
    """Find the first step of a pipeline whose file answers otherwise; the model itself where that can't be told."""
    steps = getattr(model, "steps", [])
    for count in range(1, len(steps)):
        try:
            _attempt(model[:count], replace(asked, double=False))
        except Gap:
            return steps[count - 1][1]
        except Exception:
            return model
    return steps[-1][1] if steps else model
