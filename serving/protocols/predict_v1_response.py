"""Writes V1 answers: one prediction a row, or columns; classifiers by class name."""

from __future__ import annotations

from typing import Any

import numpy as np

from serving.engine.signature import Signature
from serving.protocols.strict_json import dumps, lenient
from serving.tensors import INTEGERS, Array, Tensors


class Answers:
    """Encoders for one signature. Names, brackets and commas are written once, at load."""

    def __init__(self, signature: Signature, name: str, version: str) -> None:
        # One example is one row, whatever its outputs' shapes: they have no dimension for rows.
        self._whole = signature.batch == "none"
        self._names = [output.name for output in signature.outputs]
        head = dumps({"model_name": name, "model_version": version})[:-1]
        self._head_rows = head + b',"predictions":['
        self._head_columns = head + b',"outputs":'
        self._classes = signature.classes
        self._label = self._names.index(signature.label) if signature.label else None
        self._scores = self._names.index(signature.scores) if signature.scores else None
        self._named = signature.answers_by_class
        # An integer label with named classes is an index into them.
        self._indexed = bool(
            self._named
            and signature.outputs[self._label].datatype in INTEGERS  # type: ignore[index]
            and isinstance(signature.classes[0], str)  # type: ignore[index]
        )
        if self._named:
            self._key = signature.scores_key
            self._template = _template(self._key, signature.classes or ())
            self._one = self._head_rows.replace(b"%", b"%%") + self._template + b"]}"
        self._one_shape = (1, len(signature.classes or ())) if self._named and not self._whole else None
        self._label_texts = {c: dumps(c) for c in (signature.classes or ())}

    def rows(self, outputs: Tensors) -> bytes:
        """Write `{"predictions": [one a row]}`."""
        if self._one_shape is not None and (scores := outputs[self._scores]).shape == self._one_shape:  # type: ignore[index]
            # As below, in half the time.
            cells = dumps(scores.ravel())[1:-1].split(b",")
            return self._one % (self._labels(outputs[self._label])[0], *cells)  # type: ignore[index]
        return b"%b%b]}" % (self._head_rows, self.joined(outputs))

    def texts(self, outputs: Tensors, before: bytes, behind: bytes) -> list[bytes]:
        """Write each row's prediction by itself, between two texts."""
        if (by_class := self._by_class(outputs, before, behind)) is not None:
            return by_class
        return [b"%b%b%b" % (before, text, behind) for text in self._single(outputs)]

    def _single(self, outputs: Tensors) -> list[bytes]:
        if self._whole:
            return [self.joined(outputs)]
        if len(outputs) > 1:
            return [dumps(record) for record in self._records(outputs)]
        plain = _plain(outputs[0])
        one_number_each = not isinstance(plain, list) and plain.ndim == 1
        return dumps(plain)[1:-1].split(b",") if one_number_each else [dumps(row) for row in plain]

    def joined(self, outputs: Tensors) -> bytes:
        """Write predictions with commas between them."""
        if self._whole:
            return dumps(self._by_name([_nested(output) for output in outputs]))
        if (by_class := self._by_class(outputs)) is not None:
            return b",".join(by_class)
        return dumps(_plain(outputs[0]) if len(outputs) == 1 else self._records(outputs))[1:-1]

    def _by_class(self, outputs: Tensors, before: bytes = b"", behind: bytes = b"") -> list[bytes] | None:
        """Write label and scores of each row by the names of the classes; None where these are not the model's."""
        if not self._named or self._whole:
            return None
        labels, scores = outputs[self._label], outputs[self._scores]  # type: ignore[index]
        width = scores.shape[1]
        if width != len(self._classes or ()):
            return None
        texts = iter(dumps(scores.ravel())[1:-1].split(b","))
        template = b"%b%b%b" % (before, self._template, behind)
        return [template % cells for cells in zip(self._labels(labels), *[texts] * width, strict=False)]

    def _records(self, outputs: Tensors) -> list[dict[str, Any]]:
        columns = [_listed(output) for output in outputs]
        return [dict(zip(self._names, row, strict=True)) for row in zip(*columns, strict=True)]

    def columns(self, outputs: Tensors) -> bytes:
        """Write `{"outputs": {name: column}}`, or the column alone where there is one output."""
        value: Any
        if self._whole:
            value = self._by_name([[_nested(output)] for output in outputs])
        elif self._named:
            labels, scores = outputs[self._label], outputs[self._scores]  # type: ignore[index]
            by_class = lenient(dumps(scores))
            value = {
                "label": [lenient(text) for text in self._labels(labels)],
                self._key: {str(c): [row[i] for row in by_class] for i, c in enumerate(self._classes or ())},
            }
        else:
            value = self._by_name([_plain(output) for output in outputs])
        return b"%b%b}" % (self._head_columns, dumps(value))

    def _by_name(self, values: list[Any]) -> Any:
        """Return what each output has, by its name, or alone where there is one output."""
        return values[0] if len(values) == 1 else dict(zip(self._names, values, strict=True))

    def _labels(self, labels: Array) -> list[bytes]:
        values = labels.ravel().tolist()
        if self._indexed:
            classes = self._classes or ()
            values = [classes[v] if 0 <= v < len(classes) else v for v in values]
        texts = self._label_texts
        return [texts[v] if v in texts else dumps(v) for v in values]


def _template(key: str, classes: tuple[Any, ...]) -> bytes:
    keys = [dumps(str(c)).replace(b"%", b"%%") for c in classes]
    return b'{"label":%b,"' + key.encode() + b'":{' + b",".join(name + b":%b" for name in keys) + b"}}"


def _plain(output: Array) -> Any:
    """Make it writable: a column of shape [batch, 1] is one value a row; strings are lists."""
    if output.ndim == 0:
        output = output.reshape(1)
    if output.ndim == 2 and output.shape[1] == 1:
        output = output.ravel()
    if output.dtype == object:
        return output.tolist()
    return output if output.flags.c_contiguous else output.copy()


def _nested(output: Array) -> Any:
    """Make an output of any shape writable as nested lists, or as one value."""
    if output.dtype.hasobject:
        return output.tolist()
    if not output.ndim:  # floats stay what they are, or a 32-bit one would be written with 17 digits
        return output[()] if output.dtype.kind == "f" else output.item()
    return np.ascontiguousarray(output)


def _listed(output: Array) -> list[Any]:
    plain = _plain(output)
    return plain if isinstance(plain, list) else list(lenient(dumps(plain)))
