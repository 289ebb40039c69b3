"""Answers to many rows, written as they come: NDJSON, CSV, Arrow or Parquet, each bad row in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import ipc, parquet

from serving.bulk.batch import NO_LINES, BadRow, Lines
from serving.bulk.columns import column, column_type
from serving.engine.signature import Described, Signature
from serving.protocols import strict_json
from serving.protocols.predict_v1_response import Answers
from serving.tensors import Array, Tensors

GROUP_ROWS, GROUP_BYTES = 1 << 17, 32 << 20
"""That make a row group of Parquet, whichever is reached first."""


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> Any:
        """Take some."""


class Writer(ABC):
    """Writes answers of one model's rows to a sink."""

    def __init__(self, described: Described, sink: Sink) -> None:
        self._sink = sink

    @abstractmethod
    def write(self, outputs: Tensors | None, lines: Lines, bad: Sequence[BadRow]) -> None:
        """Write what became of the rows of a batch, in the order of their numbers.

        outputs: of the good rows, in the order of the signature's outputs. lines: their numbers.
        """

    @abstractmethod
    def close(self, good: int, bad: int) -> None:
        """Write what comes last: how many rows were answered, and how many were not, where the format has a place."""


class AnswerLines:
    """A model's answers as lines of NDJSON: `{"prediction": ...}` as V1 has it, or `{"error": ...}`."""

    def __init__(self, described: Described) -> None:
        self._answers = Answers(described.signature, described.name, described.version)

    def rows(self, outputs: Tensors) -> list[bytes]:
        """Write a line for each row."""
        return self._answers.texts(outputs, b'{"prediction":', b"}\n")

    def together(self, good: Sequence[tuple[list[bytes], Lines]], bad: Sequence[BadRow]) -> bytes:
        """Put lines of good rows and bad rows in the order of their numbers."""
        made = [line for lines, _ in good for line in lines]
        if bad:
            made += [strict_json.dumps({"error": each._asdict()}) + b"\n" for each in bad]
            made = [made[index] for index in _order(good, bad).tolist()]
        return b"".join(made)


class NdjsonWriter(Writer):
    """A line a row, and at last `{"summary": {"good": ..., "bad": ...}}`."""

    def __init__(self, described: Described, sink: Sink) -> None:
        super().__init__(described, sink)
        self._lines = AnswerLines(described)

    def write(self, outputs: Tensors | None, lines: Lines, bad: Sequence[BadRow]) -> None:  # noqa: D102
        good = [] if outputs is None else [(self._lines.rows(outputs), lines)]
        self._sink.write(self._lines.together(good, bad))

    def close(self, good: int, bad: int) -> None:  # noqa: D102
        self._sink.write(strict_json.dumps({"summary": {"good": good, "bad": bad}}) + b"\n")


