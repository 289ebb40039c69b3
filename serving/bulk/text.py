"""NDJSON and CSV: whole blocks of lines at once by Arrow, and where one is wrong, its rows singly by V1's rules."""

from __future__ import annotations

import io
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv
from pyarrow import json as arrow_json

from serving.bulk.batch import BEGIN, NO_LINES, BadRow, Batch, Found, Lines, Piece, Position, gathered
from serving.bulk.columns import ColumnBinder
from serving.bulk.lines import Block, Splitter
from serving.engine.rows import Rows
from serving.engine.signature import Described
from serving.errors import InvalidRequest, SignatureMismatch
from serving.protocols import csv_rows, predict_v1, strict_json
from serving.protocols.predict_v1_validation import Checked
from serving.tensors import INTEGERS, Tensors

_SINGLY = 8
"""Rows among which a bad one is looked for singly: below it Arrow costs more than it spares."""
_SPREAD_ROWS = 100
"""For a thread: fewer would be no gain, and rows that are as long as what a thread gets are refused."""
_HEX = re.compile(rb"0[xX]")


class TextReader(ABC):
    """Reads batches of one model's rows from text. `source` can seek where `start` is not its beginning."""

    quotes = False
    spread = False
    """Whether reading may take all processors, where that is worth it; else it takes the calling thread alone."""
    total = None
    """Positions are bytes, and a file's size is known."""

    def __init__(self, described: Described, source: BinaryIO, start: Position = BEGIN) -> None:
        self.columns = ColumnBinder(described.signature)
        self._checked = Checked(described.signature, Rows(described.signature, described.name))
        self._source = source
        self._start = start
        # V1 knows nothing of numbers that are not finite: rows with some are tried as one by one as others.
        self._singly = 0 if any(feature.allow_non_finite for feature in self.columns.features) else _SINGLY

    def __iter__(self) -> Iterator[Batch]:
        """Read on. Raises SignatureMismatch for columns that are not the model's, InvalidRequest for other text."""
        for piece in self.pieces():
            yield from self.read(piece)

    def pieces(self) -> Iterator[Piece]:
        """Cut what is read into pieces, which `read` may read on any thread, in any order. Raises as `__iter__`."""
        if self._start.offset:
            self._source.seek(self._start.offset)
        splitter = Splitter(self._source.read, self._start, quotes=self.quotes)
        self._begin(splitter)
        for block in splitter.blocks():
            yield Piece(block, splitter.position)

    def _begin(self, splitter: Splitter) -> None:  # noqa: B027  not all have a header
        """Read what comes before the rows."""

    def read(self, piece: Piece) -> Iterator[Batch]:
        """Read a piece."""
        block = piece.data
        if isinstance(block, BadRow):
            yield Batch(None, 0, NO_LINES, (block,), piece.end)
        else:
            yield from self._batches(block)

    @abstractmethod
    def _at_once(self, data: bytes, rows: int) -> Tensors | None:
        """Make the feeds of lines that are so many good rows; None in doubt."""

    @abstractmethod
    def _records(self, block: Block) -> list[tuple[int, bytes]]:
        """Give the rows of a block, each with the number of its line."""

    @abstractmethod
    def _document(self, record: bytes) -> Any:
        """Read one row as V1 has it in JSON. Raises InvalidRequest."""

    def _batches(self, block: Block) -> Iterator[Batch]:
        rows = block.end.line - block.line
        inputs = self._at_once(block.data, rows) if self.columns.at_once else None
        if inputs is not None:
            lines: Lines = np.arange(block.line, block.end.line, dtype=np.int64)
            yield Batch(inputs, rows, lines, (), block.end)
        else:
            yield from gathered(self._sifted(self._records(block)), block.end, at_once=self.columns.at_once)

    def _sifted(self, records: Sequence[tuple[int, bytes]]) -> Iterator[Found]:
        """Find the bad ones, by halves."""
        if self.columns.at_once and len(records) > self._singly:
            inputs = self._at_once(b"".join([record for _, record in records]), len(records))
            if inputs is not None:
                yield inputs, np.array([line for line, _ in records], np.int64)
                return
            if len(records) > 1:
                middle = len(records) // 2
                yield from self._sifted(records[:middle])
                yield from self._sifted(records[middle:])
                return
        yield from map(self._single, records)

    def _single(self, numbered: tuple[int, bytes]) -> Found:
        line, record = numbered
        time.sleep(0)  # such rows take the interpreter a while: whoever serves has a turn between them
        try:
            return self._checked.read({"instances": [self._document(record)]}).inputs, np.array([line], np.int64)
        except SignatureMismatch as error:
            return BadRow.of(line, error.details, error.message)
        except InvalidRequest as error:
            return BadRow(line, "", error.message)


