"""Whether a version can serve, as far as the disk tells: asked before traffic goes back to one."""

from __future__ import annotations

from pathlib import Path

from serving.errors import ModelInvalid
from serving.gate import gate
from serving.repository import manifest
from serving.repository.manifest import Hashes
from serving.repository.state_directory import state_folder


def unfit(root: Path, name: str, version: str, state_dir: Path | None = None) -> str:
    """Say why a version in the models folder `root` can't serve; '' where nothing speaks against it.

    It is not whole, or the gate has refused it. Reads all of its files.
    """
    try:
        content = content_of(root / name / version)
    except ModelInvalid as error:
        return error.message
    try:
        verdict = gate.verdict(state_folder(root, state_dir), content)
    except OSError:
        return ""
    return "" if verdict is None else "; ".join(verdict.reasons)


def content_of(folder: Path) -> str:
    """Return the hash of a version's content as it lies on disk now; reads all of its files.

    Raises ModelInvalid where it is not whole.
    """
    hashes = Hashes()
    found = manifest.read(folder)
    if found is None:
        return manifest.of(folder, hashes).content
    manifest.check(folder, found, hashes)
    return found.content
