"""The keys file as `serving keys` changes it: one writer at a time, and every reader sees the old file or the new."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from serving.access.keys import NAME, Key, digest, generate, parse
from serving.access.principal import AccessInvalid, Scope
from serving.access.rate_limits import UNLIMITED, Rates
from serving.access.watched_file import WatchedFile


class KeyStore:
    """The keys in one file. All of it raises AccessInvalid with a text for whoever runs the command."""

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.realpath(path))  # a link stays a link

    def read(self) -> tuple[Key, ...]:
        """Return the keys of the file."""
        if not self._path.exists():
            raise AccessInvalid(f"there is no keys file {self._path}: name it with --keys")
        return parse(self._text())

    def create(
        self, name: str, scopes: frozenset[Scope], *, expires: float | None = None, rates: Rates = UNLIMITED
    ) -> str:
        """Add a key and return it: this is the only time that it is seen. `expires` in seconds since the epoch."""
        if not NAME.fullmatch(name):
            raise AccessInvalid("a key's name is letters, digits, dot, dash, underscore; 64 at most")
        secret = generate()
        now = time.time()
        with self._changing() as (keys, lines):
            if name in keys:
                state = keys[name].state(now)
                raise AccessInvalid(f"there is a {state} key {name!r}: take another name, such as {name}-2")
            key = Key(name, scopes, digest(secret.encode()), created=now, expires=expires, rates=rates)
            lines.append(key.line())
        return secret

    def revoke(self, name: str) -> None:
        """Withdraw a key. Its line stays: a scope that only it had must not become open to all."""
        with self._changing() as (keys, lines):
            if name not in keys:
                raise AccessInvalid(f"there is no key {name!r}; keys: {', '.join(keys) or 'none'}")
            if keys[name].revoked is not None:
                raise AccessInvalid(f"the key {name!r} is revoked already")
            at = next(at for at, line in enumerate(lines) if line.split()[:1] == [name])
            lines[at] = replace(keys[name], revoked=time.time()).line()

    def _text(self) -> str:
        return WatchedFile(self._path, "the keys file").read()[0] if self._path.exists() else ""

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[dict[str, Key], list[str]]]:
        """Give the keys by name, and the lines of the file, to be changed: they are written then, if nothing fails."""
        try:
            with self._alone():
                text = self._text()
                lines = text.removesuffix("\n").split("\n") if text else []
                yield {key.name: key for key in parse(text)}, lines
                text = "".join(f"{line}\n" for line in lines)
                parse(text)  # a running server would refuse a broken file, and take no other change of keys
                self._write(text)
        except OSError as error:
            raise AccessInvalid(f"the keys file {self._path} can't be written: {error.strerror}") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold a lock on the folder: the file itself is another one after each change."""
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write(self, text: str) -> None:
        handle, made = tempfile.mkstemp(prefix=".keys-", dir=self._path.parent)  # mode 0600
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(handle)
                if self._path.exists():
                    # Root may run the command for a server that runs as another user.
                    owner = self._path.stat()
                    if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(handle, owner.st_uid, owner.st_gid)
            os.replace(made, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(made)
            raise
