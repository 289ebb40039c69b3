"""Tells at once when something in a folder moves, where the file system has events."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import watchfiles


def watch(root: Path, moved: Callable[[], None], stop: threading.Event) -> None:
    """Call `moved` after each change below `root`, until `stop`, from another thread.

    File systems of networks say nothing of what others change: the coordinator's own scans find that. Where another
    folder comes in the place of `root` (a mount, a link that moves on), that one is watched.
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
                    raise_interrupt=False,
                    yield_on_timeout=True,
                ):
                    if changes:
                        moved()
                    # Once a second even if nothing moves: events go on to tell of the folder that was there before.
                    if _identity(root) != watched:
                        moved()
                        break
            except (OSError, RuntimeError):
                stop.wait(1.0)  # it is not there, or no watch can be had: the coordinator scans by itself too

    threading.Thread(target=run, name="watch", daemon=True).start()


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
