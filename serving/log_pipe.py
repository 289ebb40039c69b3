"""A stream for logs that never makes its writer wait: when nobody reads the pipe, lines are dropped and counted.

A full pipe would otherwise stop the event loop at its next log line, and with it every request.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable

MOST_LINES = 4096
"""Lines that may wait for the reader; beyond it they are dropped."""
LAST_S = 0.5
"""Seconds that the last lines get when the process ends."""


class LogPipe:
    """What `logging.StreamHandler` and `rich.Console` write to; a thread of its own does the writing.

    descriptor: where to, such as 2 for standard error. It is shared with other processes, so it stays blocking.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(MOST_LINES)
        self.dropped = 0
        self.notice: Callable[[str], str] = "{}\n".format
        """Makes a line of this stream's own of a text: as the other lines of the log are."""
        self._told = 0
        threading.Thread(target=self._work, name="log", daemon=True).start()
        atexit.register(self.finish)

    def write(self, text: str) -> int:
        """Take a text, or drop and count it where too many wait."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self.dropped += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: waiting for the reader is what this stream never does."""

    def isatty(self) -> bool:
        """Tell whether a person reads it."""
        try:
            return os.isatty(self._descriptor)
        except OSError:
            return False

    def fileno(self) -> int:
        """Return the descriptor, for those who ask how wide the terminal is."""
        return self._descriptor

    def finish(self) -> None:
        """Give the last lines a moment to get out; to be called before the process ends."""
        until = time.monotonic() + LAST_S
        while self._lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.005)

    def _work(self) -> None:
        while True:
            text = self._lines.get()
            if self.dropped != self._told and self._lines.qsize() < MOST_LINES // 2:
                told, self._told = self._told, self.dropped
                text += self.notice(f"{self._told - told} lines of the log were dropped: nobody read them")
            self._put(text.encode(errors="backslashreplace"))
            self._lines.task_done()

    def _put(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            self.dropped += 1  # the reader has gone for good, or the disk behind it is full
