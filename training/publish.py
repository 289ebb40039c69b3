"""Publishes an exported model as the next version of a name: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from serving.fleet.manifest import MODEL_FILE
from serving.fleet.repository import NAME, VERSION
from training.export import Exported


def publish(exported: Exported, *, name: str, root: Path) -> tuple[str, bool]:
    """Write `root/name/<next version>/` and return the version, and whether it is new.

    A version with the same bytes is not published twice. Staged beside its place, synced, and renamed into it: a
    crash leaves the old state or the new one. Raises ValueError for a name that is none.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no model name: letters, digits, dot, dash, underscore; 128 at most")
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(exported.content).hexdigest()
    versions = sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and VERSION.fullmatch(p.name))
    for version in versions:
        model = folder / str(version) / MODEL_FILE
        if model.is_file() and hashlib.sha256(model.read_bytes()).hexdigest() == digest:
            return str(version), False
    staged = Path(tempfile.mkdtemp(prefix=".publish-", dir=folder))
    try:
        manifest = {"files": {MODEL_FILE: {"sha256": digest, "size": len(exported.content)}}}
        _write(staged / MODEL_FILE, exported.content)
        _write(staged / "manifest.json", json.dumps(manifest, indent=2).encode() + b"\n")
        staged.chmod(0o755)
        number = versions[-1] + 1 if versions else 1
        while True:
            try:
                staged.rename(folder / str(number))
                break
            except OSError:  # another publisher was faster: the next number is free
                if not (folder / str(number)).exists():
                    raise
                number += 1
        _sync(folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return str(number), True


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
