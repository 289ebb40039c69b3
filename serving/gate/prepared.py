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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from serving.errors import ModelInvalid
from serving.gate.gate import runtime
from serving.repository import manifest
from serving.repository.manifest import MANIFEST_FILE, MODEL_FILE, Hashes, Manifest
from serving.repository.state_directory import subfolder

FROM_BYTES = 4 * 1024 * 1024
"""Smaller models skip it: they load in milliseconds, and a copy for each worker costs nothing."""


def place(state_dir: Path, content: str) -> Path:
    """Return the folder of the prepared form of this content, for this onnxruntime and processor."""
    return state_dir / "cache" / hashlib.sha256(f"{content} {runtime()} {processor()}".encode()).hexdigest()


def locate(state_dir: Path, content: str) -> Path | None:
    """Return the model file that workers load instead of `model.onnx`, or None. Hashes all of the form.

    One that is not as it was written is removed: the next server that starts has it written anew.
    """
    folder = place(state_dir, content)
    with contextlib.suppress(ModelInvalid):
        declared = manifest.read(folder)
        if declared is not None:
            manifest.check(folder, declared, Hashes())
            return folder / MODEL_FILE
    shutil.rmtree(folder, ignore_errors=True)  # most often there is none
    return None


@contextmanager
def written(state_dir: Path, version: Manifest) -> Iterator[Path | None]:
    """Give the gate an empty folder to write the prepared form into; what it leaves there is taken into the cache.

    None where the version is too small, or has its form already. Disk trouble costs the form, and nothing else.
    """
    to = place(state_dir, version.content)
    if version.size < FROM_BYTES or to.exists():
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
        with contextlib.suppress(OSError, ModelInvalid):  # the gate has left none
            (folder / MANIFEST_FILE).write_bytes(manifest.of(folder, Hashes()).text())
            folder.rename(to)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
