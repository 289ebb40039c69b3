"""The V1 dialect: `:predict` of KServe V1 and TensorFlow Serving, the friendly one.

Rows by feature name or by position under `instances`, or columns under `inputs`; answers in row order.
Sources: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol and
https://www.tensorflow.org/tfx/serving/api_rest#predict_api.
"""

from __future__ import annotations

import itertools
import operator
import re
import struct
from typing import Any

import numpy as np
from pydantic import ValidationError

from serving.engine.rows import Rows
from serving.engine.signature import Described
from serving.protocols import strict_json
from serving.protocols.codec import Decoded
from serving.protocols.headers import Headers
from serving.protocols.http_codec import HttpCodec
from serving.protocols.predict_v1_response import Answers
from serving.protocols.predict_v1_validation import Checked, cells
from serving.tensor_bytes import Buffer
from serving.tensors import FLOATS, NUMPY, Tensors

PROTOCOL = "v1"

# Which form a body has can be told from its first value; a wrong guess only costs the slow path.
_FORM = re.compile(rb'\s*\{\s*"(instances|inputs)"\s*:\s*(?:\[\s*)?(.)', re.DOTALL)
_NUMBERS = frozenset({int, float})


class Codec(HttpCodec):
    """Decodes and encodes V1 for one version of a model; everything that can be decided at load is."""

    protocol = PROTOCOL
    raw_tensors = slow_bytes = False

    def __init__(self, model: Described) -> None:
        signature = model.signature
        self._made_of = model
        self.signature = signature
        self.rows = Rows(signature, model.name)
        self.answers = Answers(signature, model.name, model.version)
        self._single_only = len(self.rows.names) == 1
        # Its values begin with a bracket only where they are arrays themselves; a row may be one in brackets too.
        self._opens_rows = self._single_only and not any(feature.shape for feature in signature.features)
        self._width = len(self.rows.names)
        # Rows of plain numbers are read at twice Pydantic's speed where every feature is a free float.
        self._numbers = (
            signature.layout == "matrix"
            and signature.batch == "dynamic"
            and all(f.datatype in FLOATS and f.categories is None for f in signature.features)
        )
        if self._numbers:
            self._pick = operator.itemgetter(*self.rows.names)
            self._dtype = NUMPY[signature.inputs[0].datatype]
        self.checked = Checked(signature, self.rows)
        self._plain_names = not any(":" in name for name in self.rows.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Codec, (self._made_of,)

    def decode(self, headers: Headers, body: Buffer) -> Decoded:
        """Read a body into feeds. Raises InvalidRequest, or SignatureMismatch with all the bad cells."""
        body = bytes(body)
        decoded = self.quick(body)
        return self.checked.read(strict_json.loads(body)) if decoded is None else decoded

    def quick(self, body: bytes) -> Decoded | None:
        """Read one of the usual forms; None for anything else, wrong or right. Raises as `decode` does."""
        if self._numbers and (decoded := self._decode_numbers(body)) is not None:
            return decoded
        found = _FORM.match(body)
        form = self._form(found[2]) if found and found[1] == b"instances" else None
        if form is None:
            return None
        try:
            rows = self.checked.all[form].validate_json(body)["instances"]
        except ValidationError:
            return None
        if not rows or not self._once(body, form, len(rows)):
            return None
        return self.checked.feeds([cells(row, form) for row in rows])

    def _form(self, opening: bytes) -> str | None:
        """Tell from what a row begins with which form all of them have, if they are right."""
        if opening == b"{":
            return "named"
        if self._single_only:
            return None if opening == b"[" and self._opens_rows else "single"
        return "positional" if opening == b"[" else None

    def _once(self, body: bytes, form: str, rows: int) -> bool:
        """Tell whether no key occurs twice, for sure: Pydantic would keep the last silently.

        As many colons as names; of texts, which may have colons in them, the only key.
        """
        if form == "named":
            return self._plain_names and body.count(b":") == 1 + rows * self._width
        return body.count(b":") == 1 or (form == "single" and b"\\" not in body and body.count(b'"instances"') == 1)

    def _decode_numbers(self, body: bytes) -> Decoded | None:
        """Read rows of plain numbers; None for anything else, wrong or right.

        As many colons as names: that tells, without a walk, that no key occurs twice.
        """
        width = self._width
        try:
            rows = strict_json.lenient(body)["instances"]
            named = type(rows[0]) is dict
            if body.count(b":") != (1 + len(rows) * width if named else 1):
                return None
            if named:
                pick = self._pick
                flat = list(itertools.chain.from_iterable([pick(row) for row in rows]))
            elif {*map(len, rows)} != {width}:
                return None
            else:
                flat = list(itertools.chain.from_iterable(rows)) if len(rows) > 1 else rows[0]
            if not _NUMBERS.issuperset(map(type, flat)):
                return None
            # Standard mode refuses what is too large for the model's float; native mode would make it an infinity.
            packed = struct.pack(f"<{len(rows) * width}{self._dtype.char}", *flat)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error):
            return None
        return Decoded((np.ndarray((len(rows), width), self._dtype, packed),), len(rows))

    def slow_answer(self, context: Any) -> bool:  # noqa: D102
        return True

    def encode(self, outputs: Tensors, context: Any) -> bytes:
        """Write the answer to a decoded request: rows for `instances`, columns for `inputs`."""
        contributions = outputs[len(self.signature.outputs) :]
        outputs = outputs[: len(self.signature.outputs)] if contributions else outputs
        answer = self.answers.columns(outputs) if context else self.answers.rows(outputs)
        if not contributions:
            return answer
        told = [
            {"base": row[-1], "contributions": dict(zip(self.rows.names, row, strict=False))}
            for row in contributions[0].tolist()
        ]
        return b'%b,"explanations":%b}' % (answer[:-1], strict_json.dumps(told))
