"""Writes Open Inference Protocol v2 answers: JSON, and the raw tensors that a request asked for behind it."""

from __future__ import annotations

from typing import Any

from serving.engine.signature import Described
from serving.engine.tensor_binder import TensorBinder
from serving.protocols.codec import CONTRIBUTIONS, INLINE_BYTES, Blobs, Mixed
from serving.protocols.headers import HeaderList
from serving.protocols.http_codec import LENGTH
from serving.protocols.open_inference_request import Context
from serving.protocols.strict_json import dumps
from serving.tensor_bytes import as_it_lies, write
from serving.tensors import Array, Tensors

_MOST_SHAPES = 256


class Writer:
    """Writes the answers of one version of a model."""

    def __init__(self, model: Described, binder: TensorBinder) -> None:
        self._binder = binder
        self._head = b'"model_name":%b,"model_version":%b,"outputs":[' % (
            dumps(model.name),
            dumps(model.version),
        )
        self._names = [dumps(spec.name) for spec in binder.outputs]
        self._datatypes = [spec.datatype.encode() for spec in binder.outputs]
        self._heads: list[dict[tuple[int, ...], bytes]] = [{} for _ in binder.outputs]
        # By what is asked for and the shapes: the JSON of small answers that are raw altogether, and their header.
        self._raw: dict[tuple[Any, ...], tuple[bytes, HeaderList]] = {}

    def write(self, outputs: Tensors, context: Context) -> bytes | Mixed:
        """Write the answer; in JSON, numbers that are not finite become null, as in every JSON answer here."""
        identity, wanted = context
        opening = b"{" if identity is None else b'{"id":%b,' % dumps(identity)
        told = outputs[len(self._names) :]
        more = [_contributions(array) for array in told] if told else []
        if wanted is not None:
            return self._chosen(opening, outputs, context, more)
        parts = []
        for position, heads in enumerate(self._heads):
            array = outputs[position]
            head = heads.get(array.shape) or self._output_head(position, array.shape)
            parts.append(b'%b,"data":%b}' % (head, _data(array)))
        return b"%b%b%b]}" % (opening, self._head, b",".join(parts + more))

    def _chosen(self, opening: bytes, outputs: Tensors, context: Context, more: list[bytes]) -> bytes | Mixed:
        """Write the outputs that a request lists, each as it wants it, and others that are written already."""
        identity, wanted = context
        key = (wanted, *[array.shape for array in outputs])
        if identity is None and not more and (known := self._raw.get(key)):
            head, headers = known
            return Mixed(headers, b"".join([head, *[outputs[one[0]].tobytes() for one in wanted or ()]]))
        texts: list[bytes] = []
        blobs: list[bytes | memoryview] = []
        for position, binary, classes in wanted or ():
            array, head = self._described(position, outputs[position], classes)
            if binary:
                blob = write(array) if array.nbytes < INLINE_BYTES or array.dtype.hasobject else as_it_lies(array)
                texts.append(b'%b,"parameters":{"binary_data_size":%d}}' % (head, len(blob)))
                blobs.append(blob)
            else:
                texts.append(b'%b,"data":%b}' % (head, _data(array)))
        body = b"%b%b%b]}" % (opening, self._head, b",".join(texts + more))
        if not blobs:
            return body
        headers = [(LENGTH, b"%d" % len(body))]
        size = len(body) + sum(map(len, blobs))
        if size >= INLINE_BYTES:
            return Mixed(headers, Blobs(size, (body, *blobs)))
        if identity is None and len(blobs) == len(texts) and not more:
            self._remember(key, outputs, body, headers)
        return Mixed(headers, b"".join((body, *blobs)))

    def _described(self, position: int, array: Array, classes: int) -> tuple[Array, bytes]:
        """Return what an output is answered with, and the beginning of its JSON."""
        if not classes:
            return array, self._heads[position].get(array.shape) or self._output_head(position, array.shape)
        array = self._binder.classified(position, array, classes)
        return array, b'{"name":%b,"datatype":"BYTES","shape":%b' % (self._names[position], dumps(array.shape))

    def _remember(self, key: tuple[Any, ...], outputs: Tensors, head: bytes, headers: HeaderList) -> None:
        """Keep the JSON of an answer that is all raw, unless it has strings: their bytes don't follow from a shape."""
        if any(one.classes or outputs[one.position].dtype.hasobject for one in key[0]):
            return
        if len(self._raw) >= _MOST_SHAPES:
            self._raw.clear()
        self._raw[key] = head, headers

    def _output_head(self, position: int, shape: tuple[int, ...]) -> bytes:
        heads = self._heads[position]
        if len(heads) >= _MOST_SHAPES:
            heads.clear()
        made = heads[shape] = b'{"name":%b,"datatype":"%b","shape":%b' % (
            self._names[position],
            self._datatypes[position],
            dumps(shape),
        )
        return made


def _contributions(array: Array) -> bytes:
    return b'{"name":"%b","datatype":"FP64","shape":%b,"data":%b}' % (
        CONTRIBUTIONS.encode(),
        dumps(array.shape),
        _data(array),
    )


def _data(array: Array) -> bytes:
    flat = array.ravel()
    return dumps(flat.tolist() if array.dtype.hasobject else flat)
