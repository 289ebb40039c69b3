"""The history of a model's traffic, and the lock of who changes it: history.jsonl, one line a change.

Append-only: each line's `before` is the `after` of the line above, so the last line says what was asked for last. A
line that a crash has torn is passed over, and the next one begins on a line of its own.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.errors import NotReady, ServingError
from serving.linux.files import is_at, sync, try_lock
from serving.repository.traffic import TRAFFIC_FILE, Traffic, parse

HISTORY_FILE = "history.jsonl"
LOCK_WAIT_S = 30.0
_BLOCK = 64 * 1024


@contextmanager
def alone(name: str, folder: Path, *, create: bool = True) -> Iterator[None]:
    """Hold the model's lock, to write. Raises NotReady where it can't be had, or what is done with it can't be written,
    or the history is missing and not to be created.
    """
    until = time.monotonic() + LOCK_WAIT_S
    path = folder / HISTORY_FILE
    while True:
        with writing():
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
            try:
                # Two could each hold a lock, where somebody has put another history in place since it was opened.
                if try_lock(lock) and is_at(path, lock):
                    yield
                    return
            finally:
                os.close(lock)
        if time.monotonic() > until:
            raise NotReady(f"another change of {name} has not ended for {LOCK_WAIT_S:.0f} s: try again")
        time.sleep(0.001 + os.urandom(1)[0] / 25_600)  # 1 to 11 ms, so that those who wait do not march in step


def last(folder: Path) -> Traffic:
    """Return the document after the last change that the history holds."""
    for entry in backwards(folder):
        return traffic_of(entry["after"])
    return Traffic()


def backwards(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a history's entries, newest first; lines that can't be read are passed over."""
    try:
        file = (folder / HISTORY_FILE).open("rb")
    except FileNotFoundError:
        return
    with file:
        at = file.seek(0, os.SEEK_END)
        rest = b""
        while at > 0:
            size = min(_BLOCK, at)
            at -= size
            file.seek(at)
            first, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines):
                if line and (entry := valid(line)) is not None:
                    yield entry
            rest = first
        if rest and (entry := valid(rest)) is not None:
            yield entry


def traffic_of(document: dict[str, Any]) -> Traffic:
    """Read a document that an entry holds. Raises InvalidRequest."""
    return parse(json.dumps(document))


def valid(line: bytes) -> dict[str, Any] | None:
    """Read a line; None where it is torn or not ours."""
    try:
        entry = json.loads(line)
        traffic_of(entry["after"])
        if isinstance(entry["generation"], int):
            return dict(entry)
    except (ValueError, TypeError, KeyError, ServingError):
        pass
    return None


def entry_of(now: float, before: Traffic, after: Traffic, *, who: str, what: str, why: str) -> dict[str, Any]:
    """Make the line of one change. now: Unix time; who, what, why: cut to a length that a line bears."""
    return {
        "when": when(now),
        "who": who[:200],
        "what": what[:200],
        "why": why[:2000],
        "generation": after.generation,
        "before": before.document(),
        "after": after.document(),
    }


def edit(before: Traffic, after: Traffic, who: str) -> dict[str, Any]:
    """Make the line of a document that was changed by hand."""
    return entry_of(time.time(), before, after, who=who, what="edited", why=f"{TRAFFIC_FILE} was edited")


def effective(document: Traffic, last: Traffic) -> tuple[Traffic, bool]:
    """Return a document with the generation that it counts as, and whether it is an edit that nobody has noted.

    last: what the history says.
    """
    if document.generation > last.generation:
        return document, True
    if document.same(last):
        return last, False
    return document.model_copy(update={"generation": last.generation + 1}), True


def when(seconds: float) -> str:
    """Write Unix time as the history does."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def append(folder: Path, *entries: dict[str, Any]) -> None:
    """Add lines, under the lock; they are on disk when this returns. Raises OSError."""
    line = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
    file = os.open(folder / HISTORY_FILE, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        if size == 0:
            sync(folder)  # the file may be new, and its name must outlive a loss of power as its lines do
        elif os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line  # behind a torn line
        written = os.write(file, line)  # in one call: a kill leaves all of it or nothing
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def writing() -> Iterator[None]:
    """Turn what the file system says no with into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise NotReady("the models folder is read-only here: change traffic.json where it comes from") from error
        reason = (error.strerror or "input/output error").lower()
        raise NotReady(f"the change could not be written, and nothing is changed: {reason}") from error
