"""Where servers and commands keep what is theirs: staging, reports, prepared forms, quarantine, who serves what.

Never in the models folder: Triton takes each directory there for a model, and refuses to start over one that is none.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

_STALE_S = 24 * 3600


def state_folder(root: Path, given: Path | None = None) -> Path:
    """Return the folder for state that belongs to the models folder `root`, and make it where it is not there.

    given: the one that somebody chose; else it is one of this user's, the same for each process on this machine.
    Raises OSError where it can't be had.
    """
    if given is not None:
        if given.resolve().is_relative_to(root.resolve()):
            raise OSError(errno.EINVAL, "the state folder lies in the models folder", str(given))
        given.mkdir(parents=True, exist_ok=True)
        return given
    return _own_folder(_key(root))


def url_state_folder(url: str) -> Path:
    """Return the folder of this user for a repository in an object store, and make it. Raises OSError."""
    return _own_folder(url_key(url))


def url_key(url: str) -> str:
    """Name a repository in an object store by its URL."""
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _own_folder(key: str) -> Path:
    folder = _base() / f"serving-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _owned(folder, os.getuid()):
        raise PermissionError(errno.EPERM, "the state folder belongs to another user, see --state-dir", str(folder))
    return folder


def state_folders(root: Path, given: Path | None = None) -> list[Path]:
    """Return the state folders in which servers of a models folder may be: also other users', as far as we may look."""
    if given is not None:
        return [given]
    found: list[Path] = []
    try:
        base = _base()
    except OSError:  # there is no folder that can be written to
        return found
    for folder in base.glob(f"serving-*-{_key(root)}"):
        user = folder.name.split("-")[1]
        if user.isdecimal() and _owned(folder, int(user)):
            found.append(folder)
    return found


def subfolder(state: Path, name: str) -> Path:
    """Return a folder in the state folder, open to whom that is open: servers with other user ids may share it.

    Raises OSError.
    """
    folder = state / name
    try:
        folder.mkdir()
    except FileExistsError:
        return folder
    folder.chmod(stat.S_IMODE(state.stat().st_mode))
    return folder


def unique_id() -> str:
    """Return a name for a file of this process, in a folder that several machines share."""
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(4)}"


def _base() -> Path:
    """Choose what survives a restart of the machine, if it may be written to."""
    lasting = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108  what is made there is checked for its owner
    return Path(lasting if os.access(lasting, os.W_OK | os.X_OK) else tempfile.gettempdir())


def _key(root: Path) -> str:
    """Name a models folder by its path, which stays the same when it is unmounted, or is a link that moves on."""
    path = Path(os.path.abspath(root))
    return hashlib.sha256(os.fsencode(path.parent.resolve() / path.name)).hexdigest()[:16]


def _owned(folder: Path, user: int) -> bool:
    """Tell whether a folder is what it seems: a name that can be guessed may have been taken by somebody else."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == user and not facts.st_mode & 0o022


def staging_folder(state: Path) -> Path:
    """Make an empty folder for files that are to become a version; whoever asks removes it. Raises OSError."""
    folder = subfolder(state, "staging") / secrets.token_hex(8)
    folder.mkdir()
    return folder


def sweep(folder: Path, pattern: str = "*") -> None:
    """Remove what a crash has left in a folder more than a day ago."""
    for left in folder.glob(pattern):
        try:
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue
