"""Whether a version can serve, as far as the disk tells: asked before traffic goes back to one."""

from __future__ import annotations

from pathlib import Path

from serving.errors import ModelInvalid
from serving.fleet import gate, manifest
from serving.fleet.manifest import Hashes
from serving.fleet.state import state_folder


def unfit(root: Path, name: str, version: str, state_dir: Path | None = None) -> str:
    """Say why a version in the models folder `root` can't serve; '' where nothing speaks against it.

    It is not whole, or the gate has refused it. Reads all of its files.
    """
    folder = root / name / version
    hashes = Hashes()
    try:
        found = manifest.read(folder)
        if found is None:
            found = manifest.of(folder, hashes)
        else:
            manifest.check(folder, found, hashes)
    except ModelInvalid as error:
        return error.message
    try:
        verdict = gate.verdict(state_folder(root, state_dir), found.content)
    except OSError:
        return ""
    return "" if verdict is None else "; ".join(verdict.reasons)
