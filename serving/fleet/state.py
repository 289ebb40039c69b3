"""The server's own state beside the models: `models/.serving/`, which no scan looks into."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

FOLDER = ".serving"
_STALE_S = 24 * 3600


def state_folder(root: Path) -> Path:
    """Return the folder of the server's own state for a models folder, made if need be.

    It lies in the models folder, so that a rename from it is atomic; where that can't be written to, in the system's
    temporary folder, one for each user and models folder. Raises OSError where neither can be written to.
    """
    own = root / FOLDER
    try:
        own.mkdir(exist_ok=True)
        if os.access(own, os.W_OK | os.X_OK):
            return own
    except OSError:
        pass
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    away = Path(tempfile.gettempdir()) / f"serving-{os.getuid()}-{digest}"
    away.mkdir(mode=0o700, exist_ok=True)
    facts = away.lstat()
    # Verdicts in it are trusted: it must not be one that somebody else has laid there.
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022 or away.is_symlink():
        raise PermissionError(f"{away} belongs to somebody else")
    return away


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(state: Path) -> None:
    """Remove what a crash has left in `staging/` more than a day ago."""
    for folder in (state / "staging").glob("*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
