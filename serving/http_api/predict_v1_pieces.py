"""Rows and columns of long V1 bodies checked in pieces: what `predict_v1_checked` finds, in the same words."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from serving.engine.rows import Rows
from serving.engine.signature import Signature
from serving.errors import DETAILS_SHOWN, Detail, InvalidRequest, SignatureMismatch
from serving.http_api.codec import Decoded
from serving.http_api.long_json import Long, values
from serving.http_api.predict_v1_checked import Checked, Findings, dumped
from serving.http_api.predict_v1_long import LongReader
from serving.tensor_bytes import HANDOVER_S, joined
from serving.tensors import Array, Tensors

ARRAYS = frozenset({b"{[", b"{{["})
"""The brackets that rows and columns stand in."""
_CELLS = 256
"""Rows, or cells of a column, that are checked together, once one is wrong: Pydantic tells all their faults at once."""


class CheckedInPieces(Checked):
    """Reads documents whose long arrays are `Long`, for one signature. For a thread of its own."""

    def __init__(self, signature: Signature, rows: Rows, reader: LongReader) -> None:
        super().__init__(signature, rows)
        self._reader = reader

    def _by_row(self, given: Any) -> Decoded:
        if not isinstance(given, Long):
            return super()._by_row(given)
        found = Findings()
        parts: list[Tensors] = []
        count, alike = 0, True
        for piece in given.pieces():
            part = None if found.total else self._reader.part(piece)
            if part is not None:
                parts.append(part[0])
                count += part[1]
                continue
            rows = values(piece)
            checked: list[Sequence[Any]] = []
            for start in range(0, len(rows), _CELLS):
                checked += self._checked(rows[start : start + _CELLS], count + start, found)
                time.sleep(HANDOVER_S)
            count += len(rows)
            if checked and not found.total:
                try:
                    parts.append(self.rows.arrays(checked))
                except ValueError:
                    alike = False
        if not count:
            raise InvalidRequest('"instances" has no rows: send at least one')
        found.refuse("the rows do not fit the model's signature")
        self._check_count(count, "instances")
        columns: list[list[Array | None]] = [list(column) for column in zip(*parts, strict=True)]
        del parts
        inputs = _inputs(columns if alike else [[None]], "instances")
        if self._guard_finite:
            self._refuse_overflow(inputs, "instances", by_row=True)
        return Decoded(inputs, count)

    def _columns(self, given: Any) -> Decoded:
        if isinstance(given, Long):
            if self._single_only:
                given = {self.rows.names[0]: given}
            elif self.signature.layout == "matrix":
                decoded = self._by_row(given)
                return Decoded(decoded.inputs, decoded.rows, True)
            else:
                raise InvalidRequest('"inputs" is an array: send an object of columns by feature name')
        if isinstance(given, dict) and any(isinstance(column, Long) for column in given.values()):
            return self._long_columns(given)
        return super()._columns(given)

    def _long_columns(self, given: dict[str, Any]) -> Decoded:
        cells, found = self._short(given)
        parts: list[list[Array | None]] = []
        lengths: dict[str, int] = {}
        for index, name in enumerate(self.rows.names):
            column = given.get(name)
            if isinstance(column, Long):
                made, lengths[name] = self._cells(index, name, column, found[name])
            else:
                made, lengths[name] = [self._column(index, cells[name])], len(cells[name])
            parts.append(made)
        _refuse([*found.values()])
        if len(set(lengths.values())) != 1:
            raise SignatureMismatch(
                f"columns have different lengths: {', '.join(f'{k} {v}' for k, v in lengths.items())}"[:500]
            )
        count = lengths[self.rows.names[0]]
        if not count:
            raise InvalidRequest('"inputs" has no rows: send at least one')
        self._check_count(count, "inputs")
        inputs = _inputs(parts, "inputs")
        if self.signature.layout == "matrix":
            inputs = (np.stack(inputs, axis=1),)
        if self._guard_finite:
            self._refuse_overflow(inputs, "inputs", by_row=False)
        return Decoded(inputs, count, True)

    def _short(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Findings]]:
        """Check all but the long columns; return their cells, and what is wrong in the order of the features."""
        found = {name: Findings() for name in (*self.rows.names, "")}
        looked_at, more = self._bounded({k: [] if isinstance(v, Long) else v for k, v in given.items()})
        try:
            return self._validator("columns").validate_json(dumped(looked_at)), found
        except ValidationError as error:
            details = self._explain(error, ("inputs",))
            names = [each["loc"][0] if each["loc"] else "" for each in error.errors(include_url=False)]
        for name, total in Counter(names).items():
            found[str(name) if name in found else ""].total += total
        for name, detail in zip(names, details, strict=False):
            found[str(name) if name in found else ""].details.append(detail)
        found[""].total += more
        return {name: [] for name in self.rows.names}, found

    def _column(self, index: int, cells: list[Any]) -> Array | None:
        """Make the array of some cells of a feature; None where they have different shapes."""
        try:
            return self.rows.column(index, cells)
        except ValueError:
            return None

    def _cells(self, index: int, name: str, column: Long, found: Findings) -> tuple[list[Array | None], int]:
        """Make the arrays of a column's cells, and count these; what is wrong goes to `found`."""
        validator = self._reader.validator(index)
        parts: list[Array | None] = []
        count = 0
        for piece in column.pieces():
            if not found.total:
                try:
                    cells = validator.validate_json(piece)
                except ValidationError:
                    pass
                else:
                    count += len(cells)
                    parts += [self._column(index, cells)] if cells else []
                    continue
            given = values(piece)
            for start in range(0, len(given), _CELLS):
                some = given[start : start + _CELLS]
                try:
                    parts.append(self._column(index, validator.validate_json(dumped(some))))
                except ValidationError as error:
                    details = self._explain(error, ("inputs",), (name, count)) if found.wanting else []
                    found.add(error.error_count(), details)
                count += len(some)
                time.sleep(HANDOVER_S)
        return parts, count


def _inputs(parts: list[list[Array | None]], top: str) -> Tensors:
    """Put together the parts of each input. Raises SignatureMismatch where rows have different shapes."""
    inputs = []
    for column in parts:
        whole = [part for part in column if part is not None]
        try:
            inputs.append(joined(whole) if len(whole) == len(column) else None)
        except ValueError:
            inputs.append(None)
        column.clear()
    made = tuple(array for array in inputs if array is not None)
    if len(made) != len(inputs):
        raise SignatureMismatch(f"/{top}: rows have different shapes: send them one request each")
    return made


def _refuse(found: list[Findings]) -> None:
    """Raise SignatureMismatch where something is wrong with a column."""
    everything = Findings()
    details: list[Detail] = [detail for each in found for detail in each.details]
    everything.add(sum(each.total for each in found), details[:DETAILS_SHOWN])
    everything.refuse("the columns do not fit the model's signature")
