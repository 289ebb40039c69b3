"""How workers ended: why, how long to wait before the next one starts, and which version is to blame."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

from serving.heartbeat import Running
from serving.repository.quarantine import select_culprit

RESPAWN_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Waits before a dead worker is replaced, growing while it keeps dying young."""
LOOP = 3
"""Deaths in a row, each of a young worker, that are called a crash loop."""


class WorkerExits:
    """What the parent remembers of the workers that are gone."""

    def __init__(self) -> None:
        self.restarts = Counter(dict.fromkeys(("crash", "exit", "hang", "killed", "memory"), 0))
        """Replaced workers by reason."""
        self._young: Counter[int] = Counter()
        self._blamed: Counter[tuple[str, str]] = Counter()
        self._oom_kills = (_oom_kills(),) * 2  # a second ago or more, and when it was last noted

    def note_oom_kills(self) -> None:
        """Note how often memory ran out by now; once a second."""
        self._oom_kills = (self._oom_kills[1], _oom_kills())

    def cause(self, code: int | None) -> tuple[str, str]:
        """Say in words, and as the metric's label, how a worker with this exit code ended."""
        if code is None or code >= 0:
            return f"ended with status {code}", "exit"
        name = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            if _oom_kills() > self._oom_kills[0]:
                return "was killed because memory ran out", "memory"
            return f"was ended by {name}", "killed"
        return f"was ended by {name}", "killed" if -code in (signal.SIGTERM, signal.SIGINT) else "crash"

    def wait(self, slot: int, *, early: bool) -> float:
        """Count a death, early where the worker was young; return seconds to wait before its replacement starts."""
        self._young[slot] = self._young[slot] + 1 if early else 1
        return RESPAWN_S[min(self._young[slot], len(RESPAWN_S)) - 1]

    def in_a_row(self, slot: int) -> int:
        """Return how many workers of this slot died young, one after the other; 0 where it is no crash loop."""
        return self._young[slot] if self._young[slot] >= LOOP else 0

    def blame(self, ran: list[Running], reason: str) -> tuple[str, str] | None:
        """Count a restart, and the death against the versions that ran; return the one that has now ended two."""
        self.restarts[reason] += 1
        versions = sorted({(running.name, running.version) for running in ran})
        self._blamed.update(versions)
        culprit = select_culprit(self._blamed, versions)
        if culprit is not None:
            del self._blamed[culprit]
        return culprit


def _oom_kills() -> int:
    """Return how often memory ran out on this machine and a process was killed for it; 0 where that can't be known."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
