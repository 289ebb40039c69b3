"""The right to write one answer to a connection's socket, lent by the event loop to the thread that made the answer.

For a lonely request the way back through the event loop costs more than a small model: the loop has to be woken, and
wakes while the thread still holds the interpreter. So the thread writes, where nothing else waits to be written.
"""

from __future__ import annotations

import os
import threading

from serving.tensors import Tensors


class SocketLoan:
    """Made on the event loop, which writes nothing to the connection until it has called `recover`.

    descriptor: of a non-blocking socket, which the loop does not close before `recover` has returned: the number could
    be another client's by then.
    """

    __slots__ = ("_descriptor", "_lock", "_rest", "_returned", "outputs")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._returned = False
        self._rest: bytes | None = None
        self.outputs: Tensors = ()
        """What the answer was made of, once it is written."""

    def write(self, answer: bytes, outputs: Tensors) -> None:
        """Write an answer, unless the loop has taken its right back; for the thread, once."""
        with self._lock:
            if self._returned:
                return
            try:
                sent = os.write(self._descriptor, answer)
            except BlockingIOError:
                sent = 0
            except OSError:  # the client has gone, which the loop is told too
                sent = len(answer)
            self.outputs = outputs
            self._rest = answer[sent:]

    def is_written(self) -> bool:
        """Tell whether the thread has written. Waits where it just does, which takes microseconds."""
        with self._lock:
            return self._rest is not None

    def recover(self) -> bytes | None:
        """Take the right back; return what is left to write of the thread's answer, or None where it wrote nothing."""
        with self._lock:
            self._returned = True
            return self._rest
