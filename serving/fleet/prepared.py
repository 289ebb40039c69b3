"""The prepared form of a version: its optimised graph, and its weights packed for this processor, in a file to map.

All processes that map it share one copy, and loading is short. Written by the gate's process into
`models/.serving/cache/<key>/`; the key has the content, onnxruntime's version and the processor in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from serving.fleet.gate import runtime
from serving.fleet.manifest import MODEL_FILE, Entry, Hashes, Manifest

FROM_BYTES = 4 * 1024 * 1024
"""Smaller models skip it: they load in milliseconds, and a copy for each worker costs nothing."""

_INDEX = "index.json"


class _Index(BaseModel):
    files: dict[str, Entry]


def worthwhile(manifest: Manifest) -> bool:
    """Tell whether a version is large enough to have a prepared form."""
    return manifest.size >= FROM_BYTES


def locate(state_dir: Path, manifest: Manifest, hashes: Hashes | None = None) -> Path | None:
    """Return the model file that workers load instead of `model.onnx`, or None.

    Reads and hashes all of it, so that one that was damaged or swapped is never used.
    """
    if not worthwhile(manifest):
        return None
    folder = state_dir / "cache" / key(manifest)
    hashes = hashes or Hashes()
    try:
        index = _Index.model_validate_json((folder / _INDEX).read_bytes())
        for name, entry in index.files.items():
            path = folder / name
            if path.is_symlink() or path.stat().st_size != entry.size or hashes.of(path) != entry.sha256:
                return None
    except (OSError, ValueError):
        return None
    return folder / MODEL_FILE if MODEL_FILE in index.files else None


@contextmanager
def written(state_dir: Path, manifest: Manifest) -> Iterator[Path | None]:
    """Give the gate an empty folder to write the prepared form into; what it leaves there is taken into the cache.

    None where the version is too small, or has its form already. Disk trouble costs the form, and nothing else.
    """
    if not worthwhile(manifest) or locate(state_dir, manifest) is not None:
        yield None
        return
    folder = state_dir / "cache" / f".{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True)
    except OSError:
        yield None
        return
    try:
        yield folder
        with contextlib.suppress(OSError):
            _take(folder, state_dir / "cache" / key(manifest))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take(folder: Path, to: Path) -> None:
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    if MODEL_FILE not in names:
        return
    hashes = Hashes()
    files = {name: Entry(sha256=hashes.of(folder / name), size=(folder / name).stat().st_size) for name in names}
    (folder / _INDEX).write_text(_Index(files=files).model_dump_json())
    shutil.rmtree(to, ignore_errors=True)  # one that is there is not to be trusted, or it would have been located
    folder.rename(to)


def sweep(state_dir: Path, wanted: Collection[Manifest]) -> None:
    """Remove the forms of versions that are not on disk any more, or are for another processor or onnxruntime."""
    keys = {key(manifest) for manifest in wanted}
    with contextlib.suppress(OSError):
        for folder in (state_dir / "cache").iterdir():
            if folder.name not in keys and not folder.name.startswith("."):
                shutil.rmtree(folder, ignore_errors=True)


def key(manifest: Manifest) -> str:
    """Name the prepared form of this content for this onnxruntime and processor."""
    text = f"{manifest.content} {runtime()} {processor()}"
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def processor() -> str:
    """Name what the packed weights depend on: the architecture and the processor's features."""
    features: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features = set(value.split())
                break
    digest = hashlib.sha256(" ".join(sorted(features)).encode()).hexdigest()[:16]
    return f"{platform.machine()}-{digest}"
