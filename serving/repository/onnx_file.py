"""Walks the bytes of an ONNX file without loading it: is it whole, which files does it name, where is its metadata.

Reads only lengths and names, in constant memory, so that a file that is still being copied, or was made to harm, can
be looked at by any process. Source: onnx.proto of ONNX 1.23 and the protobuf wire format.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

_WINDOW = 64 * 1024
_DEEPEST = 100
"""Messages within messages; protobuf itself stops at 100."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_TEXT = 16 * 1024

# Message -> field number -> message: only the ways that lead to a tensor.
_WAYS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 14: "metadata", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "metadata": {},
    "external": {},
}
_GRAPH, _OPSET_IMPORT = 7, 8

# What people save by mistake, by its first bytes.
_OTHERS = {
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"PK\x03\x04": "a zip archive (as torch.save and Keras write)",
    b"\x1f\x8b": "a gzip archive",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
}


class NotWhole(ValueError):
    """The bytes are no whole ONNX file; the text says why, for a person."""


@dataclass(frozen=True, slots=True)
class External:
    """A place outside the file where a tensor's bytes are; `end` is the size that the named file must have at least."""

    location: str
    end: int


class Span(NamedTuple):
    """Bytes from `start` to `end` of the file: one whole entry of its metadata."""

    key: str
    start: int
    end: int


@dataclass(slots=True)
class OnnxFile:
    """What `inspect` found."""

    externals: list[External] = field(default_factory=list)
    metadata: list[Span] = field(default_factory=list)


def inspect(path: Path) -> OnnxFile:
    """Walk a file to its end. Raises NotWhole, OSError."""
    with path.open("rb") as file:
        handle = file.fileno()
        head = os.pread(handle, 32, 0)
        for magic, what in _OTHERS.items():
            if head.startswith(magic):
                raise NotWhole(f"not an ONNX file: it is {what}")
        size = os.fstat(handle).st_size
        walker = _Walker(handle, size)
        walker.message("model", 0, size, 0)
        if not (walker.graph and walker.opset):
            raise NotWhole("not an ONNX file, or cut short: there is no whole graph in it")
        return walker.found


def metadata_entry(key: str, value: bytes) -> bytes:
    """Write one entry of a model's metadata, to be appended to its file.

    >>> metadata_entry("a", b"bc").hex(" ")
    '72 07 0a 01 61 12 02 62 63'
    """
    pair = _field(1, key.encode()) + _field(2, value)
    return _field(14, pair)


def _field(number: int, content: bytes) -> bytes:
    text = bytearray([number << 3 | _BYTES])
    length = len(content)
    while length >= 0x80:
        text.append(length & 0x7F | 0x80)
        length >>= 7
    text.append(length)
    return bytes(text) + content


_Text: TypeAlias = dict[int, str]


class _Walker:
    def __init__(self, handle: int, size: int) -> None:
        self._handle = handle
        self._window = b""
        self._window_at = 0
        self.found = OnnxFile()
        self.graph = self.opset = False

    def message(self, kind: str, at: int, end: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise NotWhole("not an ONNX file: it is nested too deep")
        pairs: list[_Text] = []
        while at < end:
            start = at
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise NotWhole("not an ONNX file, or damaged: a field has no number")
            if wire != _BYTES:
                at = self._skip(wire, at, end)
                continue
            length, at = self._varint(at, end)
            stop = at + length
            if stop > end:
                raise NotWhole("not an ONNX file, or cut short: it ends before its own announced end")
            below = _WAYS[kind].get(number)
            if below in ("metadata", "external"):
                pairs.append(self._pair(at, stop))
                if below == "metadata":
                    self.found.metadata.append(Span(pairs[-1].get(1, ""), start, stop))
            elif below is not None:
                self.message(below, at, stop, depth + 1)
            if kind == "model":
                self.graph |= number == _GRAPH
                self.opset |= number == _OPSET_IMPORT
            at = stop
        if kind == "tensor" and pairs:
            self._external({pair.get(1, ""): pair.get(2, "") for pair in pairs})

    def _skip(self, wire: int, at: int, end: int) -> int:
        if wire == _VARINT:
            return self._varint(at, end)[1]
        if wire not in (_FIXED64, _FIXED32):
            raise NotWhole("not an ONNX file, or damaged: a field has an unknown type")
        at += 8 if wire == _FIXED64 else 4
        if at > end:
            raise NotWhole("not an ONNX file, or cut short: it ends inside a number")
        return at

    def _pair(self, at: int, end: int) -> _Text:
        """Read a StringStringEntryProto: {1: key, 2: value}; a long value is left out."""
        texts: _Text = {}
        while at < end:
            tag, at = self._varint(at, end)
            length, at = self._varint(at, end)
            if tag & 7 != _BYTES or at + length > end:
                raise NotWhole("not an ONNX file, or cut short: a text has no end")
            if length <= _MOST_TEXT:
                try:
                    texts[tag >> 3] = self._read(at, length).decode()
                except UnicodeDecodeError:
                    raise NotWhole("not an ONNX file, or damaged: a text in it is not UTF-8") from None
            at += length
        return texts

    def _external(self, facts: dict[str, str]) -> None:
        try:
            end = int(facts.get("offset") or 0) + int(facts.get("length") or 0)
        except ValueError:
            raise NotWhole("a tensor's external data has an offset or a length that is no number") from None
        self.found.externals.append(External(facts.get("location", ""), end))

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        for byte in self._read(at, min(10, end - at)):
            value |= (byte & 0x7F) << shift
            at += 1
            if byte < 0x80:
                return value, at
            shift += 7
        raise NotWhole("not an ONNX file, or cut short: it ends inside a number")

    def _read(self, at: int, length: int) -> bytes:
        start = at - self._window_at
        if start < 0 or start + length > len(self._window):
            self._window = os.pread(self._handle, max(_WINDOW, length), at)
            self._window_at, start = at, 0
        return self._window[start : start + length]
