"""One worker process as its parent sees it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from serving.deploy.channel import Channel
from serving.heartbeat import Heartbeat, Phase, Running
from serving.metrics.counts import Counts
from serving.settings import Settings

log = logging.getLogger("serving.server")


@dataclass(eq=False, slots=True)
class Worker:
    """One worker process and what the parent knows of it. Times are monotonic seconds."""

    slot: int
    process: BaseProcess
    heartbeat: Heartbeat
    link: Channel
    counts: Counts
    settings: Settings
    """What it was started with."""
    ready_at: float | None = None
    kill_at: float | None = None
    """When it gets SIGKILL; set once it was told to end."""
    killed: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it is ready, and not yet that it is ending."""
        return self.heartbeat.phase is Phase.READY

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

    def close(self) -> None:
        """Free what belonged to it, once it has ended."""
        self.process.close()
        self.heartbeat.close()
        self.counts.close()

    def hangs(self, now: float, *, awake_since: float) -> tuple[str, list[Running]]:
        """Say why it has to be replaced, and what it was running; '' where it does not.

        awake_since: since when this process has run itself: before, nobody's silence says anything.
        """
        hang_s = self.settings.hang_s
        silent = now - max(self.heartbeat.last_sign, awake_since)
        deaf = min(self.link.behind(now), now - awake_since)
        ran = [run for run in self.heartbeat.running() if now - max(run.since, awake_since) > hang_s]
        if silent > hang_s:
            return f"gave no sign of life for {silent:.0f} s", ran
        stuck = [run for run in ran if not run.loading and now - run.since > hang_s + self.settings.deadline_s]
        if deaf > hang_s:
            return f"is deaf: it has acknowledged nothing that it was told for {deaf:.0f} s", stuck
        return (f"is stuck in {listed(stuck)}" if stuck else ""), stuck


def listed(ran: list[Running]) -> str:
    """Name the versions that were running."""
    return " and ".join(sorted({f"{running.name} {running.version}" for running in ran}))
