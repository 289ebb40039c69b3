"""Streams of rows, as OpenAPI describes them: what `:predict` takes and answers beside JSON, with `serving[bulk]`."""

from __future__ import annotations

import csv
import io
from typing import Any

from serving.bulk.formats import MEDIA_TYPES, installed
from serving.protocols.strict_json import dumps

_TEXTS = {
    "NdjsonRows": "A line for each row: an object by feature name, or whatever else `instances` may hold",
    "NdjsonAnswers": 'A line for each row, `{"prediction": ...}` or `{"error": {"line": ..., "path": ..., "message": '
    '...}}`, and at last `{"summary": {"good": ..., "bad": ...}}`',
    "CsvRows": "A header with the features' names, in any order, and a line for each row",
    "CsvAnswers": "A header, and a line for each row: its answer, or `error.line`, `error.path` and `error.message`",
    "ArrowRows": "An Arrow IPC stream with a column for each feature, uncompressed",
    "ArrowAnswers": "An Arrow IPC stream with the columns that CSV has; the metadata of its last record batch has "
    "`good` and `bad`",
}


def schemas() -> dict[str, Any]:
    """Make the schemas that all models share, by name."""
    texts = _TEXTS if installed() else {}
    binary = {"format": "binary"}
    return {
        name: {"type": "string", "description": text, **(binary if name.startswith("Arrow") else {})}
        for name, text in texts.items()
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
    names = {media: f"{kind.capitalize()}{what}" for media, kind in MEDIA_TYPES.items() if installed()}
    return {
        media: {"schema": {"$ref": f"#/components/schemas/{name}"}} for media, name in names.items() if name in _TEXTS
    }


def _cell(value: Any) -> str:
    """Write a value as CSV has it."""
    return value if isinstance(value, str) else "" if value is None else dumps(value).decode()
