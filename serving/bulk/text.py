"""NDJSON and CSV: whole blocks of lines at once, by V1's reader and by Arrow; where one is wrong, its rows singly."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from serving.bulk.batch import BEGIN, BadRow, Batch, Found, Lines, Piece, Position, gathered
from serving.bulk.lines import LINE, QUOTED_LINE, Splitter
from serving.bulk.reader import Reader
from serving.engine.signature import Described
from serving.errors import InvalidRequest, SignatureMismatch
from serving.protocols import csv_rows, predict_v1, strict_json
from serving.tensors import INTEGERS, Tensors

_SINGLY = 8
"""Rows among which a bad one is looked for singly: below it reading them at once costs more than it spares."""
_HEX = re.compile(rb"0[xX]")


class TextReader(Reader):
    """Reads text; positions are bytes."""

    _line = LINE
    """What a row is of."""

    def __init__(self, described: Described, source: BinaryIO, start: Position = BEGIN) -> None:
        super().__init__(described, source, start)
        # V1 knows nothing of numbers that are not finite: rows with some are tried as one by one as others.
        self._singly = 0 if any(feature.allow_non_finite for feature in self.columns.features) else _SINGLY

    def read(self, piece: Piece) -> Iterator[Batch]:  # noqa: D102
        return gathered(self._found(piece), at_once=self.columns.at_once)

    def _found(self, piece: Piece) -> Iterator[Found]:
        if isinstance(piece.data, BadRow):
            yield piece.data
            return
        lines: Lines = np.arange(piece.line, piece.end.line, dtype=np.int64)
        inputs = self._feeds(piece.data, len(lines)) if self.columns.at_once else None
        if inputs is not None:
            yield inputs, lines
        else:
            yield from self._sifted(*self._records(piece))

    def _records(self, piece: Piece) -> tuple[list[bytes], Lines]:
        """Give the rows of a piece, blank lines left out, and the number of the line that each begins at."""
        records, lines = [], []
        at, line = 0, piece.line
        while at < len(piece.data):
            found = self._line.match(piece.data, at)
            record = found[0] if found else piece.data[at:]
            if not record.isspace():
                records.append(record)
                lines.append(line)
            at += len(record)
            line += record.count(b"\n")
        return records, np.array(lines, np.int64)

    def _at_once(self, rows: Sequence[bytes]) -> Tensors | None:
        return self._feeds(b"".join(rows), len(rows))

    @abstractmethod
    def _feeds(self, data: bytes, rows: int) -> Tensors | None:
        """Make the feeds of lines that are so many good rows; None in doubt."""


class NdjsonReader(TextReader):
    """A row a line: an object by feature name, or what else V1 takes for an instance."""

    def __init__(self, described: Described, source: BinaryIO, start: Position = BEGIN) -> None:
        super().__init__(described, source, start)
        self._codec = predict_v1.Codec(described)

    def pieces(self) -> Iterator[Piece]:  # noqa: D102
        if self._start.offset:
            self._source.seek(self._start.offset)
        return Splitter(self._source.read, self._start).blocks()

    def _feeds(self, data: bytes, rows: int) -> Tensors | None:
        """Read lines as one request of V1; None unless each line must be one row of it.

        Each begins with a bracket and ends with one: as no row has an object inside, or there are as many arrays as
        lines, the one closes the other. The newlines stay between rows, so that none can be part of a text.
        """
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        if not (_fenced(data, b"{", b"}") or (_fenced(data, b"[", b"]") and data.count(b"[") == rows)):
            return None
        try:
            decoded = self._codec.decode((), b'{"instances":[%b]}' % data[:-1].replace(b"\n", b",\n"))
        except (InvalidRequest, SignatureMismatch):
            return None
        return decoded.inputs if decoded.rows == rows else None

    def _document(self, row: Sequence[bytes]) -> Any:
        try:
            return strict_json.loads(row[0])
        except InvalidRequest as error:
            raise InvalidRequest(error.message.replace("the body", "the line").replace(" at line 1,", " at")) from None


def _fenced(data: bytes, opening: bytes, closing: bytes) -> bool:
    """Tell whether each line begins and ends with a bracket."""
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == 10)
    begins = np.concatenate(([0], ends[:-1] + 1))
    return bool((text[begins] == opening[0]).all() and (text[ends - 1] == closing[0]).all())


class CsvReader(TextReader):
    """RFC 4180 with a header; the cells are read as the types of the features."""

    _line = QUOTED_LINE

    def pieces(self) -> Iterator[Piece]:  # noqa: D102
        splitter = Splitter(self._source.read, quotes=True)
        header = splitter.first()
        if not header:
            raise InvalidRequest("there is no header: name the features in the first line, with commas between them")
        self._take_header(header)
        if self._start.offset:
            self._source.seek(self._start.offset)
            splitter = Splitter(self._source.read, self._start, quotes=True)
        yield from splitter.blocks()

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

    def _feeds(self, data: bytes, rows: int) -> Tensors | None:
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

    def _document(self, row: Sequence[bytes]) -> Any:
        cells = _row(row[0])
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