class NdjsonReader(TextReader):
    """A row a line: an object by feature name, or what else V1 takes for an instance."""

    def __init__(self, described: Described, source: BinaryIO, start: Position = BEGIN) -> None:
        super().__init__(described, source, start)
        self._codec = predict_v1.Codec(described)
        self._parsing = arrow_json.ParseOptions(
            explicit_schema=pa.schema(list(self.columns.types.items())), unexpected_field_behavior="error"
        )
        self._colons = sum(1 + name.count(":") for name in self.columns.names)
        self._nullable = any(feature.nullable for feature in self.columns.features)

    def _at_once(self, data: bytes, rows: int) -> Tensors | None:
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        if _fenced(data, b"{", b"}"):  # the schema allows none inside: each line is an object, or several
            return self._named(data, rows)
        if _fenced(data, b"[", b"]") and data.count(b"[") == rows:
            try:
                decoded = self._codec.quick(b'{"instances":[%b]}' % data[:-1].replace(b"\n", b","))
            except SignatureMismatch:
                return None
            return decoded.inputs if decoded is not None and decoded.rows == rows else None
        return None

    def _named(self, data: bytes, rows: int) -> Tensors | None:
        spread = self.spread and rows > _SPREAD_ROWS * pa.cpu_count()
        try:
            if not data.isascii():
                data.decode()
            table = arrow_json.read_json(
                pa.BufferReader(data),
                read_options=arrow_json.ReadOptions(
                    use_threads=spread, block_size=len(data) // (pa.cpu_count() if spread else 1) + 1
                ),
                parse_options=self._parsing,
            )
        except (pa.ArrowInvalid, UnicodeDecodeError):
            return None
        if len(table) != rows:
            return None
        batch = table.combine_chunks().to_batches()[0]
        # A key that is not there reads like a null.
        nulls = self._nullable and any(column.null_count for column in batch.columns)
        if nulls and data.count(b":") != rows * self._colons + sum(map(_colons_within, batch.columns)):
            return None
        return self.columns.feeds(batch, nan_is_missing=False, infinite=False)

    def _records(self, block: Block) -> list[tuple[int, bytes]]:
        lines = io.BytesIO(block.data)  # which, other than `splitlines`, has none end with a bare carriage return
        return [(line, record) for line, record in enumerate(lines, block.line) if not record.isspace()]

    def _document(self, record: bytes) -> Any:
        try:
            return strict_json.loads(record)
        except InvalidRequest as error:
            raise InvalidRequest(error.message.replace("the body", "the line").replace(" at line 1,", " at")) from None


def _colons_within(column: Any) -> int:
    """Count those in texts."""
    while pa.types.is_list(column.type):
        column = column.flatten()
    return (pc.sum(pc.count_substring(column, ":")).as_py() or 0) if pa.types.is_string(column.type) else 0


def _fenced(data: bytes, opening: bytes, closing: bytes) -> bool:
    """Tell whether each line begins and ends with a bracket."""
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == 10)
    begins = np.concatenate(([0], ends[:-1] + 1))
    return bool((text[begins] == opening[0]).all() and (text[ends - 1] == closing[0]).all())


