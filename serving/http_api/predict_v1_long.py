"""Reads long V1 bodies in pieces, so that the event loop gets its turns; what is wrong or rare is left to others."""

from __future__ import annotations

import itertools
import operator
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import simdjson
from pydantic import ValidationError
from pydantic_core import SchemaValidator

from serving.engine.rows import Rows
from serving.engine.signature import Signature
from serving.http_api import json_pieces, number_array
from serving.http_api.json_pieces import Span
from serving.http_api.long_json import LONG_ELEMENT, values
from serving.tensor_bytes import Text, joined
from serving.tensors import FLOATS, NUMPY, Array, Tensors

_NUMBERS = frozenset({int, float})
_FAULTS = (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error, ValidationError)
"""What the readers of right rows raise for wrong ones."""


class NumberRows:
    """Makes the matrix of rows of plain numbers at twice Pydantic's speed, where every feature is a free float."""

    def __init__(self, names: list[str], dtype: np.dtype[Any]) -> None:
        self._width = len(names)
        self._pick = operator.itemgetter(*names)
        self._dtype = dtype

    def matrix(self, rows: Any, colons: int) -> Array | None:
        """Make it of rows as JSON has them; None, or an error of Python's, for anything else, wrong or right.

        As many colons as names: that tells, without a walk, that no key stands twice.
        """
        width = self._width
        named = type(rows[0]) is dict
        if colons != (len(rows) * width if named else 0):
            return None
        if named:
            pick = self._pick
            flat = list(itertools.chain.from_iterable([pick(row) for row in rows]))
        else:
            flat = list(itertools.chain.from_iterable(rows))
            if any(len(row) != width for row in rows):
                return None
        if not _NUMBERS.issuperset(map(type, flat)):
            return None
        # Standard mode refuses what is too large for the model's float; native mode would make it an infinity.
        packed = struct.pack(f"<{len(rows) * width}{self._dtype.char}", *flat)
        return np.ndarray((len(rows), width), self._dtype, packed)


class LongReader:
    """Reads rows or columns of one signature. numbers: set where all features are free floats of one matrix."""

    def __init__(self, signature: Signature, rows: Rows, numbers: NumberRows | None) -> None:
        self._rows = rows
        self._numbers = numbers
        self._dtype = NUMPY[signature.inputs[0].datatype]
        self._matrix = signature.layout == "matrix"
        self._separate = signature.batch != "none"  # rows may be read apart from each other
        self._width = len(rows.names)
        self._single = self._width == 1
        only = signature.features[0]
        refusing = only.categories is not None and only.unknown_category == "refuse"
        self._text = self._single and only.datatype == "BYTES" and not only.shape and not refusing
        plain = self._single and self._separate and only.datatype in ("FP32", "FP64") and -1 not in only.shape
        self._image = only.shape if plain else ()
        self._plain_names = not any(":" in name for name in rows.names)
        self._may_overflow = [
            spec.datatype in FLOATS - {"FP64"} and any(not f.allow_non_finite for f in signature.features)
            for spec in signature.inputs
        ]
        self._validators: dict[str | int, SchemaValidator] = {}

    def read(self, body: Text) -> tuple[Tensors, int, bool] | None:
        """Return the feeds, how many rows, and whether they came as columns; None for anything else, wrong or right."""
        if not self._separate:
            return None
        by_column = False
        try:
            span = json_pieces.instances(body)
            if span is not None:
                parts = [self._part(piece)[0] for piece in json_pieces.pieces(body, span)]
                columns = [list(column) for column in zip(*parts, strict=True)]
                del parts
                inputs = tuple([joined(column) for column in columns])
            else:
                by_column = True
                inputs = self._columns(body)
        except _FAULTS:
            return None
        if not inputs or any(
            check and np.isinf(array).any() for check, array in zip(self._may_overflow, inputs, strict=True)
        ):
            return None
        return inputs, len(inputs[0]), by_column

    def part(self, piece: bytes) -> tuple[Tensors, int] | None:
        """Make the feeds of an array of some rows, and count these; None for anything else, wrong or right."""
        try:
            if len(piece) >= LONG_ELEMENT and (found := self._long_row(piece)) is not None:
                return found, 1
            return self._part(piece)
        except _FAULTS:
            return None

    def _long_row(self, piece: bytes) -> Tensors | None:
        """Make the feeds of an array of one row that is a text or an image of numbers, and long."""
        if self._text:
            cells = values(piece)
            return self._rows.arrays([tuple(cells)]) if len(cells) == 1 and type(cells[0]) is str else None
        if self._image:
            image = number_array.numbers(piece, 1, len(piece) - 1, (1, *self._image), self._dtype)
            return None if image is None else (image,)
        return None

    def _part(self, piece: bytes) -> tuple[Tensors, int]:
        """Make the feeds of some rows, and count these; raises an error of Python's for anything else."""
        colons = piece.count(b":")
        if self._numbers is not None and not self._single:
            matrix = self._numbers.matrix(orjson.loads(piece), colons)
            if matrix is None:
                raise ValueError("these are no rows of numbers")
            return (matrix,), len(matrix)
        named = piece[1:64].lstrip(b" \t\r\n")[:1] == b"{"
        rows: list[Any]
        if named:
            # As many colons as names: no key stands twice. Pydantic would keep the last silently.
            rows = [list(row.values()) for row in self.validator("named").validate_json(piece)]
            if not self._plain_names or colons != len(rows) * self._width:
                raise ValueError("a key stands twice")
        elif self._single:
            rows = [(cell,) for cell in self.validator("single").validate_json(piece)]
        else:
            rows = self.validator("positional").validate_json(piece)
        if not rows:
            raise ValueError("nothing stands between two commas")
        return self._rows.arrays(rows), len(rows)

    def _columns(self, body: Text) -> Tensors:
        spans = json_pieces.columns(body)
        if spans is None or spans.keys() != set(self._rows.names):
            raise ValueError("these are no columns of every feature")
        read = self._cells_of if self._numbers is None else self._numbers_of
        columns = [joined(list(read(body, spans[name], i))) for i, name in enumerate(self._rows.names)]
        if len({len(column) for column in columns}) != 1:
            raise ValueError("columns have different lengths")
        return (np.stack(columns, axis=1),) if self._matrix else tuple(columns)

    def _numbers_of(self, body: Text, span: Span, index: int) -> Iterator[Array]:
        parser = simdjson.Parser()
        for piece in json_pieces.pieces(body, span):
            read = number_array.read(parser, piece) if piece.find(b"[", 1) < 0 else None
            if read is None or not read.size:
                raise ValueError("these are no numbers")
            with np.errstate(over="ignore"):
                yield read.astype(self._dtype)

    def _cells_of(self, body: Text, span: Span, index: int) -> Iterator[Array]:
        validator = self.validator(index)
        for piece in json_pieces.pieces(body, span):
            cells = validator.validate_json(piece)
            if not cells:
                raise ValueError("nothing stands between two commas")
            yield self._rows.column(index, cells)

    def validator(self, form: str | int) -> SchemaValidator:
        """Return what checks an array of rows of a form, or of one feature's cells."""
        if form not in self._validators:
            self._validators[form] = self._rows.many(form)
        return self._validators[form]
