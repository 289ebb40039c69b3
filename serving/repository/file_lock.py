"""Locks on open files, by flock: the system frees one when its holder dies, on whatever machine, by no clock.

Not by record locks (fcntl): one of those would end as soon as its holder closes any other descriptor of the file.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def try_lock(opened: int, *, shared: bool = False) -> bool:
    """Lock an open file, unless somebody else has. Raises OSError where its file system can't."""
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
