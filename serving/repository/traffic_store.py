"""Keeps each model's traffic document and its history on disk, for any number of processes at once.

<root>/<name>/traffic.json      replaced by rename, so that a reader sees the old one or the new one
<root>/<name>/history.jsonl     one line a change, and the lock of who makes one (`serving.repository.history`)
<root>/<name>/.history.ahead    the line of the change in progress, written ahead: after a crash, the next one appends
                                it where the change was made, and forgets it where it was not

Of a folder that mirrors a repository in an object store, changes are made there (`remote_traffic`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.errors import (
    GenerationConflict,
    InvalidRequest,
    ModelInvalid,
    ModelNotFound,
    NotReady,
    ServingError,
    shown,
)
from serving.linux.files import sync
from serving.repository import history, manifest
from serving.repository.manifest import MODEL_FILE
from serving.repository.quarantine import Quarantine
from serving.repository.remote_traffic import RemoteTraffic
from serving.repository.repository import NAME, VERSION
from serving.repository.traffic import TRAFFIC_FILE, Traffic, parse
from serving.repository.transitions import Transition, restore

log = logging.getLogger("serving.traffic")

_AHEAD_FILE = ".history.ahead"


class TrafficStore:
    """The traffic documents under one models folder. Every method blocks on the disk: call it off the event loop.

    state_dir: see `state_folder`.
    """

    def __init__(self, root: Path, state_dir: Path | None = None) -> None:
        self.root = root
        self.state_dir = state_dir
        self.remote = RemoteTraffic.of(root)
        """Where changes are made, of a folder that mirrors a repository in an object store; None for any other."""

    def read(self, name: str, *, anyway: bool = False) -> Traffic:
        """Return a model's document as it is now. Raises ModelNotFound, or InvalidRequest where it can't be read.

        A file that was edited by hand counts as a new generation, though nobody raised the number in it. anyway: where
        it can't be read, what it said last is returned.
        """
        folder = self._folder(name)
        # In this order: a change that comes between is then one whose generation has grown.
        last = history.last(folder)
        return history.effective(_document(folder, last if anyway else None), last)[0]

    def change(
        self,
        name: str,
        transition: Transition,
        *,
        who: str,
        what: str | Callable[[Traffic, Traffic], str],
        why: str = "",
        if_generation: int | None = None,
        anyway: bool = False,
    ) -> Traffic:
        """Make one step and note it: the next generation is on disk, and stays, when this returns it.

        who: a key's name or a user of the system. what: the verb and what it was given, or what says that of the state
        before and after. if_generation: the generation that the caller has seen. anyway: see `read`; the document that
        can't be read is replaced. Raises GenerationConflict where it is another by now, ModelNotFound, NotReady where
        the folder can't be written, and what `transition` raises; nothing is changed then.
        """
        folder = self._folder(name)

        def make(before: Traffic) -> tuple[Traffic, dict[str, Any]]:
            if if_generation is not None and before.generation != if_generation:
                raise GenerationConflict(
                    f"the traffic of {name} is at generation {before.generation}, and the change was made for "
                    f"{if_generation}: look at it and try again",
                    before.document(),
                )
            now = time.time()
            after = transition(before).model_copy(update={"generation": before.generation + 1, "since": round(now, 3)})
            said = what if isinstance(what, str) else what(before, after)
            return after, history.entry_of(now, before, after, who=who, what=said, why=why)

        if self.remote is not None:
            return self.remote.change(name, make, anyway=anyway)
        with history.alone(name, folder):
            after, entry = make(_imported(folder, anyway=anyway))
            ahead = folder / _AHEAD_FILE
            # On disk, by content and by name, before the document is: a change must not outlive who made it.
            _write(ahead, json.dumps(entry).encode())
            sync(folder)
            fresh = folder / f".{TRAFFIC_FILE}.new"
            _write(fresh, after.text())
            fresh.replace(folder / TRAFFIC_FILE)
            try:
                # The document before its line, or a loss of power could leave the line of a change that is not made.
                sync(folder)
                history.append(folder, entry)
                ahead.unlink()
            except OSError as error:  # the change is made, and its line is kept for the next one
                log.warning("the history of %s is a line behind: %s", name, error.strerror)
            return after

    def revert(self, name: str, after: Traffic, *, who: str, why: str) -> Traffic:
        """Take a change back, as a new generation: `after` is what it returned. Raises GenerationConflict where it has
        been overtaken, and then it must stay.
        """
        for entry in history.backwards(self._folder(name)):
            if entry["generation"] == after.generation:
                back, what = restore(history.traffic_of(entry["before"])), f"reverted: {entry['what']}"
                return self.change(name, back, who=who, what=what, why=why, if_generation=after.generation)
        raise NotReady(f"generation {after.generation} of {name} is not in its history")

    def versions(self, name: str) -> list[str]:
        """Return the versions in a model's folder, whole or not, in ascending order. Raises ModelNotFound."""
        return [version for version in self._folders(name) if (self.root / name / version / MODEL_FILE).is_file()]

    def usable(self, name: str) -> list[str]:
        """Return the versions that are not in quarantine, with a model or without, in ascending order.

        Raises ModelNotFound.
        """
        held = {case.version for case in Quarantine(self.root, self.state_dir).cases() if case.name == name}
        return [version for version in self._folders(name) if version not in held]

    def _folders(self, name: str) -> list[str]:
        found = [p.name for p in self._folder(name).iterdir() if VERSION.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=int)

    def names(self) -> list[str]:
        """Return the models in the folder."""
        try:
            return sorted(p.name for p in self.root.iterdir() if NAME.fullmatch(p.name) and p.is_dir())
        except OSError:
            return []

    def earlier(self, name: str) -> list[str]:
        """Return the versions that were stable before this one, the last first; what was rolled back is not one."""
        line: list[str] = []
        for entry in self.history(name, 1000):
            stable = entry["after"].get("stable")
            if stable is None or (line and line[-1] == stable):
                continue
            if entry["what"].startswith(("rollback", "reverted")) and stable in line:
                del line[line.index(stable) + 1 :]
            else:
                line.append(stable)
        return list(dict.fromkeys(reversed(line[:-1])))

    def import_edit(self, name: str) -> Traffic:
        """Note an edit by hand in the history, finish what a crash left, and return the document as `read` does.

        Where the folder can't be written nothing is noted, and that is no error.
        """
        folder = self._folder(name)
        if self.remote is not None:  # where the next change notes it
            return self.read(name)
        last = history.last(folder)
        if history.effective(_document(folder), last)[1] or (folder / _AHEAD_FILE).exists():
            # A folder that is being removed loses its document too: nothing may be created in it then.
            create = last == Traffic()
            with contextlib.suppress(NotReady), history.alone(name, folder, create=create):
                return _imported(folder)
        return self.read(name)

    def history(self, name: str, limit: int = 100) -> list[dict[str, Any]]:
        """Return the last `limit` changes, oldest first: when, who, what, why, generation, before, after."""
        folder = self._folder(name)
        if (folder / _AHEAD_FILE).exists():
            with contextlib.suppress(NotReady), history.alone(name, folder):
                _repair(folder)
        return list(itertools.islice(history.backwards(folder), limit))[::-1]

    def events(self, name: str, limit: int = 100) -> list[dict[str, Any]]:
        """Return the last `limit` changes and publications, oldest first. Of the latter those whose version is there.

        A publication has no generation, before and after.
        """
        published = []
        for version in self._folders(name):
            with contextlib.suppress(ModelInvalid):
                found = manifest.read(self.root / name / version)
                if found is not None and found.time is not None:
                    what = f"publish {version}"
                    entry = {"when": history.when(found.time), "who": found.who, "what": what, "why": found.note}
                    published.append({**entry, "generation": None, "before": None, "after": None})
        both = sorted((*published, *self.history(name, limit)), key=lambda entry: str(entry["when"]))
        return both[-limit:]

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        if not NAME.fullmatch(name) or not folder.is_dir():
            raise ModelNotFound(f"no model is called '{shown(name)}'")
        return folder


