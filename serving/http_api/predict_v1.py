"""The V1 dialect: `:predict` of KServe V1 and TensorFlow Serving, the friendly one.

Rows by feature name or by position under `instances`, or columns under `inputs`; answers in row order.
Sources: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol and
https://www.tensorflow.org/tfx/serving/api_rest#predict_api.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import struct
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any

import numpy as np
import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails, SchemaValidator

from serving.engine.model import Model
from serving.engine.rows import Rows
from serving.errors import Detail, InvalidRequest, SignatureMismatch, listed
from serving.http_api import strict_json
from serving.http_api.codec import INLINE_BYTES, Blobs, Decoded
from serving.http_api.predict_v1_answer import Answers
from serving.http_api.predict_v1_long import LongReader, NumberRows
from serving.tensor_bytes import Buffer
from serving.tensors import FLOATS, NUMPY, Tensors

PROTOCOL = "v1"

_LONGEST_NAME = 256
"""Characters of a name that are looked at, and echoed, where it is wrong."""

# Which form a body has can be told from its first value; a wrong guess only costs the slow path.
_FORM = re.compile(rb'\s*\{\s*"(instances|inputs)"\s*:\s*(?:\[\s*)?(.)', re.DOTALL)


class Codec:
    """Decodes and encodes V1 for one version of a model; everything that can be decided at load is."""

    protocol = PROTOCOL
    slow_bytes = True

    def __init__(self, model: Model) -> None:
        signature = model.signature
        self.signature = signature
        self.rows = Rows(signature, model.name)
        self._answers = Answers(signature, model.name, model.version)
        self._single_only = len(self.rows.names) == 1
        self._shaped = any(feature.shape for feature in signature.features)
        self._named = self.rows.all("named")
        self._positional = self.rows.all("positional")
        self._width = len(self.rows.names)
        self._names = set(self.rows.names)
        self._guard_finite = any(not f.allow_non_finite and f.datatype in FLOATS - {"FP64"} for f in signature.features)
        numbers = (
            signature.layout == "matrix"
            and signature.batch == "dynamic"
            and all(
                f.datatype in FLOATS and f.categories is None and not f.nullable and not f.allow_non_finite
                for f in signature.features
            )
        )
        self._numbers = NumberRows(self.rows.names, NUMPY[signature.inputs[0].datatype]) if numbers else None
        self._long = LongReader(signature, self.rows, self._numbers)
        self._validators: dict[str, SchemaValidator] = {}
        self._plain_names = not any(":" in name for name in self.rows.names)

    def decode(self, headers: Sequence[tuple[bytes, bytes]], body: Buffer) -> Decoded:
        """Read a body into feeds. Raises InvalidRequest, or SignatureMismatch with all the bad cells."""
        if isinstance(body, memoryview):
            body = bytes(body)
        if len(body) > INLINE_BYTES and (long := self._long.read(body)) is not None:
            return Decoded(*long)
        if isinstance(body, mmap):
            body = bytes(body)
        if self._numbers is not None and (decoded := self._decode_numbers(self._numbers, body)) is not None:
            return decoded
        found = _FORM.match(body)
        if found and found[1] == b"instances":
            try:
                if found[2] == b"{":
                    rows = self._named.validate_json(body)["instances"]
                    # As many colons as names: no key stands twice. Pydantic would keep the last silently.
                    if rows and body.count(b":") == 1 + len(rows) * self._width and self._plain_names:
                        return self._feeds([list(row.values()) for row in rows])
                elif found[2] == b"[" and not self._single_only:
                    rows = self._positional.validate_json(body)["instances"]
                    if rows and body.count(b":") == 1:
                        return self._feeds(rows)
            except ValidationError:
                pass
        return self._decode_slowly(strict_json.loads(body))

    def _decode_numbers(self, numbers: NumberRows, body: bytes | bytearray) -> Decoded | None:
        """Read rows of plain numbers; None for anything else, wrong or right."""
        try:
            matrix = numbers.matrix(orjson.loads(body)["instances"], body.count(b":") - 1)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error):
            return None
        return None if matrix is None else Decoded((matrix,), len(matrix))

    def slow_answer(self, context: Any) -> bool:  # noqa: D102
        return True

    def encode(self, outputs: Tensors, context: Any) -> bytes | Blobs:
        """Write the answer to a decoded request: rows for `instances`, columns for `inputs`."""
        if context:
            return self._answers.columns(outputs)
        return self._answers.rows(outputs)

    def _feeds(self, rows: Sequence[Sequence[Any]]) -> Decoded:
        self._check_count(len(rows), "instances")
        try:
            inputs = self.rows.arrays(rows)
        except ValueError:
            raise SignatureMismatch("/instances: rows have different shapes: send them one request each") from None
        if self._guard_finite:
            self._refuse_overflow(inputs, "instances", by_row=True)
        return Decoded(inputs, len(rows))

    def _decode_slowly(self, document: Any) -> Decoded:
        """Find out what is wrong, or read a form that the fast path does not."""
        if not isinstance(document, dict):
            raise InvalidRequest(f'the body is {strict_json.kind(document)}: send {{"instances": [...]}}')
        known = {"instances", "inputs", "signature_name", "parameters"}
        for key in document:
            if key not in known:
                raise InvalidRequest(f'unknown key {key[:64]!r}{_meant(key, known)}: send "instances" or "inputs"')
        if ("instances" in document) == ("inputs" in document):
            raise InvalidRequest('send either "instances" (rows) or "inputs" (columns)')
        if document.get("signature_name", "serving_default") != "serving_default":
            raise InvalidRequest('signature_name: only "serving_default" is served')
        if "instances" in document:
            return self._feeds(self._instances(document["instances"]))
        return self._columns(document["inputs"])

    def _instances(self, rows: Any) -> list[Sequence[Any]]:
        if not isinstance(rows, list):
            raise InvalidRequest(f'"instances" is {strict_json.kind(rows)}: send an array of rows')
        if not rows:
            raise InvalidRequest('"instances" has no rows: send at least one')
        details: list[Detail] = []
        total = 0
        checked: list[Sequence[Any]] = []
        for index, row in enumerate(rows):
            form = self._form(row)
            if form not in ("named", "positional", "single"):
                total += 1
                _note(details, Detail(strict_json.pointer("instances", index), form))
                continue
            try:
                value = self._validator(form).validate_json(_dumped(row))
            except ValidationError as error:
                total += error.error_count()
                if len(details) < 20:
                    details += self._explain(error, ("instances", index), row)
                continue
            checked.append(list(value.values()) if form == "named" else value if form == "positional" else [value])
        if total:
            raise listed("the rows do not fit the model's signature", details, total=total)
        return checked

    def _form(self, row: Any) -> str:
        """Name the form of one row, or say what is wrong with it."""
        if isinstance(row, dict):
            return "named"
        if isinstance(row, list) and not (self._single_only and (self._shaped or len(row) != 1)):
            if len(row) == self._width:
                return "positional"
            return f"has {len(row)} values, and the model has {self._width} features"
        if self._single_only:
            return "single"
        return f"is {strict_json.kind(row)}: send an object by feature name, or an array of {self._width} values"

    def _validator(self, form: str) -> SchemaValidator:
        if form not in self._validators:
            self._validators[form] = self.rows.one(form)
        return self._validators[form]

    def _columns(self, given: Any) -> Decoded:
        if not isinstance(given, dict):
            if self._single_only and isinstance(given, list):
                given = {self.rows.names[0]: given}
            elif isinstance(given, list) and self.signature.layout == "matrix":
                decoded = self._feeds(self._instances(given))
                return Decoded(decoded.inputs, decoded.rows, True)
            else:
                raise InvalidRequest(
                    f'"inputs" is {strict_json.kind(given)}: send an object of columns by feature name'
                )
        try:
            columns = list(self._validator("columns").validate_json(_dumped(given)).values())
        except ValidationError as error:
            details = self._explain(error, ("inputs",), given)
            raise listed("the columns do not fit the model's signature", details, total=error.error_count()) from None
        lengths = {name: len(column) for name, column in zip(self.rows.names, columns, strict=True)}
        if len(set(lengths.values())) != 1:
            raise SignatureMismatch(
                f"columns have different lengths: {', '.join(f'{k} {v}' for k, v in lengths.items())}"[:500]
            )
        if not columns[0]:
            raise InvalidRequest('"inputs" has no rows: send at least one')
        self._check_count(len(columns[0]), "inputs")
        try:
            inputs = self.rows.feeds(columns)
        except ValueError:
            raise SignatureMismatch("/inputs: rows have different shapes: send them one request each") from None
        if self._guard_finite:
            self._refuse_overflow(inputs, "inputs", by_row=False)
        return Decoded(inputs, len(columns[0]), True)

    def _check_count(self, rows: int, top: str) -> None:
        if rows > 1 and self.signature.batch == "none":
            raise SignatureMismatch(
                f"/{top}: has {rows} rows, and this model takes one a request: send them one by one"
            )

    def _refuse_overflow(self, inputs: Tensors, top: str, *, by_row: bool) -> None:
        """Refuse what is finite as a double and infinite as the float32 that the model takes."""
        for position, array in enumerate(inputs):
            if array.dtype.kind not in "fV" or not np.isinf(array).any():
                continue
            details = []
            for place in np.argwhere(np.isinf(array))[:20]:
                feature = self.rows.names[place[1] if self.signature.layout == "matrix" else position]
                row = int(place[0])
                path = strict_json.pointer(top, *((row, feature) if by_row else (feature, row)))
                details.append(Detail(path, "is too large for the model's 32-bit float", feature))
            features = {f.name: f for f in self.signature.features}
            details = [d for d in details if d.feature and not features[d.feature].allow_non_finite]
            if details:
                raise listed("the rows do not fit the model's signature", details)

    def _explain(self, error: ValidationError, top: tuple[str | int, ...], given: Any) -> list[Detail]:
        """Turn Pydantic's findings into ours: a JSON pointer and a sentence that says what to do."""
        details = []
        missing = [
            str(e["loc"][-1]) for e in error.errors(include_url=False, include_input=False) if e["type"] == "missing"
        ]
        for found in itertools.islice(error.errors(include_url=False, include_context=True), 20):
            loc = tuple(part for part in found["loc"] if not str(part).startswith(("nullable[", "function-")))
            feature = self._feature(loc)
            place = (part[:_LONGEST_NAME] if isinstance(part, str) else part for part in loc)
            details.append(Detail(strict_json.pointer(*top, *place), _sentence(found, missing, self._names), feature))
        return details

    def _feature(self, loc: tuple[str | int, ...]) -> str | None:
        first = loc[0] if loc else None
        if isinstance(first, int) and not self._single_only and first < self._width:
            return self.rows.names[first]
        if isinstance(first, str) and first in self._names:
            return first
        return self.rows.names[0] if self._single_only else None


