"""The server's own folder beside the models: staging, verdicts, prepared forms, who serves what."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

NAME = ".serving"
_STALE_S = 24 * 3600


def state_folder(root: Path) -> Path:
    """Return the folder for state that belongs to a models folder: inside it, or where that is read-only, elsewhere.

    Raises OSError where neither can be had.
    """
    inside = root / NAME
    try:
        inside.mkdir(exist_ok=True)
        if os.access(inside, os.W_OK):
            return inside
    except OSError:
        pass
    digest = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    elsewhere = Path(tempfile.gettempdir()) / f"serving-{os.getuid()}-{digest}"
    elsewhere.mkdir(mode=0o700, exist_ok=True)
    # A folder with a name that can be guessed may have been put there by somebody else, to be trusted by us.
    facts = elsewhere.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise PermissionError(f"{elsewhere} belongs to another user")
    return elsewhere


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(folder: Path) -> None:
    """Have a folder's names on disk before returning, so that a rename survives a loss of power. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sweep(state: Path) -> None:
    """Remove what a crash has left in `staging/` more than a day ago."""
    for folder in (state / "staging").glob("*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