def _imported(folder: Path, *, anyway: bool = False) -> Traffic:
    """Under the lock: bring the history up to the document, and return the document."""
    _repair(folder)
    last = history.last(folder)
    traffic, edited = history.effective(_document(folder, last if anyway else None), last)
    if edited:
        history.append(folder, history.edit(last, traffic, _owner(folder)))
    return traffic


def _repair(folder: Path) -> None:
    """Under the lock: append the line of a change that was made and not noted."""
    ahead = folder / _AHEAD_FILE
    try:
        entry = history.valid(ahead.read_bytes())
    except FileNotFoundError:
        return
    if entry is not None and entry["generation"] > history.last(folder).generation:
        made = history.traffic_of(entry["after"])
        with contextlib.suppress(ServingError):
            if _document(folder) == made:
                history.append(folder, entry)
    ahead.unlink()  # of a change that was not made, or whose line is there


def _document(folder: Path, instead: Traffic | None = None) -> Traffic:
    """Read the document; `instead` is returned where it says nothing sensible."""
    try:
        return parse((folder / TRAFFIC_FILE).read_bytes())
    except FileNotFoundError:
        return Traffic()
    except InvalidRequest:
        if instead is None:
            raise
        return instead
    except OSError as error:
        raise NotReady(f"{TRAFFIC_FILE} can't be read: {(error.strerror or 'input/output error').lower()}") from None


def _owner(folder: Path) -> str:
    try:
        return (folder / TRAFFIC_FILE).owner()
    except (OSError, KeyError):
        return "unknown"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
