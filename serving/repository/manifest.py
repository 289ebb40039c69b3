"""What a version consists of: each file with its size and SHA-256, and the one hash of them all.

`manifest.json` is written by our tools. A folder that has one is served only while its files match it; a folder
without one (Triton's layout, a plain copy) gets a manifest made from what lies in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import ModelInvalid, shown
from serving.linux.files import Stamp, stamp_of
from serving.repository import onnx_file

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
_MOST_BYTES = 1024 * 1024


class Entry(BaseModel):
    """One file: its size in bytes and its SHA-256 in hexadecimal."""

    model_config = ConfigDict(frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class Manifest(BaseModel):
    """The files of one version by their path within its folder, and what its publisher said of it."""

    model_config = ConfigDict(frozen=True)

    files: dict[str, Entry]
    note: str = ""
    who: str = ""
    time: float | None = None
    """When it was published, in seconds since 1970."""
    allow_breaking: bool = False
    """Its publisher accepts that callers of the version before may break."""

    @cached_property
    def content(self) -> str:
        """The SHA-256 over names and hashes of all files: two versions with the same one are the same model."""
        lines = (f"{entry.sha256} {name}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def text(self) -> bytes:
        """Write it as `manifest.json` has it."""
        document = self.model_dump(exclude_defaults=True)
        return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


class Hashes:
    """SHA-256 of files, kept for as long as their inode, size and times stay the same."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[Stamp, str]] = {}

    def of(self, path: Path) -> str:
        """Return a file's SHA-256 in hexadecimal. Raises OSError."""
        with path.open("rb") as file:
            key = stamp_of(os.fstat(file.fileno()))
            known = self._known.get(path)
            if known is not None and known[0] == key:
                return known[1]
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[path] = (key, digest)
        return digest

    def keep(self, folders: set[Path]) -> None:
        """Forget files that are in none of these folders."""
        self._known = {path: fact for path, fact in self._known.items() if folders.intersection(path.parents)}


def read(folder: Path) -> Manifest | None:
    """Read a version's manifest; None where it has none. Raises ModelInvalid where it can't be read."""
    try:
        with (folder / MANIFEST_FILE).open("rb") as file:
            text = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelInvalid(f"{MANIFEST_FILE} can't be read: {error.strerror}") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        where = "/".join(str(part) for part in error.errors()[0]["loc"])
        raise ModelInvalid(f"{MANIFEST_FILE} can't be read: {where or 'it'} is not as it should be") from None
    if MODEL_FILE not in manifest.files:
        raise ModelInvalid(f"{MANIFEST_FILE} names no {MODEL_FILE}")
    for name in manifest.files:
        check_name(name)
    return manifest


def check(folder: Path, manifest: Manifest, hashes: Hashes) -> None:
    """Compare the files with the manifest, sizes before hashes. Raises ModelInvalid with the first difference."""
    for name, entry in manifest.files.items():
        size = _regular(folder, name, MANIFEST_FILE)
        if size != entry.size:
            raise ModelInvalid(f"{shown(name)} has {size} bytes, and {MANIFEST_FILE} says {entry.size}: half copied?")
    for name, entry in manifest.files.items():
        if _hash(folder / name, hashes) != entry.sha256:
            raise ModelInvalid(f"{shown(name)} has another SHA-256 than {MANIFEST_FILE} says")


def of(folder: Path, hashes: Hashes) -> Manifest:
    """Make the manifest of a folder without one: the model and the external data that its graph names.

    Raises ModelInvalid where the model or what it names is not whole (yet).
    """
    sizes = {name: _regular(folder, name, MODEL_FILE) for name in parts(folder)}
    return Manifest(files={name: Entry(sha256=_hash(folder / name, hashes), size=size) for name, size in sizes.items()})


def parts(folder: Path, model_file: str = MODEL_FILE) -> list[str]:
    """List a version's files, from its graph: the model, then its external data by their paths within the folder.

    Raises ModelInvalid where the model is not whole, or names a file that is missing, shorter than the graph says, a
    link, or outside of the folder.
    """
    model = folder / model_file
    if not model.is_file():
        raise ModelInvalid(f"no {model_file} in it")
    try:
        found = onnx_file.inspect(model)
    except onnx_file.NotWhole as error:
        raise ModelInvalid(str(error)) from None
    except OSError as error:
        raise ModelInvalid(f"{model_file} can't be read: {error.strerror}") from None
    ends: dict[str, int] = {}
    for external in found.externals:
        check_name(external.location)
        ends[external.location] = max(external.end, ends.get(external.location, 0))
    for name, end in ends.items():
        size = _regular(folder, name, MODEL_FILE)
        if size < end:
            raise ModelInvalid(f"{shown(name)} has {size} bytes, and {MODEL_FILE} uses {end} of it: half copied?")
    return [model_file, *ends]


def check_name(name: str) -> None:
    """Refuse a path that leaves its folder, or that is none. Raises ModelInvalid."""
    path = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or path.is_absolute() or str(path) != name or ".." in path.parts:
        raise ModelInvalid(f"external data at '{shown(name)}' is refused: it must lie inside the model's own folder")


def _regular(folder: Path, name: str, who: str) -> int:
    """Return a file's size. Only the model itself may be a link (as a mounted ConfigMap has it)."""
    path = folder / name
    if name != MODEL_FILE:
        at = folder
        for part in PurePosixPath(name).parts:
            at /= part
            if at.is_symlink():
                raise ModelInvalid(f"{shown(name)} is refused: it is a link")
    try:
        if path.is_file():
            return path.stat().st_size
    except OSError:
        pass
    raise ModelInvalid(f"{who} names {shown(name)}, which is not there")


def _hash(path: Path, hashes: Hashes) -> str:
    try:
        return hashes.of(path)
    except OSError as error:
        raise ModelInvalid(f"{shown(path.name)} can't be read: {error.strerror}") from None
