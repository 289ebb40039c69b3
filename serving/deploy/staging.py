"""Files on their way to become a version: copied and hashed in one go, signed, and brought to the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from serving.engine.signature import METADATA_KEY, Signature
from serving.errors import InvalidRequest, ModelInvalid, shown
from serving.gate import gate
from serving.gate.report import GateRefused
from serving.repository import manifest, onnx_file
from serving.repository.manifest import MODEL_FILE, Entry

if TYPE_CHECKING:
    from typing import Self

_CHUNK = 1024 * 1024


class Source(Protocol):
    """Where a version's files come from."""

    def stage(self, folder: Path) -> dict[str, Entry]:
        """Write the model and its external data into an empty folder, and return what was written, by name.

        Raises InvalidRequest, OSError.
        """


@dataclass(frozen=True, slots=True)
class ModelFile:
    """An ONNX file on disk, with the external data that its graph names."""

    path: Path

    def stage(self, folder: Path) -> dict[str, Entry]:
        """Copy it and what it names. Raises InvalidRequest, GateRefused, OSError."""
        if self.path.is_dir():
            raise InvalidRequest(f"{shown(self.path.name)} is a folder: name the ONNX file in it")
        if not self.path.is_file():
            raise InvalidRequest(f"there is no file {shown(self.path.name)}")
        try:
            names = manifest.parts(self.path.parent, self.path.name)
        except ModelInvalid as error:
            raise GateRefused(gate.unreadable(error.message)) from None
        files = {MODEL_FILE: copied(self.path, folder / MODEL_FILE)}
        for name in names[1:]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = copied(self.path.parent / name, folder / name)
        return files


def copied(source: Path | str, to: Path | str) -> Entry:
    """Copy a file to a new one. Raises OSError."""
    source, to = Path(source), Path(to)
    with source.open("rb") as read, Writing(to) as writing:
        while part := read.read(_CHUNK):
            writing.write(part)
        return writing.close()


class Writing:
    """A new file that is hashed while it is written, and is on disk once closed. All methods raise OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # after an error, what is buffered may not fit either
            self._file.close()

    def write(self, part: bytes) -> None:
        """Append some bytes."""
        self._file.write(part)
        self._hash.update(part)
        self._size += len(part)

    def close(self) -> Entry:
        """Bring it to the disk, and return its size and SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Entry(sha256=self._hash.hexdigest(), size=self._size)


def embed(model: Path, signature: bytes) -> Entry:
    """Write a signature into an ONNX file in place of its own; nothing else in it changes. Raises InvalidRequest."""
    try:
        text = Signature.model_validate_json(signature).model_dump_json(exclude_defaults=True).encode()
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"the signature is not valid: /{where}: {first['msg'].lower()}") from None
    return embed_entry(model, METADATA_KEY, text)


def embed_entry(model: Path, key: str, text: bytes) -> Entry:
    """Write an entry of an ONNX file's metadata in place of its own. Raises GateRefused where it is no ONNX file."""
    try:
        spans = [span for span in onnx_file.inspect(model).metadata if span.key == key]
    except onnx_file.NotWhole as error:
        raise GateRefused(gate.unreadable(str(error))) from None
    signed = model.with_name(".signed")
    with model.open("rb") as read, Writing(signed) as writing:
        size = os.fstat(read.fileno()).st_size
        starts = [0, *(span.end for span in spans)]
        ends = [*(span.start for span in spans), size]
        for start, end in zip(starts, ends, strict=True):
            read.seek(start)
            while part := read.read(min(_CHUNK, end - read.tell())):
                writing.write(part)
        # Repeated fields of a protobuf message may stand anywhere in it: this one goes to the end.
        writing.write(onnx_file.metadata_entry(key, text))
        entry = writing.close()
    signed.replace(model)
    return entry


def write(path: Path, content: bytes) -> None:
    """Write a new file, and have it on disk before returning. Raises OSError."""
    with Writing(path) as writing:
        writing.write(content)
        writing.close()
