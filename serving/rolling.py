"""A rolling replacement of all workers: one new one at a time, ready before an old one drains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.settings import Settings
from serving.worker_process import Worker


@dataclass(slots=True)
class Roll:
    """One replacement in progress. old: who is still to be replaced. before: the settings that they have.

    fresh: the new worker that is awaited. leaving: the old one that drains.
    """

    old: list[Worker]
    before: Settings
    fresh: Worker | None = None
    leaving: Worker | None = None

    def step(
        self,
        workers: Sequence[Worker],
        *,
        crowded: bool,
        spawn: Callable[[], Worker | None],
        retire: Callable[[Worker], None],
    ) -> bool:
        """Take the next step if the last one is done; return whether every worker is new.

        crowded: there are more than there shall be, so that one goes before another comes.
        """
        if self.leaving is not None and self.leaving in workers:
            return False
        self.old = [worker for worker in self.old if worker in workers and worker.kill_at is None]
        if self.fresh is not None and not self.fresh.is_ready:
            return False
        if self.old and (self.fresh is not None or crowded):
            self.leaving, self.fresh = self.old.pop(0), None
            retire(self.leaving)
        elif self.old:
            self.fresh = spawn()
        else:
            return True
        return False
