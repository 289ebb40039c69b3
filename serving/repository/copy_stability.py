"""Tells a copy that is finished from one that is in progress, for folders without a manifest (`cp`, `rsync`, NFS).

The rule: the same files with the same sizes and times in two snapshots at least `settle_s` apart, and (see
`manifest.parts`) an ONNX file that parses to its end and whose external data is as long as its graph says.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

SETTLE_S = 1.0

TEMPORARY = re.compile(r"\..*|.*~|.*\.(part|partial|filepart|tmp|crdownload)")
"""Names under which copying tools write until they are done: rsync's .model.onnx.Ab3x, browsers' .part."""


Files: TypeAlias = tuple[tuple[str, int, int, int, int], ...]
"""Path, size, times of modification and change in ns, and inode of each."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A folder at one time (monotonic seconds)."""

    at: float
    files: Files


def snapshot(folder: Path, at: float) -> Snapshot:
    """Snapshot at a folder, temporary names left out; what vanishes meanwhile is not there."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not TEMPORARY.fullmatch(name)]
        for name in names:
            if TEMPORARY.fullmatch(name):
                continue
            path = os.path.join(parent, name)
            try:
                facts = os.stat(path)
            except OSError:
                continue
            files.append((path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino))
    return Snapshot(at, tuple(sorted(files)))


def settled(first: Snapshot, now: Snapshot, settle_s: float = SETTLE_S) -> bool:
    """Tell whether nothing has changed since `first`, for long enough."""
    return first.files == now.files and now.at - first.at >= settle_s


class CopyStability:
    """The first snapshot of each folder that shows it as it is now."""

    def __init__(self, settle_s: float = SETTLE_S) -> None:
        self._settle_s = settle_s
        self._first: dict[Path, Snapshot] = {}

    def settled(self, folder: Path, now: Snapshot) -> bool:
        """Tell whether a folder has been for long enough as it is `now`."""
        first = self._first.get(folder)
        if first is None or first.files != now.files:
            self._first[folder] = first = now
        return settled(first, now, self._settle_s)

    def keep(self, folders: set[Path]) -> None:
        """Forget all other folders."""
        self._first = {folder: first for folder, first in self._first.items() if folder in folders}
