"""The prepared form of a version: its optimised graph, and its weights packed for this processor, in a file to map.

All processes that map it share one copy, and loading is short. Written by the gate's process into
`cache/<key>/` in the state folder; the key has the content, onnxruntime's version and the processor in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from serving.gate.gate import runtime
from serving.repository.manifest import MODEL_FILE, Entry, Hashes, Manifest
from serving.repository.state_directory import subfolder

FROM_BYTES = 4 * 1024 * 1024
"""Smaller models skip it: they load in milliseconds, and a copy for each worker costs nothing."""

_INDEX = "index.json"
_YOUNG_S = 3600


class _Made(Entry):
    """A file of the form as it was when it was hashed."""

    inode: int
    changed_ns: int


class _Index(BaseModel):
    files: dict[str, _Made]


def worthwhile(manifest: Manifest) -> bool:
    """Tell whether a version is large enough to have a prepared form."""
    return manifest.size >= FROM_BYTES


def locate(state_dir: Path, content: str) -> Path | None:
    """Return the model file that workers load instead of `model.onnx`, or None.

    It is the file that was hashed when it was made: the system notes every change of a file. Costs microseconds.
    """
    folder = state_dir / "cache" / key(content)
    index = _index(folder)
    if index is None or not all(_facts(folder / name) == _noted(made) for name, made in index.files.items()):
        return None
    return folder / MODEL_FILE


def verify(state_dir: Path, content: str) -> bool:
    """Hash a prepared form, once for each server that starts, and remove one that is not as it was written."""
    folder = state_dir / "cache" / key(content)
    hashes = Hashes()
    index = _index(folder)
    try:
        if (
            index is not None
            and locate(state_dir, content) is not None
            and all(hashes.of(folder / name) == made.sha256 for name, made in index.files.items())
        ):
            return True
    except OSError:
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _index(folder: Path) -> _Index | None:
    try:
        index = _Index.model_validate_json((folder / _INDEX).read_bytes())
    except (OSError, ValueError):
        return None
    return index if MODEL_FILE in index.files else None


def _facts(path: Path) -> tuple[int, ...]:
    try:
        facts = path.lstat()
    except OSError:
        return ()
    return facts.st_ino, facts.st_size, facts.st_ctime_ns


def _noted(made: _Made) -> tuple[int, ...]:
    return made.inode, made.size, made.changed_ns


@contextmanager
def written(state_dir: Path, manifest: Manifest) -> Iterator[Path | None]:
    """Give the gate an empty folder to write the prepared form into; what it leaves there is taken into the cache.

    None where the version is too small, or has its form already. Disk trouble costs the form, and nothing else.
    """
    if not worthwhile(manifest) or locate(state_dir, manifest.content) is not None:
        yield None
        return
    try:
        folder = subfolder(state_dir, "cache") / f".{secrets.token_hex(8)}"
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        yield folder
        with contextlib.suppress(OSError):
            _take(folder, state_dir / "cache" / key(manifest.content))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take(folder: Path, to: Path) -> None:
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    if MODEL_FILE not in names:
        return
    files = {}
    for name in names:
        sha256 = Hashes().of(folder / name)
        inode, size, changed_ns = _facts(folder / name)
        files[name] = _Made(sha256=sha256, size=size, inode=inode, changed_ns=changed_ns)
    (folder / _INDEX).write_text(_Index(files=files).model_dump_json())
    shutil.rmtree(to, ignore_errors=True)  # one that is there is not to be trusted, or it would have been located
    folder.rename(to)


def sweep(state_dir: Path, contents: Collection[str]) -> None:
    """Remove the forms of contents that are not on disk any more, or are for another processor or onnxruntime.

    One that is younger than an hour stays: its version may be about to be published.
    """
    keys = {key(content) for content in contents}
    with contextlib.suppress(OSError):
        for folder in (state_dir / "cache").iterdir():
            if folder.name not in keys and time.time() - folder.lstat().st_mtime > _YOUNG_S:
                shutil.rmtree(folder, ignore_errors=True)


def key(content: str) -> str:
    """Name the prepared form of this content for this onnxruntime and processor."""
    return hashlib.sha256(f"{content} {runtime()} {processor()}".encode()).hexdigest()


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
