"""Rows and columns of V1 checked one by one: what is wrong with them, or forms that the fast path does not read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from pydantic import ValidationError
from pydantic_core import ErrorDetails, SchemaValidator

from serving.engine.rows import Rows
from serving.engine.signature import Signature
from serving.errors import DETAILS_SHOWN, Detail, InvalidRequest, SignatureMismatch, listed
from serving.protocols import strict_json
from serving.protocols.codec import Decoded
from serving.protocols.predict_v1_forms import Forms
from serving.tensors import FLOATS, INTEGERS, Tensors

FORMS = ("named", "positional", "single")
"""How one row may be written: by feature name, by position, or as the only feature's value."""
_LONGEST_NAME = 256
"""Characters of a name that are looked at, and echoed, where it is wrong."""

_TOGETHER = 256
"""Rows, or cells of a column, that are judged together; behind the first that are wrong, few more are looked at."""


class Checked:
    """Reads documents for one signature. Raises InvalidRequest, or SignatureMismatch with all the bad cells."""

    def __init__(self, signature: Signature, rows: Rows) -> None:
        self.signature = signature
        self.rows = rows
        self._single_only = len(rows.names) == 1
        self._shaped = any(feature.shape for feature in signature.features)
        self._width = len(rows.names)
        self._names = set(rows.names)
        self._weights = {spec.name for spec in signature.optional}
        self._guard_finite = any(f.datatype in FLOATS - {"FP64"} for f in signature.features)
        # Of a table that has floats too, `values.tolist()` makes 4.0 of a column's 4: a client's own whole numbers.
        self._whole = {
            feature.name: i
            for i, feature in enumerate(signature.features)
            if feature.datatype in INTEGERS
            and not feature.shape
            and (feature.categories or feature.minimum is not None)
        }
        self._forms = Forms(signature)
        self._validators: dict[str, SchemaValidator] = {}
        self.all = {form: rows.all(form) for form in FORMS if form != "single" or self._single_only}
        """What checks a whole body of rows of one form."""
        self._columns_at_once = rows.one("columns", fail_fast=True)

    def read(self, document: Any) -> Decoded:
        """Find out what is wrong, or read a form that the fast path does not."""
        if not isinstance(document, dict):
            raise InvalidRequest(f'the body is {strict_json.kind(document)}: send {{"instances": [...]}}')
        known = {"instances", "inputs", "signature_name", "parameters", "explain"}
        for key in document:
            if key not in known:
                raise InvalidRequest(f'unknown key {key[:64]!r}{meant(key, known)}: send "instances" or "inputs"')
        if ("instances" in document) == ("inputs" in document):
            raise InvalidRequest('send either "instances" (rows) or "inputs" (columns)')
        if document.get("signature_name", "serving_default") != "serving_default":
            raise InvalidRequest('signature_name: only "serving_default" is served')
        explain = document.get("explain", False)
        if not isinstance(explain, bool):
            raise InvalidRequest(f'"explain" is {strict_json.kind(explain)}: send true or false')
        by_row = "instances" in document
        decoded = self._by_row(document["instances"]) if by_row else self._columns(document["inputs"])
        return decoded._replace(explain=explain)

    def feeds(self, rows: Sequence[Sequence[Any]]) -> Decoded:
        """Make the feeds of validated rows."""
        return Decoded(self._feeds(self.rows.arrays, rows, len(rows), "instances"), len(rows))

    def _feeds(self, make: Callable[[Any], Tensors], cells: Any, rows: int, top: str) -> Tensors:
        if rows > 1 and self.signature.batch == "none":
            raise SignatureMismatch(
                f"/{top}: has {rows} rows, and this model takes one a request: send them one by one"
            )
        try:
            with np.errstate(over="ignore"):  # what overflowed is refused below, by name
                inputs = make(cells)
        except ValueError:
            raise SignatureMismatch(f"/{top}: rows have different shapes: send them one request each") from None
        if self._guard_finite:
            self._refuse_overflow(inputs, top)
        return inputs

    def _by_row(self, rows: Any) -> Decoded:
        if not isinstance(rows, list):
            raise InvalidRequest(f'"instances" is {strict_json.kind(rows)}: send an array of rows')
        if not rows:
            raise InvalidRequest('"instances" has no rows: send at least one')
        found = Findings()
        checked: list[Sequence[Any]] = []
        for start in range(0, len(rows), _TOGETHER):
            some = rows[start : start + _TOGETHER]
            if self._forms.any:
                some = [self._forms.row(row, index) for index, row in enumerate(some, start)]
            if self._whole:
                some = [self._whole_in(row) for row in some]
            right = self._at_once(some)
            checked += self._checked(some, start, found) if right is None else right
            if found.enough:
                found.cut_short = start + _TOGETHER < len(rows)
                break
        found.refuse("the rows do not fit the model's signature")
        return self.feeds(checked)

    def _whole_in(self, row: Any) -> Any:
        """Write 4.0 as 4 where training saw whole numbers; anything else stays as it is."""
        if isinstance(row, dict):
            return {name: _as_whole(value) if name in self._whole else value for name, value in row.items()}
        if isinstance(row, list):
            at = set(self._whole.values())
            return [_as_whole(value) if i in at else value for i, value in enumerate(row)]
        return _as_whole(row) if self._single_only else row

    def _at_once(self, rows: list[Any]) -> list[Sequence[Any]] | None:
        """Give the cells of rows that all have one form and are right; None for others."""
        form = self._form(rows[0])
        if form not in FORMS:
            return None
        try:
            right = self.all[form].validate_json(_dumped({"instances": rows}))["instances"]
        except ValidationError:
            return None
        return [cells(row, form) for row in right]

    def _checked(self, rows: Sequence[Any], start: int, found: Findings) -> Iterator[Sequence[Any]]:
        """Give the cells of each row that is right; the first row is number `start`."""
        for index, row in enumerate(rows, start):
            form = self._form(row)
            if form not in FORMS:
                found.add(1, [Detail(strict_json.pointer("instances", index), form)] if not found.enough else [])
                continue
            looked_at, more = self._bounded(row) if form == "named" else (row, 0)
            try:
                value = self._validator(form).validate_json(_dumped(looked_at))
            except ValidationError as error:
                details = self._details(_errors(error), ("instances", index)) if not found.enough else []
                found.add(error.error_count() + more, details)
                continue
            yield cells(value, form)

    def _bounded(self, given: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Leave out unknown names that will not be shown, and count them: of thousands, Pydantic tells at length."""
        if len(given) <= self._width + DETAILS_SHOWN:
            return given, 0
        unknown = [name for name in given if name not in self._names][DETAILS_SHOWN:]
        left_out = set(unknown)
        return {name: value for name, value in given.items() if name not in left_out}, len(unknown)

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
                return self._by_row(given)._replace(context=True)
            else:
                raise InvalidRequest(
                    f'"inputs" is {strict_json.kind(given)}: send an object of columns by feature name'
                )
        if self._forms.any:
            given = {name: self._forms.column(name, column) for name, column in given.items()}
        given = {
            name: [_as_whole(value) for value in column] if name in self._whole and isinstance(column, list) else column
            for name, column in given.items()
        }
        try:
            columns = list(self._columns_at_once.validate_json(_dumped(given)).values())
        except ValidationError:
            self._refuse_columns(given)
        if not columns:
            return Decoded((), 1, True)
        lengths = {name: len(column) for name, column in zip(self.rows.names, columns, strict=True)}
        if len(set(lengths.values())) != 1:
            raise SignatureMismatch(
                f"columns have different lengths: {', '.join(f'{k} {v}' for k, v in lengths.items())}"[:500]
            )
        if not columns[0]:
            raise InvalidRequest('"inputs" has no rows: send at least one')
        return Decoded(self._feeds(self.rows.feeds, columns, len(columns[0]), "inputs"), len(columns[0]), True)

    def _refuse_columns(self, given: dict[str, Any]) -> NoReturn:
        """Say what is wrong with columns, some of which does not fit."""
        found = Findings()
        looked_at, more = self._bounded(given)
        longest = max([len(column) for column in looked_at.values() if isinstance(column, list)], default=0)
        for start in range(0, max(1, longest), _TOGETHER):
            some = {k: v[start : start + _TOGETHER] if isinstance(v, list) else v for k, v in looked_at.items()}
            try:
                self._validator("columns").validate_json(_dumped(some))
            except ValidationError as error:
                errors = [e for e in _errors(error) if not start or len(e["loc"]) > 1]
                found.add(len(errors) + more, self._details(errors, ("inputs",), start) if not found.enough else [])
                more = 0
            if found.enough:
                found.cut_short = start + _TOGETHER < longest
                break
        found.refuse("the columns do not fit the model's signature")
        raise AssertionError("columns were refused, and nothing is wrong with them")

    def _refuse_overflow(self, inputs: Tensors, top: str) -> None:
        """Refuse what is finite as a double and infinite as the smaller float that the model takes."""
        for position, array in enumerate(inputs):
            if array.dtype.kind not in "fV" or not np.isinf(array).any():
                continue
            details = []
            datatype = self.signature.inputs[position].datatype
            for place in np.argwhere(np.isinf(array))[:DETAILS_SHOWN]:
                feature = self.rows.names[place[1] if self.signature.layout == "matrix" else position]
                row = 0 if self.signature.batch == "none" else int(place[0])
                path = strict_json.pointer(top, *((row, feature) if top == "instances" else (feature, row)))
                details.append(Detail(path, f"is too large for {datatype}, which the model takes"))
            raise listed("the rows do not fit the model's signature", details)

    def _details(self, errors: list[ErrorDetails], top: tuple[str | int, ...], start: int = 0) -> list[Detail]:
        """Turn Pydantic's findings into ours: a JSON pointer and a sentence that says what to do.

        start: number of the first cell of each column that was looked at.
        """
        details = []
        missing = [str(each["loc"][-1]) for each in errors if each["type"] == "missing"]
        for found in errors[:DETAILS_SHOWN]:
            loc = tuple(part for part in found["loc"] if not str(part).startswith(("nullable[", "function-")))
            if start:
                loc = (loc[0], int(loc[1]) + start, *loc[2:])
            place = (part[:_LONGEST_NAME] if isinstance(part, str) else part for part in loc)
            details.append(
                Detail(strict_json.pointer(*top, *place), _sentence(found, missing, self._names, self._weights))
            )
        return details


class Findings:
    """What is wrong with rows or columns: how many cells, and the first of them. cut_short: there may be more."""

    def __init__(self) -> None:
        self.details: list[Detail] = []
        self.total = 0
        self.cut_short = False

    @property
    def enough(self) -> bool:
        """Tell whether no more details would be shown."""
        return len(self.details) >= DETAILS_SHOWN

    def add(self, count: int, details: list[Detail]) -> None:
        """Count some more."""
        self.total += count
        self.details += details

    def refuse(self, problem: str) -> None:
        """Raise SignatureMismatch where something was found."""
        if self.total:
            raise listed(problem, self.details, total=self.total, cut_short=self.cut_short)


def cells(row: Any, form: str) -> Sequence[Any]:
    """Return the cells of a validated row, in the order of the features."""
    values: Sequence[Any] = [*row.values()] if form == "named" else row if form == "positional" else (row,)
    return values


def _errors(error: ValidationError) -> list[ErrorDetails]:
    return error.errors(include_url=False, include_context=True)


def _dumped(value: Any) -> bytes:
    """Write JSON for a validator, whole numbers beyond 64 bits and all."""
    return json.dumps(value).encode()


def meant(given: str, known: set[str]) -> str:
    """Say what a name was meant to be, where one is close."""
    # A name of a megabyte would take 36 to be compared.
    close = difflib.get_close_matches(given[:_LONGEST_NAME], known, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _sentence(found: ErrorDetails, missing: list[str], names: set[str], weights: set[str]) -> str:
    kind = found["type"]
    context = found.get("ctx", {})
    got = strict_json.kind(found["input"])
    sentences: dict[str, Callable[[], str]] = {
        "missing": lambda: "is missing",
        "extra_forbidden": lambda: (
            "is a weight of this model: send it as a tensor to /v2/models/NAME/infer"
            if found["loc"][-1] in weights
            else "is not a feature of this model" + meant(str(found["loc"][-1]), set(missing) or names)
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


def _as_whole(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value