def _order(good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> Any:
    return np.argsort(np.concatenate([*(lines for _, lines in good), [each.line for each in bad]]), kind="stable")


_ERRORS = [("error.line", pa.int64()), ("error.path", pa.string()), ("error.message", pa.string())]


class AnswerColumns:
    """A model's answers as columns: `label` and `probabilities.<class>`, or outputs by name; and what was wrong."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._outputs = {spec.name: position for position, spec in enumerate(signature.outputs)}
        fields: list[tuple[str, Any]] = []
        classes = signature.classes or ()
        scores = signature.outputs[self._outputs[signature.scores]] if signature.scores else None
        self._by_class = signature.answers_by_class and scores is not None and scores.shape[1:] == (len(classes),)
        if self._by_class and scores is not None:
            label = signature.outputs[self._outputs[str(signature.label)]]
            self._names = isinstance(classes[0], str)
            fields.append(("label", pa.string() if self._names else column_type(label.datatype, 0)))
            fields += [(f"{signature.scores_key}.{c}", column_type(scores.datatype, 0)) for c in classes]
        else:
            for spec in signature.outputs:
                dims = spec.shape if signature.batch == "none" else spec.shape[1:]
                flat = signature.batch != "none" and dims == (1,)
                fields.append((spec.name, column_type(spec.datatype, 0 if flat else len(dims))))
        self.schema = pa.schema([*fields, *_ERRORS])

    def rows(self, outputs: Tensors) -> Any:
        """Make a RecordBatch of good rows."""
        columns = self._made(outputs)
        nulls = [pa.nulls(len(columns[0]), kind) for _, kind in _ERRORS]
        return pa.record_batch([*columns, *nulls], schema=self.schema)

    def together(self, good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> Any:
        """Make a RecordBatch of those of good rows and of bad rows, in the order of their numbers."""
        tables = [table for table, _ in good]
        if bad:
            errors = [pa.array(values, kind) for values, (_, kind) in zip(zip(*bad, strict=True), _ERRORS, strict=True)]
            wide = list(self.schema)[: -len(_ERRORS)]
            nulls = [pa.nulls(len(bad), field.type) for field in wide]
            tables.append(pa.record_batch([*nulls, *errors], schema=self.schema))
        if not tables:
            return pa.record_batch([pa.nulls(0, field.type) for field in self.schema], schema=self.schema)
        if len(tables) > 1:
            tables = pa.Table.from_batches(tables).combine_chunks().to_batches()
        return tables[0].take(pa.array(_order(good, bad))) if bad and good else tables[0]

    def table(self, outputs: Tensors | None, lines: Lines, bad: Sequence[BadRow]) -> Any:
        """Make a RecordBatch of what became of some rows."""
        return self.together([] if outputs is None else [(self.rows(outputs), lines)], bad)

    def _made(self, outputs: Tensors) -> list[Any]:
        signature = self._signature
        types = [self.schema.field(i).type for i in range(len(self.schema) - len(_ERRORS))]
        if self._by_class:
            labels = outputs[self._outputs[str(signature.label)]].reshape(-1)
            scores = outputs[self._outputs[str(signature.scores)]]
            return [self._labels(labels), *(column(scores[:, i], kind) for i, kind in enumerate(types[1:]))]
        if signature.batch == "none":
            outputs = tuple(output[None] for output in outputs)
        return [column(output, kind) for output, kind in zip(outputs, types, strict=True)]

    def _labels(self, labels: Array) -> Any:
        if self._names and labels.dtype.kind in "iu":  # an index into the classes
            classes = self._signature.classes or ()
            if len(labels) and labels.min() >= 0 and labels.max() < len(classes):
                return pa.DictionaryArray.from_arrays(labels, pa.array(classes)).dictionary_decode()
            return pa.array([classes[i] if 0 <= i < len(classes) else str(i) for i in labels.tolist()], pa.string())
        return pa.array(labels, self.schema.field("label").type)


class CsvWriter(Writer):
    """A header, and a row each; what has more than one value is written as JSON in its cell."""

    def __init__(self, described: Described, sink: Sink, *, header: bool = True) -> None:
        super().__init__(described, sink)
        self._columns = AnswerColumns(described.signature)
        self._header = header

    def write(self, outputs: Tensors | None, lines: Lines, bad: Sequence[BadRow]) -> None:  # noqa: D102
        self._write(self._columns.table(outputs, lines, bad))

    def _write(self, table: Any) -> None:
        self._sink.write(csv_bytes(table, header=self._header))
        self._header = False

    def close(self, good: int, bad: int) -> None:  # noqa: D102
        if self._header:
            self._write(self._columns.table(None, NO_LINES, ()))


class ArrowWriter(Writer):
    """An Arrow IPC stream; the last record batch is empty, and its metadata has `good` and `bad`."""

    def __init__(self, described: Described, sink: Sink) -> None:
        super().__init__(described, sink)
        self._columns = AnswerColumns(described.signature)
        self._stream = ipc.new_stream(pa.PythonFile(_Open(sink), mode="w"), self._columns.schema)

    def write(self, outputs: Tensors | None, lines: Lines, bad: Sequence[BadRow]) -> None:  # noqa: D102
        self._stream.write_batch(self._columns.table(outputs, lines, bad))

    def close(self, good: int, bad: int) -> None:  # noqa: D102
        counts = {"good": str(good), "bad": str(bad)}
        self._stream.write_batch(self._columns.table(None, NO_LINES, ()), custom_metadata=counts)
        self._stream.close()


class ParquetWriter(Writer):
    """A Parquet file; its metadata has `good` and `bad`."""

    def __init__(self, described: Described, sink: Sink) -> None:
        super().__init__(described, sink)
        self._columns = AnswerColumns(described.signature)
        self._file = parquet.ParquetWriter(pa.PythonFile(_Open(sink), mode="w"), self._columns.schema)
        self._held: list[Any] = []

    def write(self, outputs: Tensors | None, lines: Lines, bad: Sequence[BadRow]) -> None:  # noqa: D102
        self._held.append(self._columns.table(outputs, lines, bad))
        if sum(map(len, self._held)) >= GROUP_ROWS or sum(table.nbytes for table in self._held) >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._file.write_table(pa.Table.from_batches(self._held))
            self._held = []

    def close(self, good: int, bad: int) -> None:  # noqa: D102
        self._flush()
        self._file.add_key_value_metadata({"good": str(good), "bad": str(bad)})
        self._file.close()


class _Open:
    """A sink as Arrow wants it: a file that is open, and stays so."""

    closed = False

    def __init__(self, sink: Sink) -> None:
        self.write = lambda data: sink.write(bytes(data))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def csv_bytes(table: Any, *, header: bool) -> bytes:
    """Write a RecordBatch as CSV."""
    columns = [_as_json(column) if pa.types.is_list(column.type) else column for column in table.columns]
    made = pa.BufferOutputStream()
    options = arrow_csv.WriteOptions(include_header=header)
    arrow_csv.write_csv(pa.record_batch(columns, names=table.schema.names), made, options)
    written: bytes = made.getvalue().to_pybytes()
    return written


def _as_json(column: Any) -> Any:
    return pa.array([None if each is None else strict_json.dumps(each).decode() for each in column.to_pylist()])
