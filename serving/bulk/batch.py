"""What is read of many rows at a time, and what is wrong with single ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serving.errors import Detail
from serving.tensors import Tensors

Lines = NDArray[np.int64]
"""Numbers of rows, ascending, from 1: of the line that each begins at in text, where the header is line 1; of the row
elsewhere."""


class BadRow(NamedTuple):
    """A row that can't be answered: its number, a JSON pointer to its (first) bad cell, and all that is wrong."""

    line: int
    path: str
    message: str

    @classmethod
    def of(cls, line: int, details: tuple[Detail, ...], message: str) -> BadRow:
        """Make it of an error about a request of this one row, as V1 words it."""
        if not details:
            return cls(line, "", message)
        paths = ["".join(f"/{part}" for part in detail.path.split("/")[3:]) for detail in details]
        others = [f"{path or 'the row'}: {detail.message}" for path, detail in zip(paths, details, strict=True)][1:]
        return cls(line, paths[0], "; ".join([details[0].message, *others]))


class Position(NamedTuple):
    """Where reading goes on: `offset` in bytes of text, or rows; the number of the next line or row."""

    offset: int = 0
    line: int = 1


BEGIN = Position()


class Piece(NamedTuple):
    """Some of what is read, as it was read; `end`: where the next piece begins."""

    data: Any
    end: Position


class Batch(NamedTuple):
    """Some rows that were read together.

    inputs: the feeds of the good ones, in the order of the signature's inputs; None where there is none. rows: how many
    these are; lines: their numbers [rows]. bad: the others. end: where the next batch begins; None where that is amid
    what can be read again only together.
    """

    inputs: Tensors | None
    rows: int
    lines: Lines
    bad: tuple[BadRow, ...]
    end: Position | None


_MOST_BAD = 1000
"""In one batch: each takes a tenth of a millisecond to be found, and others wait for their turn meanwhile."""
NO_LINES: Lines = np.empty(0, np.int64)

Found: TypeAlias = tuple[Tensors, Lines] | BadRow
"""Feeds of good rows with the rows' numbers, or a row that is bad."""


def gathered(found: Iterable[Found], end: Position, *, at_once: bool) -> Iterator[Batch]:
    """Put together what was found, row by row, as far as rows have the same shapes, and one feed may have many."""
    parts: list[Tensors] = []
    lines: list[Lines] = []
    bad: list[BadRow] = []

    def taken(behind: Position | None) -> Batch:
        if not parts:
            batch = Batch(None, 0, NO_LINES, tuple(bad), behind)
            bad.clear()
            return batch
        inputs = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
        numbers = np.concatenate(lines)
        batch = Batch(inputs, len(numbers), numbers, tuple(bad), behind)
        for each in (parts, lines, bad):
            each.clear()
        return batch

    for each in found:
        if isinstance(each, BadRow):
            bad.append(each)
            if len(bad) >= _MOST_BAD:
                yield taken(None)
            continue
        if parts and not (at_once and all(a.shape[1:] == b.shape[1:] for a, b in zip(parts[0], each[0], strict=True))):
            yield taken(None)
        parts.append(each[0])
        lines.append(each[1])
    yield taken(end)
