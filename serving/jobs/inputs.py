"""What a job reads: a file under a folder, or an object of a store, that the server's owner allowed.

All of it blocks, and is for threads. Only ranges are read, so that each worker reads its pieces, and as long as it is
the same input: what is replaced while a job runs ends the job.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import ObjectStore

from serving.errors import Conflict, Forbidden, InvalidRequest, NotReady
from serving.repository.object_store import open_store

SCHEMES = ("s3", "gs", "az")
_BUFFER = 1 << 20
_FULL = ("no space left", "quota exceeded", "read-only file system", "file too large")
CHANGED = "the input has changed since the job was asked for: ask for a new one"


class Input(Protocol):
    """Bytes that are read by ranges. identity: tells them from what may replace them."""

    size: int
    identity: str

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`. Raises Conflict where they have changed, NotReady."""

    def close(self) -> None:
        """Read no more."""


class LocalInput:
    """A plain file below `folder`, whatever links lead to it. Raises Forbidden, InvalidRequest."""

    def __init__(self, path: str, folders: Sequence[str]) -> None:
        try:
            # Not blocking: a pipe would hold the reader for ever.
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            self._file = -1
        try:
            # Of what was opened, so that nobody can put a link in its place meanwhile.
            real = os.path.realpath(path if self._file < 0 else f"/proc/self/fd/{self._file}")
            if not any(_below(real, os.path.realpath(folder)) for folder in folders):
                raise Forbidden(_REFUSED)
            if self._file < 0:
                raise InvalidRequest("url: there is no such file, or the server may not read it")
            facts = os.fstat(self._file)
            if not stat.S_ISREG(facts.st_mode):
                raise InvalidRequest("url: is no plain file")
        except BaseException:
            self.close()
            raise
        self.size = facts.st_size
        self.identity = f"{facts.st_ino}-{facts.st_size}-{facts.st_mtime_ns}"

    def read(self, start: int, end: int) -> bytes:  # noqa: D102
        try:
            read = os.pread(self._file, end - start, start)
            while len(read) < end - start and (
                more := os.pread(self._file, end - start - len(read), start + len(read))
            ):
                read += more
        except OSError as error:
            raise NotReady(f"the input can't be read: {(error.strerror or 'an error').lower()}") from error
        return read

    def close(self) -> None:  # noqa: D102
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class StoredInput:
    """An object of a store. Raises InvalidRequest where there is none, Forbidden, NotReady."""

    def __init__(self, store: ObjectStore, path: str) -> None:
        self._store = store
        self._path = path
        with translated():
            meta = obstore.head(store, path)
        self.size = meta["size"]
        self._etag = meta["e_tag"]
        self.identity = meta["e_tag"] or f"{meta['size']}-{meta['last_modified']}"

    def read(self, start: int, end: int) -> bytes:  # noqa: D102
        if start >= end:
            return b""
        with translated():
            found = obstore.get(self._store, self._path, options={"range": (start, end), "if_match": self._etag})
            return bytes(found.bytes())

    def close(self) -> None:  # noqa: D102
        pass


class Locations:
    """The folders, and the URLs of stores, under which inputs may be read; `allowed` are none by default."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._folders = [_local(each) for each in allowed if not _is_url(each)]
        self._urls = [each.rstrip("/") for each in allowed if _is_url(each)]

    def open(self, url: str) -> Input:
        """Open what a URL or a path names. Raises InvalidRequest, Forbidden, NotReady."""
        if any(ord(c) < 32 for c in url):
            raise InvalidRequest("url: has a control character")
        if not _is_url(url):
            path = _local(url)
            if not os.path.isabs(path):
                raise InvalidRequest("url: is no whole path: begin it with /, or with s3://, gs://, az:// or file://")
            return LocalInput(path, self._folders)
        scheme, _, rest = url.partition("://")
        if scheme not in SCHEMES:
            raise InvalidRequest("url: should begin with s3://, gs://, az:// or file://, or be a whole path")
        bucket, _, key = rest.partition("/")
        if not bucket or not key or any(part in ("", ".", "..") for part in key.split("/")) or "@" in bucket:
            raise InvalidRequest(f"url: should be {scheme}://bucket/path, without empty parts, . and ..")
        if not any(url.startswith(f"{prefix}/") for prefix in self._urls):
            raise Forbidden(_REFUSED)
        return StoredInput(_store(f"{scheme}://{bucket}"), key)


_REFUSED = (
    "url: is not below a folder or a URL that this server may read; who runs it can allow some: see --jobs-inputs"
)


def _is_url(given: str) -> bool:
    return "://" in given and not given.startswith("file://")


def _local(given: str) -> str:
    return given.removeprefix("file://")


def _below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


@lru_cache(16)
def _store(url: str) -> ObjectStore:
    return open_store(url)


@contextmanager
def translated(what: str = "the input") -> Iterator[None]:
    """Say what a store says in this server's errors, and without what it says of itself."""
    try:
        yield
    except FileNotFoundError:
        raise InvalidRequest(f"{what} is not there, or has gone") from None
    except PreconditionError:
        raise Conflict(CHANGED) from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise Forbidden(f"{what}: the credentials of this server may not do this in the store") from error
    except (BaseError, OSError) as error:
        said = str(error).lower()
        reason = next((text for text in _FULL if text in said), "")
        raise NotReady(f"{what}: {reason or 'the store does not answer as it should'}") from error


class InputFile(io.RawIOBase):
    """An input as a file, for libraries that want one; `end`: before which it seems to end."""

    def __init__(self, source: Input, end: int | None = None) -> None:
        self._source = source
        self._end = source.size if end is None else end
        self._at = 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:  # noqa: D102
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        return self._at

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]  # noqa: D102
        read = self._source.read(self._at, min(self._at + len(buffer), self._end))
        buffer[: len(read)] = read
        self._at += len(read)
        return len(read)
