"""Traffic documents of a repository in an object store: any number of deployers, and none loses a change.

<prefix>/<name>/history.jsonl   the truth: replaced only in place of the state that was read (If-Match), a line longer
<prefix>/<name>/traffic.json    what its last line says, for people and other tools; an edit of it is followed

Both are as in a folder. Whoever is stopped between the two leaves a traffic.json that is one of the history's earlier
states, which counts for nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from serving.errors import InvalidRequest, NotReady
from serving.linux.files import write_whole
from serving.repository import history
from serving.repository.history import HISTORY_FILE
from serving.repository.object_store import Bucket, Held, Overtaken, StoreFailed, Token
from serving.repository.traffic import TRAFFIC_FILE, Traffic, parse

log = logging.getLogger("serving.traffic")

SOURCE_FILE = ".object-store"
"""In the root of a folder that mirrors a repository in an object store: its URL."""
_TRIES = 50

Make: TypeAlias = Callable[[Traffic], tuple[Traffic, dict[str, Any]]]
"""Makes the next document, and its line, of the one before."""


@dataclass(frozen=True, slots=True)
class _State:
    """Both objects as they were read, and what they mean."""

    history: Held | None
    written: Held | None
    entries: tuple[dict[str, Any], ...]
    last: Traffic
    """What the history says."""
    traffic: Traffic
    edited: bool
    """Whether traffic.json says something that the history does not know."""


class RemoteTraffic:
    """The traffic documents below one URL, and their copies in the folder that mirrors it. All methods block."""

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self.bucket = bucket
        self._root = root

    @classmethod
    def of(cls, root: Path) -> RemoteTraffic | None:
        """Return those of the repository that a folder mirrors; None for any other folder."""
        try:
            return cls(Bucket((root / SOURCE_FILE).read_text()), root)
        except OSError:
            return None

    def change(self, name: str, make: Make, *, anyway: bool = False) -> Traffic:
        """Make one step, as `TrafficStore.change`: when this returns it is in the store and in the folder.

        Raises NotReady where the store can't be written to, InvalidRequest where traffic.json can't be read, and what
        `make` raises.
        """
        for _ in range(_TRIES):
            try:
                state = self._read(name, anyway=anyway)
                after, entry = make(state.traffic)
                lines = self._write(name, state, after, entry)
            except Overtaken:
                time.sleep(random.uniform(0.01, 0.1))  # noqa: S311  so that those who lose do not march in step
                continue
            except StoreFailed as error:
                raise NotReady(f"{error.message}; nothing is changed") from error
            try:
                _install(name, self._root / name, after, (*state.entries, *lines))
            except NotReady as error:  # it is made, and the mirror brings it
                log.warning("a change of %s is in the store and not yet here: %s", name, error.message)
            return after
        raise NotReady(f"others change {name} all the time: try again")

    def install(self, name: str, folder: Path, *, coming: Collection[str] = ()) -> bool:
        """Bring a model's folder to what the store says. Raises NotReady, and InvalidRequest for a bad document.

        coming: versions that will be there soon; where one of them has a role nothing is done, and False returned.
        """
        state = self._read(name)
        roles = (state.traffic.canary, state.traffic.shadow)
        named = {state.traffic.stable, *state.traffic.labels.values(), *(role.version for role in roles if role)}
        if named.intersection(coming):
            return False
        _install(name, folder, state.traffic, state.entries)
        return True

    def _read(self, name: str, *, anyway: bool = False) -> _State:
        # In this order: a change that comes between has then made an old state of what was read first.
        written = self.bucket.read(f"{name}/{TRAFFIC_FILE}")
        kept = self.bucket.read(f"{name}/{HISTORY_FILE}")
        lines = [line for line in kept.content.split(b"\n") if line] if kept is not None else []
        entries = tuple(entry for line in lines if (entry := history.valid(line)) is not None)
        # What came otherwise than it was written would be written back, and a change that is not seen be lost.
        torn = lines and history.valid(lines[-1]) is None
        if torn or any(one["after"] != two["before"] for one, two in itertools.pairwise(entries)):
            raise StoreFailed(f"{HISTORY_FILE} of {name} is not whole: each line begins where the one above ends")
        last = history.traffic_of(entries[-1]["after"]) if entries else Traffic()
        try:
            document = parse(written.content) if written is not None else last
        except InvalidRequest:
            if not anyway:
                raise
            document = last
        known = any(
            entry["generation"] == document.generation and entry["after"] == document.document() for entry in entries
        )
        traffic, edited = (last, False) if known else history.effective(document, last)
        return _State(kept, written, entries, last, traffic, edited)

    def _write(self, name: str, state: _State, after: Traffic, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Replace both objects; return the history's new lines. Raises Overtaken, StoreFailed: nothing is changed."""
        over, lines = state.written.token if state.written is not None else None, [entry]
        if state.edited:  # which first becomes a state of the history's own, or it would be taken for a new edit again
            lines.insert(0, history.edit(state.last, state.traffic, "unknown"))
            over = self.bucket.write(f"{name}/{TRAFFIC_FILE}", state.traffic.text(), over)
        before = state.history.content if state.history is not None else b""
        content = b"".join(line + b"\n" for line in (*before.splitlines(), *(json.dumps(e).encode() for e in lines)))
        try:
            self.bucket.write(f"{name}/{HISTORY_FILE}", content, state.history.token if state.history else None)
        except (Overtaken, StoreFailed) as error:
            # The store may have done it all the same, and its answer got lost.
            try:
                kept = self.bucket.read(f"{name}/{HISTORY_FILE}")
            except StoreFailed:
                text = f"{error.message}: whether the change of {name} is made shows once it does"
                raise NotReady(text) from error
            if kept is None or json.dumps(entry).encode() not in kept.content:
                raise
        with contextlib.suppress(StoreFailed, InvalidRequest):  # the next change writes it
            self._write_document(name, after, over)
        return lines

    def _write_document(self, name: str, after: Traffic, over: Token | None) -> None:
        """Write what the history says now, unless a later change or an edit is to be seen there."""
        for _ in range(_TRIES):
            try:
                self.bucket.write(f"{name}/{TRAFFIC_FILE}", after.text(), over)
                return
            except Overtaken:  # by the change before, whose history was already there
                state = self._read(name)
                if state.edited or state.traffic.generation != after.generation:
                    return
                over = state.written.token if state.written is not None else None


def _install(name: str, folder: Path, traffic: Traffic, entries: Iterable[dict[str, Any]]) -> None:
    """Write what the store says into a model's folder, unless that has seen a later answer. Raises NotReady."""
    with history.alone(name, folder):
        last = history.last(folder)
        if traffic.generation >= last.generation:
            write_whole(folder / TRAFFIC_FILE, traffic.text())
            history.append(folder, *(entry for entry in entries if entry["generation"] > last.generation))
