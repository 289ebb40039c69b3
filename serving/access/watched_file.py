"""A small file that is read anew when it changes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from serving.access.principal import AccessInvalid
from serving.linux.files import Stamp, stamp, stamp_of

_MOST_BYTES = 1024 * 1024


class WatchedFile:
    """`what` names the file in errors, which are for whoever runs the server."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._stamp: Stamp | None = None

    def changed(self) -> bool:
        """Tell whether the file is another one than was read last: by inode, size and times."""
        return stamp(self.path) != self._stamp

    def read(self) -> tuple[str, int]:
        """Return text and mode. Raises AccessInvalid where it can't be read; it then counts as seen all the same."""
        try:
            # Not blocking: a pipe in the file's place would otherwise hold the reader for ever.
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                facts = os.fstat(handle)
                self._stamp = stamp_of(facts)
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_BYTES:
                    raise AccessInvalid(f"{self.what} {self.path} is not a small plain file")
                return file.read(_MOST_BYTES).decode(), facts.st_mode
        except OSError as error:
            self._stamp = stamp(self.path)
            raise AccessInvalid(f"{self.what} {self.path} can't be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise AccessInvalid(f"{self.what} {self.path} is not text") from None