class CsvReader(TextReader):
    """RFC 4180 with a header; the cells are read as the types of the features."""

    quotes = True

    def _begin(self, splitter: Splitter) -> None:
        if self._start.offset:
            self._source.seek(0)
        begun = Splitter(self._source.read, quotes=True) if self._start.offset else splitter
        header = begun.first()
        if header is None:
            raise InvalidRequest("there is no header: name the features in the first line, with commas between them")
        self._take_header(header.data)
        if self._start.offset:
            self._source.seek(self._start.offset)

    def _take_header(self, line: bytes) -> None:
        self._names = _row(line)
        hint = ": write commas between columns" if ";" in self._names[0] or "\t" in self._names[0] else ""
        self.columns.check_names(self._names, hint)
        features = {feature.name: feature for feature in self.columns.features}
        self._features = [features[name] for name in self._names]
        self._arrays = any(feature.shape for feature in self._features)
        self._integers = any(feature.datatype in INTEGERS for feature in self._features)
        self._conversion = arrow_csv.ConvertOptions(
            column_types=self.columns.types,
            null_values=list(csv_rows.MISSING),
            strings_can_be_null=False,
            true_values=list(csv_rows.TRUE),
            false_values=list(csv_rows.FALSE),
        )

    def _at_once(self, data: bytes, rows: int) -> Tensors | None:
        if self._arrays or (self._integers and _HEX.search(data)):  # Arrow reads such numbers, and nobody else does
            return None
        if data.count(b"\r") != data.count(b"\r\n"):  # where Arrow ends a line, and nothing else here does
            return None
        if b'"' in data and not _well_quoted(data):
            return None
        try:
            table = arrow_csv.read_csv(
                pa.BufferReader(data),
                read_options=arrow_csv.ReadOptions(
                    use_threads=False, block_size=len(data) + 1, column_names=self._names
                ),
                parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
                convert_options=self._conversion,
            )
        except pa.ArrowInvalid:
            return None
        if len(table) != rows:
            return None
        return self.columns.feeds(
            table.combine_chunks().to_batches()[0], nan_is_missing=False
        )  # that is one of MISSING

    def _records(self, block: Block) -> list[tuple[int, bytes]]:
        records: list[tuple[int, bytes]] = []
        begun, parts, quotes = block.line, [], 0
        for number, line in enumerate(block.data.split(b"\n")[:-1], block.line):
            parts.append(line)
            quotes += line.count(b'"')
            if quotes % 2 == 0:
                record = b"\n".join(parts) + b"\n"
                if not record.isspace():
                    records.append((begun, record))
                begun, parts, quotes = number + 1, [], 0
        if parts:
            records.append((begun, b"\n".join(parts) + b"\n"))
        return records

    def _document(self, record: bytes) -> Any:
        cells = _row(record)
        if len(cells) != len(self._names):
            raise InvalidRequest(f"has {len(cells)} cells, and the header has {len(self._names)}")
        return {
            feature.name: csv_rows.value(cell, feature) for feature, cell in zip(self._features, cells, strict=True)
        }


_BESIDE = np.isin(np.arange(256), list(b'",\r\n'))
"""By byte, whether it may stand outside of a quote that is around a cell, or beside one of two."""


def _well_quoted(data: bytes) -> bool:
    """Tell whether quotes are around whole cells, and two inside of these; Arrow takes `"5"1` for 51."""
    text = np.frombuffer(data, np.uint8)  # whose last byte is a newline
    quotes = np.flatnonzero(text == ord('"'))
    return bool(_BESIDE[text[quotes[::2] - 1]].all() and _BESIDE[text[quotes[1::2] + 1]].all())


def _row(line: bytes) -> list[str]:
    """Split a line into cells. Raises InvalidRequest."""
    rows = csv_rows.split(line)
    if len(rows) > 1:
        raise InvalidRequest("a carriage return is no end of a line: write a newline, or quotes around the cell")
    return rows[0] if rows else [""]
