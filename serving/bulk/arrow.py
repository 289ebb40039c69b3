"""Arrow streams and Parquet: tables of typed columns, batch by batch."""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import ipc, parquet

from serving.bulk.batch import Batch, Lines, Piece, Position, gathered
from serving.bulk.reader import Reader
from serving.errors import InvalidRequest
from serving.tensors import INTEGERS, Tensors, count

MOST_MESSAGE_BYTES = 32 << 20
"""Of one message of a stream: 100,000 rows of 30 doubles fit in."""
MOST_ROWS = 1 << 18
"""Of one message: columns of nulls, or of one value, have no bytes that would bound them."""
_ROWS, _CELLS = 1 << 14, 1 << 19
"""That are read of Parquet at a time, whichever is fewer."""


class TableReader(Reader):
    """Reads tables; positions are rows."""

    _kind: str

    @abstractmethod
    def _tables(self, skip: int) -> Iterator[Any]:
        """Give the record batches behind so many rows."""

    def pieces(self) -> Iterator[Piece]:  # noqa: D102
        row = self._start.offset
        try:
            for table in self._tables(row):
                # What says of itself where its cells begin, or how they are encoded, may say anything.
                table.validate(full=True)
                for part in self._parts(table):
                    begin, row = row, row + len(part)
                    yield Piece(part, begin + 1, Position(row, row + 1))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            first = str(error).split("\n", 1)[0][:200]
            raise InvalidRequest(f"{self._kind} can't be read behind row {row}: {first}") from None

    def _parts(self, table: Any) -> Iterator[Any]:
        """Halve a table whose cells share texts until those of a part, each by itself, fit into memory."""
        if len(table) > 1 and self.columns.text_bytes(table) > MOST_MESSAGE_BYTES:
            half = len(table) // 2
            yield from self._parts(table.slice(0, half))
            yield from self._parts(table.slice(half))
        else:
            yield table

    def read(self, piece: Piece) -> Iterator[Batch]:  # noqa: D102
        lines: Lines = np.arange(piece.line, piece.end.line, dtype=np.int64)
        return gathered(self._sifted(piece.data, lines), at_once=self.columns.at_once)

    def _at_once(self, rows: Any) -> Tensors | None:
        return self.columns.feeds(rows)

    def _document(self, row: Any) -> Any:
        return {
            feature.name: _plain(row.column(feature.name)[0].as_py(), whole=feature.datatype in INTEGERS)
            for feature in self.columns.features
        }


def _plain(value: Any, *, whole: bool) -> Any:
    """Give a cell as JSON has it: NaN is how floats say that there is none."""
    if isinstance(value, list):
        return [_plain(each, whole=whole) for each in value]
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


class ArrowReader(TableReader):
    """An Arrow IPC stream, from whoever it may be."""

    _kind = "the Arrow stream"

    def _tables(self, skip: int) -> Iterator[Any]:
        stream = ipc.open_stream(pa.PythonFile(_Bounded(self._source), mode="r"))
        self.columns.check_types(stream.schema)
        for table in stream:
            if len(table) > MOST_ROWS:
                raise InvalidRequest(f"a record batch has {len(table)} rows, and the limit is {MOST_ROWS}: send fewer")
            if skip < len(table):
                yield table.slice(skip)
            skip = max(0, skip - len(table))


class _Bounded:
    """Gives a stream's bytes, and refuses messages that would take memory without bound."""

    closed = False

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._metadata_bytes = 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_MESSAGE_BYTES:
            raise InvalidRequest(
                f"an Arrow message has {size} bytes, and the limit is {MOST_MESSAGE_BYTES}: send smaller record batches"
            )
        parts = []
        left = size
        while left and (part := self._source.read(left)):  # a pipe gives what has come
            parts.append(part)
            left -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if size == 4:  # how long the metadata is that follows, or the mark before
            self._metadata_bytes = int.from_bytes(data, "little", signed=True)
        elif size == self._metadata_bytes:
            self._metadata_bytes = 0
            try:
                _check_bounded(data)
            except (struct.error, IndexError):
                raise InvalidRequest("the Arrow stream can't be read: its metadata is broken") from None
        return data


_DICTIONARY, _RECORDS = 2, 3


def _check_bounded(metadata: bytes) -> None:
    """Refuse a message whose size says nothing of what it takes. Raises InvalidRequest, struct.error, IndexError.

    Source: Message.fbs of the Arrow format, and how FlatBuffers are laid out.
    """

    def field(table: int, index: int) -> int:
        fields = table - struct.unpack_from("<i", metadata, table)[0]
        at = 4 + 2 * index
        known = at < struct.unpack_from("<H", metadata, fields)[0]
        offset = struct.unpack_from("<H", metadata, fields + at)[0] if known else 0
        return table + offset if offset else 0

    def followed(at: int) -> int:
        return at + int(struct.unpack_from("<I", metadata, at)[0])

    message = followed(0)
    kind = metadata[field(message, 1)] if field(message, 1) else 0
    if kind not in (_DICTIONARY, _RECORDS):
        return
    batch = followed(field(message, 2))
    if kind == _DICTIONARY:
        if field(batch, 2) and metadata[field(batch, 2)]:
            raise InvalidRequest("the Arrow stream has dictionaries that grow, which are not read: write it without")
        batch = followed(field(batch, 1))
    if field(batch, 3):
        raise InvalidRequest("the Arrow stream has compressed buffers, which are not read: write it uncompressed")


class ParquetReader(TableReader):
    """A Parquet file; only the model's columns are read, and no more than it takes of a row group at a time."""

    _kind = "the Parquet file"
    fits = False
    """Whether other columns may be in it, and those that may be missing left out."""

    def _tables(self, skip: int) -> Iterator[Any]:
        described = parquet.ParquetFile(self._source, pre_buffer=False, buffer_size=1 << 20)
        schema = described.schema_arrow
        self.columns.check_types(self.columns.fitted(schema) if self.fits else schema)
        there = [feature for feature in self.columns.features if feature.name in schema.names]
        absent = [name for name in self.columns.names if name not in schema.names]
        texts = [feature.name for feature in there if feature.datatype == "BYTES" and not feature.shape]
        # Texts that many rows share stay one: else a file of some KB would take gigabytes.
        file = parquet.ParquetFile(
            self._source, metadata=described.metadata, pre_buffer=False, buffer_size=1 << 20, read_dictionary=texts
        )
        self.total = file.metadata.num_rows
        cells = sum(abs(count(feature.shape)) for feature in self.columns.features)
        most = max(1, min(_ROWS, _CELLS // max(1, cells)))
        groups = list(range(file.num_row_groups))
        while groups and skip >= (rows := file.metadata.row_group(groups[0]).num_rows):
            skip -= rows
            del groups[0]
        for table in file.iter_batches(most, row_groups=groups, columns=self.columns.names, use_threads=False):
            for name in absent:
                table = table.append_column(name, pa.nulls(len(table), self.columns.types[name]))  # noqa: PLW2901
            if skip < len(table):
                yield table.slice(skip)
            skip = max(0, skip - len(table))
