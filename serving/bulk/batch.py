"""What is read of many rows at a time, and what is wrong with single ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    """Some of what is read, before its cells are.

    data: whole lines of text, each with its end, a newline; a RecordBatch; or a row that is bad. line: number of the
    first; end: where the next piece begins.
    """

    data: Any
    line: int
    end: Position


class Batch(NamedTuple):
    """Some rows that were read together.

    inputs: the feeds of the good ones, in the order of the signature's inputs; None where there is none. lines: their
    numbers [rows]. bad: the others.
    """

    inputs: Tensors | None
    lines: Lines
    bad: tuple[BadRow, ...]

    @property
    def rows(self) -> int:
        """How many are good."""
        return len(self.lines)


_MOST_BAD = 1000
"""In one batch: each takes a tenth of a millisecond to be found, and others wait for their turn meanwhile."""
NO_LINES: Lines = np.empty(0, np.int64)

Good: TypeAlias = tuple[Tensors, Lines]
"""Arrays of good rows, and the rows' numbers."""
Found: TypeAlias = Good | BadRow


def gathered(found: Iterable[Found], *, at_once: bool) -> Iterator[Batch]:
    """Put together what was found, row by row, as far as rows have the same shapes, and one feed may have many."""
    good: list[Good] = []
    bad: list[BadRow] = []
    for each in found:
        apart = not isinstance(each, BadRow) and good and not (at_once and _alike(good[0], each))
        if apart or len(bad) >= _MOST_BAD:
            yield _batch(good, bad)
            good, bad = [], []
        if isinstance(each, BadRow):
            bad.append(each)
        else:
            good.append(each)
    yield _batch(good, bad)


def _alike(one: Good, other: Good) -> bool:
    return all(a.shape[1:] == b.shape[1:] for a, b in zip(one[0], other[0], strict=True))


def _batch(good: Sequence[Good], bad: Sequence[BadRow]) -> Batch:
    if len(good) == 1:
        return Batch(*good[0], tuple(bad))
    if not good:
        return Batch(None, NO_LINES, tuple(bad))
    inputs = tuple(np.concatenate(arrays) for arrays in zip(*(arrays for arrays, _ in good), strict=True))
    return Batch(inputs, np.concatenate([lines for _, lines in good]), tuple(bad))
