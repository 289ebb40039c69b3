"""Canaries that are judged while servers are killed and started again, and workers die."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from serving.repository import servers, transitions
from serving.repository.traffic import Judge
from serving.repository.traffic_store import TrafficStore
from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.steady import Load, until
from tests.drills.workers import BAD, copied, post

AGAIN = "begin again with version 2"
FAULTS: dict[str, object] = {"kill": 13.0, "off": ["quarantine"]}
"""A row that ends its worker in version 2, and nobody but the judge who takes the version away for it."""


def begin(models: Path, after_s: float) -> None:
    """Give version 2 half of the requests, and have it judged."""
    step = transitions.canary("2", 50, available=("1", "2"), judge=Judge(after_s=after_s))
    TrafficStore(models).change("iris", transitions.promote("1", available=("1", "2")), who="drill", what="promote")
    TrafficStore(models).change("iris", step, who="drill", what="canary")


def noted(models: Path) -> list[tuple[str, str]]:
    """Return what the judge wrote into the history: what and why."""
    return [(entry["what"], entry["why"]) for entry in TrafficStore(models).history("iris") if entry["who"] == "judge"]


def judged(models: Path, least: int = 1) -> bool:
    """Tell whether the judge has seen so many predictions of the version that it tries."""
    told = [
        line for server in servers.ServerMonitor(models).servers() for line in server.models["iris"].get("trial", ())
    ]
    found = re.search(r"of version 2: .*?(\d+) predictions in", " ".join(told).replace(",", ""))
    return found is not None and int(found[1]) >= least


def asking(server: Server, condition: Callable[[], bool]) -> bool:
    """Ask until something comes true."""
    with Load(server.port, connections=2).running():
        return until(condition, 60) < 60


def kill(server: Server) -> None:
    """End a whole server as a lack of memory does; its workers end by themselves."""
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()


def _a_bad_day(report: Report, models: Path) -> None:
    """Kill a canary's server, and then a worker: the second death is the end of it."""
    with faulty(FAULTS, models=models) as server:
        begin(models, 3600)
        report.exactly("it is judged", asking(server, lambda: judged(models)), 1)
        kill(server)
    with faulty(FAULTS, models=models) as server:
        report.exactly("a server's death begins it again", until(lambda: len(noted(models)) == 1) < 30, 1)
        done = until(lambda: bool(post(server, BAD) + 1) and len(noted(models)) >= 2) < 30
        report.exactly("a worker's takes it back", done, 1)
    whats = [what for what, _ in noted(models)]
    report.exactly(f"the history says so, and no more: {whats}", whats == [AGAIN, "end the canary of 2"], 1)


def _killed(models: Path, after_s: float, faults: dict[str, object]) -> tuple[list[str], float]:
    """Kill a server halfway, and stay away for longer than the rest; return what the judge did, and seconds since."""
    with faulty(faults, models=models) as server:
        begin(models, after_s)
        asking(server, lambda: judged(models))
        time.sleep(after_s / 2)
        kill(server)
    time.sleep(after_s)
    with faulty(faults, models=models) as server:
        began = time.monotonic()
        asking(server, lambda: "promote 2" in dict(noted(models)))
        return [what for what, _ in noted(models)], time.monotonic() - began


def _restarted(models: Path, after_s: float) -> tuple[list[str], float]:
    """End a server as it should be, and start it again; return what the judge did, and seconds since."""
    with faulty({}, models=models) as server:
        begin(models, after_s)
        asking(server, lambda: judged(models, 1000))
    with faulty({}, models=models) as server:
        began = time.monotonic()
        asking(server, lambda: "promote 2" in dict(noted(models)))
        return [what for what, _ in noted(models)], time.monotonic() - began


@drill("canaries", "a canary is judged by what it did: kills and restarts begin it again, or end it")
def canaries(report: Report, *, after_s: float = 12, long: bool = True) -> None:
    """The control does not hear that a server died."""
    with tempfile.TemporaryDirectory(prefix="canaries-") as temporary:
        _a_bad_day(report, copied(Path(temporary) / "bad"))
        if not long:
            return
        whats, took = _killed(copied(Path(temporary) / "killed"), after_s, {})
        report.exactly("killed: begun again, then promoted", whats == [AGAIN, "promote 2"], 1)
        report.at_least("seconds that it was watched since", took, after_s, "s")
        whats, took = _killed(copied(Path(temporary) / "control"), after_s, {"off": ["unclean"]})
        report.control("a death that nobody sees does not begin it again", AGAIN not in whats)
        whats, took = _restarted(copied(Path(temporary) / "restarted"), after_s)
        report.exactly("restarted: held against nothing, and promoted", whats == ["promote 2"], 1)
        report.at_least("seconds that it was watched since", took, after_s, "s")
