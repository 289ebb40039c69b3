"""Forms of a value that clients of TensorFlow Serving send: `{"b64": ...}` for a string, `[1.5]` for a [N, 1] input.

Source: https://www.tensorflow.org/tfx/serving/api_rest#encoding_binary_values.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from serving.engine.signature import Signature
from serving.errors import InvalidRequest
from serving.protocols.strict_json import pointer
from serving.tensor_bytes import text

_KEY = {"b64"}
_DEEPEST = 64
"""Lists in lists that are looked into: no tensor has more dimensions, and what has is refused for its shape."""


class Forms:
    """Rewrites the rows and columns of one signature; what has no such form stays as it is. Raises InvalidRequest."""

    def __init__(self, signature: Signature) -> None:
        features = signature.features
        self._names = [feature.name for feature in features]
        self._only = features[0] if len(features) == 1 else None
        self._texts = {feature.name for feature in features if feature.datatype == "BYTES"}
        self._columns = set()
        if signature.layout == "columns" and signature.batch != "none":
            ports = zip(features, signature.inputs, strict=True)
            self._columns = {feature.name for feature, spec in ports if not feature.shape and len(spec.shape) == 2}
        self.any = bool(self._texts or self._columns)
        """Whether a value of these features has another form at all."""

    def row(self, row: Any, index: int) -> Any:
        """Rewrite one row, in whatever form it is."""
        at = ("instances", index)
        if isinstance(row, dict) and not (self._only and row.keys() == _KEY and self._only.name not in _KEY):
            return {name: self._value(name, value, (*at, name)) for name, value in row.items()}
        if self._only is not None and (self._only.shape or not isinstance(row, list)):
            return self._value(self._only.name, row, at)
        if isinstance(row, list) and len(row) == len(self._names):
            return [self._value(self._names[i], value, (*at, i)) for i, value in enumerate(row)]
        return row

    def column(self, name: str, values: Any) -> Any:
        """Rewrite one column."""
        if not isinstance(values, list):
            return values
        return [self._value(name, value, ("inputs", name, index)) for index, value in enumerate(values)]

    def _value(self, name: str, value: Any, at: tuple[str | int, ...]) -> Any:
        if name in self._columns and isinstance(value, list) and len(value) == 1:
            value = value[0]
        return _decoded(value, at) if name in self._texts else value


def _decoded(value: Any, at: tuple[str | int, ...]) -> Any:
    if isinstance(value, list) and len(at) < _DEEPEST:
        return [_decoded(part, (*at, index)) for index, part in enumerate(value)]
    if not (isinstance(value, dict) and value.keys() == _KEY and isinstance(value["b64"], str)):
        return value
    try:
        raw = base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{pointer(*at)}/b64: is not base64") from None
    return text(raw, pointer(*at))
