"""Tells a copy that is finished from one that is in progress, for folders without a manifest (`cp`, `rsync`, NFS).

The rule: the same files with the same sizes and times in two snapshots at least `settle_s` apart, and (see
`manifest.parts`) an ONNX file that parses to its end and whose external data is as long as its graph says.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeAlias

SETTLE_S = 1.0

TEMPORARY = re.compile(r"\..*|.*~|.*\.(part|partial|filepart|tmp|crdownload)")
"""Names under which copying tools write until they are done: rsync's .model.onnx.Ab3x, browsers' .part."""


Files: TypeAlias = tuple[tuple[str, int, int, int, int], ...]
"""Path, size, times of modification and change in ns, and inode of each."""


def snapshot(folder: Path) -> Files:
    """Return the files in a folder, temporary names left out; what vanishes meanwhile is not there."""
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
    return tuple(sorted(files))


class CopyStability:
    """Since when each folder is as it is now."""

    def __init__(self, settle_s: float = SETTLE_S) -> None:
        self._settle_s = settle_s
        self._since: dict[Path, tuple[Files, float]] = {}

    def settled(self, folder: Path, files: Files, at: float) -> bool:
        """Tell whether a folder, with these files at a time (monotonic seconds), has had them for long enough."""
        before, since = self._since.get(folder, ((), at))
        if before != files:
            since = at
        self._since[folder] = files, since
        return at - since >= self._settle_s

    def keep(self, folders: set[Path]) -> None:
        """Forget all other folders."""
        self._since = {folder: seen for folder, seen in self._since.items() if folder in folders}
