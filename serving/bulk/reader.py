"""How rows of one model are read, whatever their format: many at once and, where one may be wrong, singly."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from serving.bulk.batch import BEGIN, BadRow, Batch, Found, Lines, Piece, Position
from serving.bulk.columns import ColumnBinder
from serving.engine.rows import Rows
from serving.engine.signature import Described
from serving.errors import InvalidRequest, SignatureMismatch
from serving.protocols.predict_v1_validation import Checked
from serving.tensors import Tensors


class Reader(ABC):
    """Reads batches of one model's rows.

    source: can seek where `start` is not its beginning, and for Parquet. Iterating it, and cutting it into pieces,
    raises SignatureMismatch for columns that are not the model's, and InvalidRequest for what is not of the format.
    """

    total: int | None = None
    """How many rows there are in all, where positions are rows: known once the first are read."""
    _singly = 0
    """Rows among which a bad one is looked for one by one."""

    def __init__(self, described: Described, source: BinaryIO, start: Position = BEGIN) -> None:
        self.columns = ColumnBinder(described.signature)
        self._checked = Checked(described.signature, Rows(described.signature, described.name))
        self._source = source
        self._start = start

    def __iter__(self) -> Iterator[Batch]:
        """Read on."""
        for piece in self.pieces():
            yield from self.read(piece)

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Cut what is read into pieces, which `read` may read on any thread, in any order."""

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[Batch]:
        """Read a piece."""

    @abstractmethod
    def _at_once(self, rows: Any) -> Tensors | None:
        """Make the feeds of rows that are all good; None in doubt."""

    @abstractmethod
    def _document(self, row: Any) -> Any:
        """Give a slice of one row as V1 has it in JSON. Raises InvalidRequest."""

    def _sifted(self, rows: Any, lines: Lines) -> Iterator[Found]:
        """Find the bad ones by halves. rows: have a length and slices."""
        if self.columns.at_once and len(rows) > self._singly:
            inputs = self._at_once(rows)
            if inputs is not None:
                yield inputs, lines
                return
            if len(rows) > 1:
                half = len(rows) // 2
                yield from self._sifted(rows[:half], lines[:half])
                yield from self._sifted(rows[half:], lines[half:])
                return
        for index, line in enumerate(lines.tolist()):
            yield self._single(rows[index : index + 1], line)

    def _single(self, row: Any, line: int) -> Found:
        time.sleep(0)  # such rows take the interpreter a while: whoever serves has a turn between them
        try:
            return self._checked.read({"instances": [self._document(row)]}).inputs, np.array([line], np.int64)
        except (SignatureMismatch, InvalidRequest) as error:
            return BadRow.of(line, error.details, error.message)