def _note(details: list[Detail], detail: Detail) -> None:
    if len(details) < 20:
        details.append(detail)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _meant(given: str, known: set[str]) -> str:
    # A name of a megabyte would take 36 to be compared.
    close = difflib.get_close_matches(given[:_LONGEST_NAME], known, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _sentence(found: ErrorDetails, missing: list[str], names: set[str]) -> str:
    kind = found["type"]
    context = found.get("ctx", {})
    got = strict_json.kind(found["input"])
    sentences: dict[str, Callable[[], str]] = {
        "missing": lambda: "is missing",
        "extra_forbidden": lambda: (
            "is not a feature of this model" + _meant(str(found["loc"][-1]), set(missing) or names)
        ),
        "float_type": lambda: f"should be a number, and is {got}",
        "int_type": lambda: f"should be a whole number, and is {got}",
        "int_from_float": lambda: "should be a whole number, and is not",
        "bool_type": lambda: f"should be true or false, and is {got}",
        "string_type": lambda: f"should be a string, and is {got}",
        "list_type": lambda: f"should be an array, and is {got}",
        "dict_type": lambda: f"should be an object, and is {got}",
        "finite_number": lambda: "should be a finite number",
        "literal_error": lambda: f"should be one of {context.get('expected')}",
        "too_short": lambda: f"has {context.get('actual_length')} values, and should have {context.get('min_length')}",
        "too_long": lambda: f"has {context.get('actual_length')} values, and should have {context.get('max_length')}",
        "greater_than_equal": lambda: f"should be at least {context.get('ge')}",
        "less_than_equal": lambda: f"should be at most {context.get('le')}",
    }
    return sentences[kind]() if kind in sentences else found["msg"].lower()
