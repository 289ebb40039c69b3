"""Rows of CSV (RFC 4180), and their cells as values of features."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from serving.engine.signature import Feature
from serving.errors import InvalidRequest
from serving.protocols import strict_json

MISSING = ("", "NA", "NaN", "nan", "null")
"""What a cell says where a number is missing."""
TRUE, FALSE = ("true", "True", "TRUE", "1"), ("false", "False", "FALSE", "0")
_WHOLE = re.compile(r"[+-]?\d{1,400}", re.ASCII)

csv.field_size_limit(1 << 30)  # of the module, for all threads: a cell with an array is longer than its 128 KiB


def split(text: bytes) -> list[list[str]]:
    """Split text into rows of cells; empty lines are none. Raises InvalidRequest."""
    try:
        return [row for row in csv.reader(io.StringIO(text.decode(), newline=""), strict=True) if row]
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the line is not UTF-8: byte {error.start} can't be decoded") from None
    except csv.Error as error:
        raise InvalidRequest(f"the line is not CSV: {error}") from None


def value(text: str, feature: Feature) -> Any:
    """Read a cell as its feature's type; what can't be read so stays text, for V1 to say so."""
    if feature.shape:
        try:
            return strict_json.loads(text.encode())
        except InvalidRequest:
            return text
    if feature.datatype == "BYTES":
        return text
    text = text.strip()
    if feature.datatype == "BOOL":
        return True if text in TRUE else False if text in FALSE else text
    if text in MISSING:
        return None
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text
