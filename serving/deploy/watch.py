"""Tells when something in a folder moves: native events where the file system has them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import watchfiles

_SILENT = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "ceph", "glusterfs", "lustre", "virtiofs", "vboxsf"})
"""File systems on which others' changes raise no event: they are polled."""
POLL_MS = 500


def watch(root: Path, moved: Callable[[], None], stop: threading.Event) -> threading.Thread:
    """Call `moved` after each change below `root`, until `stop`, from another thread.

    Where another folder comes in the place of `root` (a mount, a link that moves on), that one is watched.
    """
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it logs each change

    def run() -> None:
        while not stop.is_set():
            try:
                watched = _identity(root)
                for changes in watchfiles.watch(
                    root,
                    watch_filter=None,
                    debounce=200,
                    step=20,
                    stop_event=stop,
                    rust_timeout=1000,
                    poll_delay_ms=POLL_MS,
                    force_polling=_silent(root),
                    raise_interrupt=False,
                    yield_on_timeout=True,
                ):
                    if changes:
                        moved()
                    if _identity(root) != watched:
                        moved()
                        break
            except (OSError, RuntimeError):
                stop.wait(1.0)  # it is not there, or no watch can be had: the coordinator scans by itself too

    thread = threading.Thread(target=run, name="watch", daemon=True)
    thread.start()
    return thread


def watch_code(root: Path, edited: Callable[[], None], stop: threading.Event) -> None:
    """Call `edited` after each change to a Python file below `root`, until `stop`, from another thread."""
    logging.getLogger("watchfiles").setLevel(logging.WARNING)

    def run() -> None:
        for _ in watchfiles.watch(
            root, watch_filter=watchfiles.PythonFilter(), debounce=200, stop_event=stop, raise_interrupt=False
        ):
            edited()

    threading.Thread(target=run, name="watch-code", daemon=True).start()


def _identity(root: Path) -> tuple[int, int]:
    facts = root.stat()
    return facts.st_dev, facts.st_ino


def _silent(root: Path) -> bool:
    """Tell whether a folder is on a file system that does not tell of changes."""
    best, kind = "", ""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return True
    where = str(root.resolve())
    for line in lines:
        _, point, fstype, *_ = line.split()
        if (where == point or where.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, fstype
    return kind.split(".")[0] in _SILENT
