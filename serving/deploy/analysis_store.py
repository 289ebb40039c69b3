"""Keeps what each server saw of the versions that are tried, in files that outlive it and that the others add up.

analyses/<model>/<server>.json in the state folder: one for each server and analysis, locked for as long as the server
lives. So who finds one unlocked knows that its server is gone, on whatever machine, by no clock: by a clean end, where
the file says `closed`, or by an unclean one.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from serving.deploy.analysis import Figures
from serving.linux.files import is_at, try_lock
from serving.repository.state_directory import state_folder, subfolder, unique_id

_BYTES = 4096
"""Of each file: it is written in place, for a lock is the file's and not the name's, and in one call, so that it is
never half written."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What figures are about: the generation that began the analysis, and the contents of both versions."""

    began: int
    content: str
    against: str

    def of(self, other: Subject, *, since: int) -> bool:
        """Tell whether both are the same contents, and this was begun no earlier than that."""
        return (self.content, self.against) == (other.content, other.against) and self.began >= since


@dataclass(frozen=True, slots=True)
class Record:
    """What one server saw. usual: the other version's mean seconds, where that answers nothing any more."""

    subject: Subject
    figures: Figures
    usual: float | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Others:
    """What is known of the other servers: records of those that live, and of those that are gone, given out once."""

    living: list[Record]
    gone: list[Record]


class AnalysisStore:
    """This server's files. Every method blocks on the disk, and raises OSError where that can't be written.

    root: the models folder. state_dir: see `state_folder`.
    """

    def __init__(self, root: Path, state_dir: Path | None = None) -> None:
        self._root = root
        self._state_dir = state_dir
        self._id = unique_id()
        self._files: dict[str, tuple[int, Record]] = {}

    def save(self, name: str, record: Record) -> None:
        """Write down what this server saw, for a model."""
        opened, before = self._files.get(name, (None, None))
        if opened is None:
            opened = self._create(name, record)
        elif record != before:
            _write(opened, record)
        self._files[name] = opened, record

    def others(self, name: str) -> Others:
        """Read what other servers saw. Of one that is gone the file is removed: the caller takes over what it saw."""
        living, gone = [], []
        mine = self._file(name)
        for path in sorted(mine.parent.glob("*.json")):
            if path == mine:
                continue
            with contextlib.suppress(FileNotFoundError):
                opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    alive = not try_lock(opened)
                    record = _read(opened)
                    if alive:
                        living += [record] if record is not None else []
                    elif is_at(path, opened):  # else another server was faster, and has taken it over
                        path.unlink()
                        gone += [record] if record is not None else []
                finally:
                    os.close(opened)
        return Others(living, gone)

    def forget(self, name: str) -> None:
        """Remove what this server saw: the analysis is over."""
        opened, _ = self._files.pop(name, (None, None))
        if opened is not None:
            with contextlib.suppress(OSError):
                self._file(name).unlink(missing_ok=True)
            os.close(opened)

    def close(self) -> None:
        """Leave what was seen to the next server: this one ends as it should."""
        for opened, record in self._files.values():
            with contextlib.suppress(OSError):
                _write(opened, replace(record, closed=True))
            os.close(opened)
        self._files.clear()

    def _create(self, name: str, record: Record) -> int:
        file = self._file(name)
        # Under its name only when it is locked: an unlocked one is taken for that of a server that is gone.
        fresh = file.with_suffix(".new")
        opened = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(opened, stat.S_IMODE(file.parent.stat().st_mode) & 0o666)  # open to whom the folder is
            try_lock(opened)  # nobody else knows of it yet
            _write(opened, record)
            fresh.replace(file)
        except OSError:
            os.close(opened)
            raise
        return opened

    def _file(self, name: str) -> Path:
        folder = subfolder(subfolder(state_folder(self._root, self._state_dir), "analyses"), name)
        return folder / f"{self._id}.json"


def _write(opened: int, record: Record) -> None:
    os.pwrite(opened, orjson.dumps(asdict(record)).ljust(_BYTES), 0)


def _read(opened: int) -> Record | None:
    try:
        said = orjson.loads(os.pread(opened, _BYTES, 0))
        return Record(Subject(**said["subject"]), Figures(**said["figures"]), said["usual"], said["closed"])
    except (ValueError, TypeError, KeyError):
        return None
