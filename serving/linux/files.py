"""Files as the system has them: their state, whole or not at all, on disk for sure, and locked."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
from pathlib import Path
from typing import TypeAlias

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1

Stamp: TypeAlias = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Return what tells one state of a file from another; nothing where there is no file, or none to be seen."""
    try:
        return stamp_of(path.stat())
    except OSError:
        return ()


def stamp_of(facts: os.stat_result) -> Stamp:
    """Return a stamp by what `stat` said: by inode, for a file may be replaced by one of the same size and times."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place: a reader sees the old one or the new one, never half of one. Raises OSError."""
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


def try_lock(opened: int, *, shared: bool = False) -> bool:
    """Lock an open file, unless somebody else has. Raises OSError where its file system can't.

    By flock: the system frees it when its holder dies, on whatever machine, by no clock. A record lock (fcntl) would
    end as soon as its holder closes any other descriptor of the file.
    """
    try:
        fcntl.flock(opened, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(path: Path, opened: int) -> bool:
    """Tell whether an open file still has this name: a lock on one that was replaced or removed keeps nobody out."""
    try:
        return os.path.samestat(path.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False


def rename_to_free(source: Path, to: Path) -> None:
    """Rename a folder onto a name that must be free. Raises FileExistsError, OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(to), _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(to))
    # Some network file systems do not have it. A plain rename spares all but an empty folder.
    try:
        source.rename(to)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(to)) from None
        raise
