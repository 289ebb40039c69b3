"""One worker process as its parent sees it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from serving.deploy.channel import Link
from serving.heartbeat import Heartbeat
from serving.metrics.counts import Counts

log = logging.getLogger("serving.server")


@dataclass(eq=False, slots=True)
class Worker:
    """One worker process and what the parent knows of it. Times are monotonic seconds."""

    slot: int
    process: BaseProcess
    box: Heartbeat
    link: Link
    counts: Counts
    born: float
    ready_at: float | None = None
    kill_at: float | None = None
    """When it gets SIGKILL; set once it was told to end."""
    killed: bool = False

    def order(self, number: signal.Signals) -> None:
        """Send it an order; it may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, number)

    def kill(self) -> None:
        """End it by force, and say so once."""
        if not self.killed:
            self.killed = True
            log.error("worker %d did not end in time", self.slot)
            self.process.kill()
