"""What is said of a version's drift: the documents of the API, made of counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from serving.documented import Documented
from serving.engine.signature import Signature
from serving.monitoring.drift_test import compare, drifted
from serving.monitoring.tally import ABOVE, MISSING, OTHER, Tally
from serving.tensors import Array


class ColumnDrift(Documented):
    """One feature, or one column of an output, in a window. Shares are 0 to 1, of all rows."""

    name: str
    drifted: bool
    psi: float
    """Population stability index."""
    psi_by_chance: float
    """What it is expected to be though nothing has changed: both sides are samples."""
    jensen_shannon: float
    """Jensen-Shannon distance, 0 to 1."""
    p_value: float | None
    """Of the chi-square test, before it is corrected for the number of columns; null where there are too few rows."""
    missing: float
    unseen: float
    """Share of categories that the reference does not have."""
    out_of_range: float
    """Share of numbers beyond those of the reference."""
    edges: list[float] | None
    """Of the bins, one more than there are; null for categories."""
    categories: list[bool] | list[int] | list[str] | None
    reference: list[int]
    """Rows by bin or category."""
    window: list[int]


class Window(Documented):
    """Rows that were compared with the reference."""

    rows: int
    opened: float
    """Unix time at which the one before was closed."""
    ended: float | None
    """null: it still fills, and says nothing for sure."""
    drifted: bool
    columns: list[ColumnDrift]
    """Features first, then outputs."""


class Drift(Documented):
    """Whether the rows that a version gets now are as those that it was made for."""

    model: str
    version: str
    status: Literal["off", "no reference", "learning", "comparing"]
    """no reference: the file has none, and model.toml asks for none to be learned."""
    learned_rows: int | None = None
    """While the reference is learned: rows that this worker has so far."""
    window_rows: int
    windows: int = 0
    """Compared since the server started."""
    drifted_windows: int = 0
    window: Window | None = None
    """The last one; before there is one, the one that fills."""


def window(tallies: Sequence[Tally], counts: Array, opened: float, ended: float | None, signature: Signature) -> Window:
    """Compare a window with the reference. counts: of all columns, one vector behind the other."""
    parts, at = [], 0
    for tally in tallies:
        parts.append(counts[at : at + tally.size])
        at += tally.size
    found = [compare(tally.counts, part) for tally, part in zip(tallies, parts, strict=True)]
    shifts = drifted(found)
    columns = [
        ColumnDrift(
            name=tally.reference.name,
            drifted=shifted,
            **asdict(one),
            **_shares(tally, part),
            edges=list(tally.reference.edges) if tally.reference.edges else None,
            categories=_categories(tally, signature),
            reference=list(tally.reference.counts),
            window=part[:OTHER].tolist(),
        )
        for tally, part, one, shifted in zip(tallies, parts, found, shifts, strict=True)
    ]
    rows = int(parts[0].sum()) if parts else 0
    return Window(rows=rows, opened=opened, ended=ended, drifted=any(shifts), columns=columns)


def _shares(tally: Tally, counts: Array) -> dict[str, float]:
    rows = float(counts.sum()) or 1.0
    numbers = tally.reference.edges is not None
    other = float(counts[OTHER] + counts[ABOVE]) / rows
    return {
        "missing": float(counts[MISSING]) / rows,
        "unseen": 0.0 if numbers else other,
        "out_of_range": other if numbers else 0.0,
    }


def _categories(tally: Tally, signature: Signature) -> list[bool] | list[int] | list[str] | None:
    """Give categories by the names that callers know: a label may be a position in the list of classes."""
    values: Any = tally.reference.categories
    if values is None:
        return None
    classes = signature.classes or ()
    names = tally.reference.name == f"output {signature.label}" and classes and isinstance(classes[0], str)
    if names and all(type(value) is int and 0 <= value < len(classes) for value in values):
        return [classes[value] for value in values]
    return list(values)
