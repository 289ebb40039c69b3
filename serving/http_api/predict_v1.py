"""The V1 dialect: `:predict` of KServe V1 and TensorFlow Serving, the friendly one.

Rows by feature name or by position under `instances`, or columns under `inputs`; answers in row order.
Sources: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol and
https://www.tensorflow.org/tfx/serving/api_rest#predict_api.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from mmap import mmap
from typing import Any

import orjson
from pydantic import ValidationError

from serving.engine.model import Model
from serving.engine.rows import Rows
from serving.http_api import long_json, strict_json
from serving.http_api.codec import INLINE_BYTES, Blobs, Decoded
from serving.http_api.predict_v1_answer import Answers
from serving.http_api.predict_v1_long import LongReader, NumberRows
from serving.http_api.predict_v1_pieces import ARRAYS, CheckedInPieces
from serving.tensor_bytes import Buffer
from serving.tensors import FLOATS, NUMPY, Tensors

PROTOCOL = "v1"

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
        self._named = self.rows.all("named")
        self._positional = self.rows.all("positional")
        self._single = self.rows.all("single")
        # Its values begin with a bracket only where they are arrays themselves; a row may be one in brackets too.
        self._opens_rows = self._single_only and not any(feature.shape for feature in signature.features)
        self._width = len(self.rows.names)
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
        self._checked = CheckedInPieces(signature, self.rows, self._long)
        self._plain_names = not any(":" in name for name in self.rows.names)

    def decode(self, headers: Sequence[tuple[bytes, bytes]], body: Buffer) -> Decoded:
        """Read a body into feeds. Raises InvalidRequest, or SignatureMismatch with all the bad cells."""
        if isinstance(body, memoryview):
            body = bytes(body)
        if len(body) > INLINE_BYTES:
            long = self._long.read(body)
            return self._checked.read(long_json.read(body, ARRAYS)) if long is None else Decoded(*long)
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
                        return self._checked.feeds([list(row.values()) for row in rows])
                elif self._single_only and not (found[2] == b"[" and self._opens_rows):
                    cells = self._single.validate_json(body)["instances"]
                    if cells and _once(body):
                        return self._checked.feeds([(cell,) for cell in cells])
                elif found[2] == b"[" and not self._single_only:
                    rows = self._positional.validate_json(body)["instances"]
                    if rows and body.count(b":") == 1:
                        return self._checked.feeds(rows)
            except ValidationError:
                pass
        return self._checked.read(strict_json.loads(body))

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


def _once(body: bytes | bytearray) -> bool:
    """Tell whether the only key of a body surely stands there once; texts may have colons, and the key, in them."""
    return body.count(b":") == 1 or (b"\\" not in body and body.count(b'"instances"') == 1)
