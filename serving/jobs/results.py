"""Where jobs keep what is theirs: inputs that were sent, parts, results. A folder, or a bucket of an object store.

    <job>/input   <job>/parts/head   <job>/parts/<piece>.<token>.rows and .errors   <job>/result.csv   and errors.ndjson

What is written is beside its name until it is whole, in folders as in buckets.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import obstore
from obstore.store import LocalStore, ObjectStore

from serving.jobs.inputs import SCHEMES, Input, StoredInput, translated
from serving.linux.files import sync
from serving.repository.object_store import open_store

_CHUNK = 1 << 20
_PARTS = 2
"""Of one file that are on their way at a time, of 5 MB each."""
_ORPHANED_S = 24 * 3600.0


class Results:
    """Files of jobs, in the folder or below the URL `where`, which is opened when it is first needed."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._folder = None if where.partition("://")[0] in SCHEMES else Path(where).absolute()
        self._opened: ObjectStore | None = None

    @property
    def _store(self) -> ObjectStore:
        if self._opened is None:
            if self._folder is None:
                self._opened = open_store(self._where)
            else:
                self._folder.mkdir(0o700, parents=True, exist_ok=True)  # inputs and results are their owners' alone
                self._opened = LocalStore(self._folder)
        return self._opened

    async def put(self, path: str, content: bytes | AsyncIterator[bytes]) -> None:
        """Write a file, whole or not at all. Raises NotReady, and what `content` raises."""
        with translated("a file of the job"):
            await obstore.put_async(self._store, path, content, max_concurrency=_PARTS)
            if self._folder is not None:
                await asyncio.to_thread(_to_disk, self._folder / path)

    async def size(self, path: str) -> int:
        """Return the size of a file in bytes. Raises InvalidRequest where there is none, NotReady."""
        with translated("a file of the job"):
            return (await obstore.head_async(self._store, path))["size"]

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """Read a file, a part at a time. Raises InvalidRequest where there is none, NotReady."""
        with translated("a file of the job"):
            found = await obstore.get_async(self._store, path)
            async for chunk in found.stream(min_chunk_size=_CHUNK):
                yield bytes(chunk)

    def open(self, path: str) -> Input:
        """Open a file to be read by ranges; for threads. Raises InvalidRequest where there is none, NotReady."""
        with translated("a file of the job"):
            store = self._store
        return StoredInput(store, path)

    async def remove(self, path: str) -> None:
        """Remove a file, or all below a path. Raises NotReady."""
        with translated("a file of the job"):
            if self._folder is not None:  # with what writers that were killed have left
                await asyncio.to_thread(_remove, self._folder / path)
                return
            async for found in obstore.list(self._store, path):
                await obstore.delete_async(self._store, [each["path"] for each in found])
            await obstore.delete_async(self._store, path)

    async def old(self) -> set[str]:
        """Return the jobs of which there are files, and none of the last day. Raises NotReady."""
        newest: dict[str, float] = {}
        with translated("a file of the job"):
            async for found in obstore.list(self._store):
                for each in found:
                    job = each["path"].partition("/")[0]
                    newest[job] = max(newest.get(job, 0.0), each["last_modified"].timestamp())
        return {job for job, at in newest.items() if time.time() - at > _ORPHANED_S}


def _to_disk(path: Path) -> None:
    """Have a file on disk for sure: what the database says is done must survive a loss of power with it."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
    sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
