"""Documents that the workers of one server show each other, and who of them writes what is for all."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import orjson

from serving.linux.files import stamp, try_lock, write_whole

log = logging.getLogger("serving.monitoring")


class SharedDocuments:
    """JSON documents by name, in a folder that the workers share; without one, in this process alone.

    slot: this worker's number. Used by one thread at a time.
    """

    def __init__(self, folder: Path | None, slot: int) -> None:
        self._folder = folder
        self._slot = slot
        self._lock: int | None = None
        self._read: dict[str, tuple[Any, Any]] = {}

    def leads(self) -> bool:
        """Tell whether this worker is the one that does what one of them has to do; another follows when it ends."""
        if self._folder is None:
            return True
        if self._lock is None:
            self._lock = os.open(self._folder / "monitoring.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return try_lock(self._lock)

    def close(self) -> None:
        """Leave it to another worker to lead."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, name: str, document: Any) -> None:
        """Show a document to all; a full disk is logged, and the next one says it again."""
        if self._folder is None:
            self._read[name] = (None, document)
            return
        with contextlib.suppress(OSError):
            write_whole(self._folder / f"{name}.json", orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))

    def read(self, name: str) -> Any:
        """Return a document; {} where there is none, or none that can be read. Not to be changed."""
        if self._folder is None:
            return self._read.get(name, (None, {}))[1]
        path = self._folder / f"{name}.json"
        now = stamp(path)
        before = self._read.get(name)
        if before is None or before[0] != now:
            found: Any = {}
            with contextlib.suppress(OSError, ValueError):
                found = orjson.loads(path.read_bytes())
            before = self._read[name] = now, found
        return before[1]

    @property
    def mine(self) -> str:
        """The name of the document that this worker alone writes."""
        return f"rows-{self._slot}"

    def everybodys(self) -> list[Any]:
        """Return that document of each worker, of those that have ended too."""
        if self._folder is None:
            return [self.read(self.mine)]
        return [self.read(path.stem) for path in sorted(self._folder.glob("rows-*.json"))]
