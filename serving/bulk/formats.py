"""The formats by name. Raises where the extra `serving[bulk]` is not installed, and only once one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO, Literal, TypeAlias

from serving.bulk.batch import BEGIN, Position
from serving.engine.signature import Described
from serving.errors import UnsupportedMediaType
from serving.protocols.headers import weights

if TYPE_CHECKING:
    from serving.bulk.answers import AnswerForm
    from serving.bulk.reader import Reader

Format: TypeAlias = Literal["ndjson", "csv", "arrow", "parquet"]

MEDIA_TYPES: dict[str, Format] = {
    "application/x-ndjson": "ndjson",
    "text/csv": "csv",
    "application/vnd.apache.arrow.stream": "arrow",
    "application/vnd.apache.parquet": "parquet",
}
"""What each is called over HTTP."""
SUFFIXES: dict[str, Format] = {
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".csv": "csv",
    ".arrows": "arrow",
    ".parquet": "parquet",
}
"""What each is called in a folder."""


def bulk_format(content_type: bytes) -> Format | None:
    """Return the format that a Content-Type names; None for others, such as JSON.

    >>> bulk_format(b"Text/CSV; charset=utf-8"), bulk_format(b"application/json")
    ('csv', None)
    """
    return MEDIA_TYPES.get(content_type.partition(b";")[0].strip().lower().decode("latin-1"))


def accepted_format(accept: bytes | None, given: Format) -> Format:
    """Return the format that an Accept likes best; where it names none that is known, that of what was given.

    >>> accepted_format(b"text/csv;q=0.5, application/x-ndjson, */*;q=0.1", "arrow"), accepted_format(None, "arrow")
    ('ndjson', 'arrow')
    >>> accepted_format(b"text/csv;q=0", "arrow")
    'arrow'
    """
    liked = [(weight, kind) for name, weight in weights(accept).items() if weight and (kind := bulk_format(name))]
    return max((one for one in liked if one[1] != "parquet"), key=lambda one: one[0], default=(1.0, given))[1]


def installed() -> bool:
    """Tell whether the extra is installed."""
    return find_spec("pyarrow") is not None


def check_installed() -> None:
    """Raise UnsupportedMediaType, which names the extra, where it is not installed."""
    if not installed():
        raise UnsupportedMediaType("rows in bulk need pyarrow, which is not installed: pip install 'serving[bulk]'")


def reader(kind: Format, source: BinaryIO, described: Described, start: Position = BEGIN) -> Reader:
    """Give what reads a model's rows: it is iterated for batches, in order.

    source: is read as far as is needed for the next batch; can seek where `start` is not its beginning, and for
    Parquet. start: the `end` of the piece behind which reading goes on.

    Iterating raises SignatureMismatch for columns that are not the model's, with all that are wrong, and InvalidRequest
    for what is not of the format; single rows that are bad are part of their batches.
    """
    check_installed()
    from serving.bulk import arrow, text  # noqa: PLC0415  50 MB, for those who ask

    readers: dict[Format, type[Reader]] = {
        "ndjson": text.NdjsonReader,
        "csv": text.CsvReader,
        "arrow": arrow.ArrowReader,
        "parquet": arrow.ParquetReader,
    }
    return readers[kind](described, source, start)


def answer_form(kind: Format, described: Described) -> AnswerForm:
    """Give what writes a model's answers; those of a Parquet file are written as Arrow first: see `as_parquet`."""
    check_installed()
    from serving.bulk import answers  # noqa: PLC0415  50 MB, for those who ask

    forms: dict[Format, Callable[[Described], AnswerForm]] = {"ndjson": answers.NdjsonForm, "csv": answers.CsvForm}
    return forms.get(kind, answers.ArrowForm)(described)
