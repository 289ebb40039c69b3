"""Streams of rows, as OpenAPI describes them: what `:predict` takes and answers beside JSON, with `serving[bulk]`."""

from __future__ import annotations

import csv
import io
from typing import Any

from serving.bulk.formats import MEDIA_TYPES, Format, installed
from serving.protocols.strict_json import dumps

_TEXTS: dict[Format, tuple[str, str]] = {
    "ndjson": (
        "A line for each row: an object by feature name, or whatever else `instances` may hold",
        'A line for each row, `{"prediction": ...}` or `{"error": {"line": ..., "path": ..., "message": ...}}`, and '
        'at last `{"summary": {"good": ..., "bad": ...}}`',
    ),
    "csv": (
        "A header with the features' names, in any order, and a line for each row",
        "A header, and a line for each row: its answer, or `error.line`, `error.path` and `error.message`",
    ),
    "arrow": (
        "An Arrow IPC stream with a column for each feature, uncompressed",
        "An Arrow IPC stream with the columns that CSV has; the metadata of its last record batch has `good` and `bad`",
    ),
}


def schemas() -> dict[str, Any]:
    """Make the schemas that all models share, by name."""
    return {
        _name(kind, what): {"type": "string", "description": text, **({"format": "binary"} if kind == "arrow" else {})}
        for kind, texts in (_TEXTS if installed() else {}).items()
        for what, text in zip(("Rows", "Answers"), texts, strict=True)
    }


def rows(example: dict[str, Any] | None) -> dict[str, Any]:
    """Describe bodies of requests, by media type; example: a row."""
    made = _content("Rows")
    if made and example is not None:
        made["application/x-ndjson"]["example"] = dumps(example).decode() + "\n"
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([example, map(_cell, example.values())])
        made["text/csv"]["example"] = text.getvalue()
    return made


def answers() -> dict[str, Any]:
    """Describe the answers, by media type: `Accept` says which."""
    return _content("Answers")


def _content(what: str) -> dict[str, Any]:
    return {
        media: {"schema": {"$ref": f"#/components/schemas/{_name(kind, what)}"}}
        for media, kind in MEDIA_TYPES.items()
        if kind in _TEXTS and installed()
    }


def _name(kind: Format, what: str) -> str:
    return f"{kind.capitalize()}{what}"


def _cell(value: Any) -> str:
    """Write a value as CSV has it."""
    return value if isinstance(value, str) else "" if value is None else dumps(value).decode()
