"""`serving predict`: ask a running server, with rows written out or from a file."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from serving.commands.options import ApiKey, Name, Url
from serving.commands.output import explained, show
from serving.errors import Detail, InvalidRequest, SignatureMismatch
from serving.protocols import strict_json

if TYPE_CHECKING:
    from serving.client.client import Client

_AT_ONCE = 1000
"""Rows a request, of a file: a server refuses more than it lets wait."""


def predict(  # noqa: PLR0917  typer makes options of parameters
    name: Name,
    rows: Annotated[
        list[str] | None, typer.Argument(metavar="[ROW]...", help="Each a row, or an array of rows, as JSON.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A .csv with a header, or JSON, a row a line; - for standard input.")
    ] = None,
    version: Annotated[str | None, typer.Option(help="Which version answers.")] = None,
    label: Annotated[str | None, typer.Option(help="Which label's version answers.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.", min=0.001)] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one row a line, also on a terminal.")] = False,
    url: Url = "http://127.0.0.1:8080",
    api_key: ApiKey = None,
) -> None:
    """Predict, and print a prediction a row: JSON, or a table on a terminal."""
    with explained(), client_of(url, api_key, timeout) as client:
        given = _read(client, name, version, rows or [], data)
        shown = _lines if as_json or not sys.stdout.isatty() else _table
        shown(_answered(client, name, given, version=version, label=label))


@contextmanager
def client_of(url: str, api_key: str | None, timeout: float) -> Iterator[Client]:
    """Connect to a server. Raises InvalidRequest where the extra for it is missing."""
    try:
        from serving.client.client import Client  # noqa: PLC0415  an extra
    except ImportError as error:
        raise InvalidRequest(str(error)) from None
    with Client(url, api_key=api_key, timeout=timeout) as client:
        yield client


def _read(client: Client, name: str, version: str | None, rows: list[str], data: Path | None) -> Iterator[Any]:
    """Give the rows, which are read as they are asked for. Raises InvalidRequest."""
    if bool(rows) == (data is not None):
        raise InvalidRequest("""give rows, such as '{"sepal_length": 5.1, ...}', or --data FILE""")
    if data is None:
        for number, text in enumerate(rows, 1):
            yield from _rows(text, f"row {number}")
        return
    try:
        file = sys.stdin if str(data) == "-" else data.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise InvalidRequest(f"{data} can't be read: {(error.strerror or '').lower()}") from None
    with file:
        if data.suffix.lower() == ".csv":
            kinds = {f["name"]: f["datatype"] for f in client.describe(name, version)["features"]}
            yield from _csv_rows(file, kinds)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _rows(line, f"line {number}")


def _rows(text: str, place: str) -> list[Any]:
    """Read one argument: a row, or an array of rows."""
    try:
        document = strict_json.loads(text.encode(errors="surrogateescape"))
    except InvalidRequest as error:
        raise InvalidRequest(f"{place}: {error.message}") from None
    many = isinstance(document, list) and document and isinstance(document[0], dict | list)
    return document if many else [document]


def _csv_rows(file: IO[str], kinds: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Read rows by the names in the first line; kinds: datatypes by feature. An empty cell is a missing value."""
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InvalidRequest(f"line {reader.line_num}: has not as many cells as the first line has names")
            yield {name: _cell(text, kinds.get(name, "BYTES")) for name, text in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidRequest(f"line {reader.line_num + 1}: is no CSV in UTF-8: {error}") from None


_READ: tuple[Callable[[str], Any], ...] = (int, float)


def _cell(text: str, datatype: str) -> Any:
    """Read a cell as its feature's datatype; what can't be read so stays text, for the server to say so by name."""
    if datatype == "BYTES":
        return text or None
    text = text.strip()
    if datatype == "BOOL":
        return {"true": True, "false": False, "": None}.get(text.lower(), text)
    for read in _READ:
        try:
            return read(text) if text else None
        except ValueError:
            continue
    return text


def _answered(
    client: Client, name: str, rows: Iterable[Any], *, version: str | None, label: str | None
) -> Iterator[Any]:
    """Ask for some rows at a time. Raises what the server says, with the number of the row that it is about."""
    source = iter(rows)
    before = 0
    while some := list(itertools.islice(source, _AT_ONCE)):
        try:
            yield from client.predict(name, some, version=version, label=label)
        except SignatureMismatch as error:
            cells = [_placed(detail, before + detail.row + 1) for detail in error.details if detail.row is not None]
            raise InvalidRequest("; ".join(cells) or error.message) from None
        before += len(some)
    if not before:
        raise InvalidRequest("there are no rows")


def _placed(detail: Detail, number: int) -> str:
    return f"row {number}{'' if detail.feature is None else f', {detail.feature}'}: {detail.message}"


def _lines(predictions: Iterator[Any]) -> None:
    for prediction in predictions:
        typer.echo(json.dumps(prediction, ensure_ascii=False))


def _table(predictions: Iterator[Any]) -> None:
    """Show all at once: the columns are as wide as the widest."""
    cells = [_flat(prediction) for prediction in predictions]
    names = list(dict.fromkeys(name for row in cells for name in row))
    rows = [[row.get(name, "") for name in names] for row in cells]
    show(names, rows, numbers={*names} - {"label"})


def _flat(prediction: Any) -> dict[str, str]:
    """Write a prediction as cells: scores of a classifier by class, under the class's name."""
    if not isinstance(prediction, dict):
        return {"prediction": _text(prediction)}
    made: dict[str, str] = {}
    for name, value in prediction.items():
        if name in ("probabilities", "scores") and isinstance(value, dict):
            made |= {str(c): _text(score) for c, score in value.items()}
        else:
            made[name] = _text(value)
    return made


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
