"""MLflow's scoring protocol, which SageMaker, Vertex, Azure ML and Databricks speak as far as they say anything.

Rows as `dataframe_split`, `dataframe_records`, `instances` or `inputs`, as CSV or as Parquet; the answer is
{"predictions": [one a row]}. Other members (`params`, Vertex's `parameters`, Databricks' `client_request_id`) change
nothing in an ONNX model, and columns that it does not have are left out, as MLflow does.
Sources: https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally and
https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

from serving.engine.signature import Described
from serving.errors import Detail, InvalidRequest, SignatureMismatch, UnsupportedMediaType, listed
from serving.protocols import csv_rows, predict_v1, strict_json
from serving.protocols.codec import Decoded, Elsewhere, Later, Spare
from serving.protocols.headers import JSON, Headers, header
from serving.protocols.http_codec import HttpCodec
from serving.tensor_bytes import Buffer
from serving.tensors import Tensors

PROTOCOL = "mlflow"

ReadParquet: TypeAlias = Callable[[bytes, Described], Decoded]
"""Reads a whole file; a function of a module. Raises as `HttpCodec.decode` does."""

_KINDS: dict[bytes, Literal["json", "csv", "parquet"]] = {
    b"": "json",
    JSON: "json",
    b"text/csv": "csv",
    b"application/vnd.apache.parquet": "parquet",
    b"application/x-parquet": "parquet",
}
_FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
_PROBLEM = "the rows do not fit the model's signature"


class Codec(HttpCodec):
    """Decodes and encodes it for one version of a model, by V1's rules for rows."""

    protocol = PROTOCOL
    raw_tensors = slow_bytes = False

    def __init__(self, model: Described, read_parquet: ReadParquet) -> None:
        self._made_of = model
        self._read_parquet = read_parquet
        self._v1 = predict_v1.Codec(model)
        self._features = {feature.name: feature for feature in model.signature.features}
        self._missing = {feature.name: None for feature in model.signature.features if feature.nullable}
        self._matrix = model.signature.inputs[0].name if model.signature.layout == "matrix" else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Codec, (self._made_of, self._read_parquet)

    def begin(self, headers: Headers, body: Buffer, spare: Spare, most_text: int) -> Decoded | Elsewhere | Later:
        """Read a body; Parquet never on the event loop, since nobody knows from its size what it takes."""
        if _kind(headers) == "parquet":
            return self._elsewhere(headers, body, len(body), most_text)
        return super().begin(headers, body, spare, most_text)

    def decode(self, headers: Headers, body: Buffer) -> Decoded:
        """Read a body into feeds. Raises InvalidRequest, UnsupportedMediaType, or SignatureMismatch."""
        kind, body = _kind(headers), bytes(body)
        if kind == "parquet":
            return self._read_parquet(body, self._made_of)
        if kind == "csv":
            # RFC 4180 says so of a body that begins with a row; the columns are then the features in order.
            absent = b"header=absent" in (header(headers, b"content-type") or b"").replace(b" ", b"").lower()
            return self._csv(body, list(self._features) if absent else None)
        # MLflow's own client writes NaN where a value is missing.
        return self.quick(body) or self._document(strict_json.loads(body, nan_is_null=True))

    def quick(self, body: bytes) -> Decoded | None:
        """Read `instances` where V1 has a short cut; what is no JSON has none."""
        return self._v1.quick(body)

    def _document(self, document: Any) -> Decoded:
        if not isinstance(document, dict):
            raise InvalidRequest(f'the body is {strict_json.kind(document)}: send {{"dataframe_split": ...}}')
        forms = [form for form in _FORMS if form in document]
        if len(forms) != 1:
            found = f", and not {' and '.join(forms)} at once" if forms else ""
            raise InvalidRequest(f"send one of {', '.join(_FORMS)}{found}")
        for name in ("params", "parameters"):
            if not isinstance(document.get(name) or {}, dict):
                raise InvalidRequest(f"/{name}: is {strict_json.kind(document[name])}: send an object, or leave it out")
        form = forms[0]
        given = document[form]
        if form == "dataframe_split":
            return self._split(given)
        if form != "inputs":
            return self._rows(given, f"/{form}")
        if isinstance(given, dict):
            if list(given) == [self._matrix]:
                given = given[self._matrix]  # a whole tensor by its name in the graph
            else:
                rows = next((len(column) for column in given.values() if isinstance(column, list)), 0)
                given = self._known(given.items()) | {
                    name: [None] * rows for name in self._missing if name not in given
                }
        return self._v1.checked.read({"inputs": given})

    def _split(self, given: Any) -> Decoded:
        columns = given.get("columns") if isinstance(given, dict) else None
        data = given.get("data") if isinstance(given, dict) else None
        if not isinstance(data, list) or not isinstance(columns, list | None):
            raise InvalidRequest('/dataframe_split: send {"columns": [names], "data": [[values], ...]}')
        # A frame without names has numbers for them.
        if columns is None or columns == list(range(len(self._features))):
            columns = list(self._features)
        return self._table(columns, data, "/dataframe_split/data")

    def _csv(self, body: bytes, columns: list[str] | None) -> Decoded:
        lines = csv_rows.split(body.removeprefix(b"\xef\xbb\xbf"))
        if columns is None:
            if not lines:
                raise InvalidRequest("there is no header: name the features in the first line, with commas between")
            columns = lines.pop(0)
        features = [self._features.get(name) for name in columns]
        rows = [
            [csv_rows.value(cell, feature) if feature else None for cell, feature in zip(line, features, strict=True)]
            if len(line) == len(columns)
            else line
            for line in lines
        ]
        return self._table(columns, rows, "")

    def _table(self, columns: list[Any], rows: list[Any], top: str) -> Decoded:
        """Read rows of as many values as there are columns."""
        if not all(isinstance(name, str) for name in columns) or len(set(columns)) != len(columns):
            raise InvalidRequest("each column has a name of its own, which is a string")
        width = len(columns)
        wrong = [
            Detail(f"{top}/{i}", f"should be a row of {width} values, one a column")
            for i, row in enumerate(rows)
            if not isinstance(row, list) or len(row) != width
        ]
        if wrong:
            raise listed(_PROBLEM, wrong)
        return self._rows([dict(zip(columns, row, strict=True)) for row in rows], top)

    def _rows(self, rows: Any, top: str) -> Decoded:
        """Read rows by name, where other columns may be among them, and a missing value may be left out."""
        if isinstance(rows, list):
            rows = [self._known(row.items()) if isinstance(row, dict) else row for row in rows]
        try:
            return self._v1.checked.read({"instances": rows})
        except (InvalidRequest, SignatureMismatch) as error:
            message = error.message.replace("/instances/", f"{top}/").replace('"instances"', top or "the CSV")
            details = [Detail(f"{top}{each.path.removeprefix('/instances')}", each.message) for each in error.details]
            raise type(error)(message, details) from None

    def _known(self, row: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return self._missing | {name: value for name, value in row if name in self._features}

    def slow_answer(self, context: Any) -> bool:  # noqa: D102
        return True

    def encode(self, outputs: Tensors, context: Any) -> bytes:
        """Write the answer."""
        return b'{"predictions":[%b]}' % self._v1.answers.joined(outputs)


def _kind(headers: Headers) -> Literal["json", "csv", "parquet"]:
    given = header(headers, b"content-type") or b""
    kind = _KINDS.get(given.partition(b";")[0].strip().lower())
    if kind is None:
        raise UnsupportedMediaType("the body's Content-Type is not one of application/json, text/csv, Parquet's")
    return kind
