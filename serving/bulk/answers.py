"""Answers to many rows, each bad row in its place: NDJSON, CSV, Arrow, and Parquet, which is made of Arrow."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import ipc, parquet

from serving.bulk.batch import BadRow, Lines
from serving.bulk.columns import column, column_type
from serving.engine.signature import Described
from serving.protocols import strict_json
from serving.protocols.predict_v1_response import Answers
from serving.tensors import Array, Tensors

GROUP_ROWS, GROUP_BYTES = 1 << 17, 32 << 20
"""That make a row group of Parquet, whichever is reached first."""


class AnswerForm(ABC):
    """How a model's answers lie in a stream or a file: bytes that any thread makes, and that are put together.

    A whole one is its head, any rows, and its tail.
    """

    @abstractmethod
    def head(self) -> bytes:
        """Write what comes before all rows."""

    @abstractmethod
    def rows(self, outputs: Tensors) -> Any:
        """Make of the outputs of good rows, in the order of the signature's, what `together` takes."""

    @abstractmethod
    def together(self, good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> bytes:
        """Write good rows, made by `rows`, and bad ones in the order of their numbers."""

    @abstractmethod
    def tail(self, good: int, bad: int) -> bytes:
        """Write what comes after all rows: how many there were, where the format has a place for it."""

    def written(self, outputs: Tensors | None, lines: Lines, bad: Sequence[BadRow]) -> bytes:
        """Write what became of the rows of a batch. outputs: of the good ones, whose numbers are `lines`."""
        return self.together([] if outputs is None else [(self.rows(outputs), lines)], bad)


class NdjsonForm(AnswerForm):
    """A line a row, `{"prediction": ...}` as V1 has it or `{"error": ...}`; at last `{"summary": {"good", "bad"}}`."""

    def __init__(self, described: Described) -> None:
        self._answers = Answers(described.signature, described.name, described.version)

    def head(self) -> bytes:  # noqa: D102
        return b""

    def rows(self, outputs: Tensors) -> list[bytes]:  # noqa: D102
        return self._answers.texts(outputs, b'{"prediction":', b"}\n")

    def together(self, good: Sequence[tuple[list[bytes], Lines]], bad: Sequence[BadRow]) -> bytes:  # noqa: D102
        made = [line for lines, _ in good for line in lines]
        if bad:
            made += [strict_json.dumps({"error": each._asdict()}) + b"\n" for each in bad]
            made = [made[index] for index in _order(good, bad).tolist()]
        return b"".join(made)

    def tail(self, good: int, bad: int) -> bytes:  # noqa: D102
        return strict_json.dumps({"summary": {"good": good, "bad": bad}}) + b"\n"


def _order(good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> Any:
    return np.argsort(np.concatenate([*(lines for _, lines in good), [each.line for each in bad]]), kind="stable")


_ERRORS = [("error.line", pa.int64()), ("error.path", pa.string()), ("error.message", pa.string())]


class ColumnsForm(AnswerForm):
    """Columns `label` and `probabilities.<class>`, or outputs by name; and what was wrong."""

    def __init__(self, described: Described) -> None:
        self._signature = signature = described.signature
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
        """Make a RecordBatch."""
        columns = self._made(outputs)
        nulls = [pa.nulls(len(columns[0]), kind) for _, kind in _ERRORS]
        return pa.record_batch([*columns, *nulls], schema=self.schema)

    def table(self, good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> Any:
        """Make a RecordBatch of good rows and bad ones, in the order of their numbers."""
        tables = [table for table, _ in good]
        if bad or not good:
            told = [{f"error.{name}": value for name, value in each._asdict().items()} for each in bad]
            tables.append(pa.RecordBatch.from_pylist(told, schema=self.schema))
        if len(tables) > 1:
            tables = pa.Table.from_batches(tables).combine_chunks().to_batches()
        return tables[0].take(pa.array(_order(good, bad))) if bad and good else tables[0]

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


class CsvForm(ColumnsForm):
    """A header, and a line a row; what has more than one value is written as JSON in its cell."""

    def head(self) -> bytes:  # noqa: D102
        return _csv(self.table((), ()), header=True)

    def together(self, good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> bytes:  # noqa: D102
        return _csv(self.table(good, bad), header=False)

    def tail(self, good: int, bad: int) -> bytes:  # noqa: D102
        return b""


class ArrowForm(ColumnsForm):
    """An Arrow IPC stream; the last record batch is empty, and its metadata has `good` and `bad`."""

    def head(self) -> bytes:  # noqa: D102
        return bytes(self.schema.serialize())

    def together(self, good: Sequence[tuple[Any, Lines]], bad: Sequence[BadRow]) -> bytes:  # noqa: D102
        return bytes(self.table(good, bad).serialize())

    def tail(self, good: int, bad: int) -> bytes:  # noqa: D102
        sink = io.BytesIO()
        with ipc.new_stream(sink, self.schema) as stream:
            stream.write_batch(self.table((), ()), custom_metadata={"good": str(good), "bad": str(bad)})
        return sink.getvalue()[len(self.head()) :]


def as_parquet(head: bytes, sources: Iterable[Any], good: int, bad: int) -> Iterator[bytes]:
    """Give the bytes of one Parquet file of rows in `ArrowForm`; its metadata has `good` and `bad`.

    head: of the form. sources: what Arrow reads rows from, with the head before them or without. No more than a row
    group is in memory.
    """
    schema = ipc.read_schema(pa.py_buffer(head))
    sink = io.BytesIO()
    held, rows, size = [], 0, 0
    with parquet.ParquetWriter(pa.PythonFile(sink, mode="w"), schema) as file:
        for source in sources:
            for message in ipc.MessageReader.open_stream(source):
                if message.type == "schema":
                    continue
                batch = ipc.read_record_batch(message, schema)
                held.append(batch)
                rows, size = rows + len(batch), size + batch.nbytes
                if rows >= GROUP_ROWS or size >= GROUP_BYTES:
                    file.write_table(pa.Table.from_batches(held))
                    held, rows, size = [], 0, 0
                    yield _drained(sink)
        if held:
            file.write_table(pa.Table.from_batches(held))
        file.add_key_value_metadata({"good": str(good), "bad": str(bad)})
    yield _drained(sink)


def _drained(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def _csv(table: Any, *, header: bool) -> bytes:
    columns = [_as_json(column) if pa.types.is_list(column.type) else column for column in table.columns]
    sink = io.BytesIO()
    arrow_csv.write_csv(
        pa.record_batch(columns, names=table.schema.names), sink, arrow_csv.WriteOptions(include_header=header)
    )
    return sink.getvalue()


def _as_json(column: Any) -> Any:
    return pa.array([None if each is None else strict_json.dumps(each).decode() for each in column.to_pylist()])
