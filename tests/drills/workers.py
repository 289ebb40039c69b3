"""Workers that are killed, that hang, that die at once, and models that kill them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import httpx2 as httpx

from tests.conftest import Server, faulty
from tests.drills.drill import Report, drill
from tests.drills.steady import PATH, ROW, Load, until

READY_S = 3.0
BAD = json.dumps({"instances": [[13.0, 3.5, 1.4, 0.2]]}).encode()


def workers(server: Server) -> set[int]:
    """Return the pids of the workers that are alive, ready or not."""
    pids: set[int] = set()
    for task in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
        pids |= {int(child) for child in task.read_text().split()}
    return {pid for pid in pids if _is_worker(pid)}


def _is_worker(pid: int) -> bool:
    """Tell workers from the gate's process and multiprocessing's own."""
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ready(server: Server, count: int = 1, *, but: set[int] | frozenset[int] = frozenset()) -> bool:
    """Tell whether so many workers that are alive, and not among `but`, have said that they loaded their models."""
    said = {int(pid) for pid in re.findall(r'"process": (\d+), "message": "\d+ models', server.output())}
    return len((said & workers(server)) - but) >= count


def counted(server: Server) -> float:
    """Return how many predictions the server says that it answered."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(n) for n in re.findall(r'^serving_predictions_total\{.*outcome="ok".*\} (\S+)$', text, re.M))


def post(server: Server, body: bytes) -> int:
    """Return the status of one prediction; 0 where the connection broke."""
    try:
        return httpx.post(f"{server.url}{PATH}", content=body, timeout=30).status_code
    except httpx.TransportError:
        return 0


@drill("killed-workers", "a worker killed under load costs its requests in flight, and with one retry nothing")
def killed_workers(report: Report, *, times: int = 50, connections: int = 8, ready_s: float = READY_S) -> None:
    """Kill one of two workers `times` times; the control never replaces them."""
    without, again = 0, 0
    for retry in (False, True):
        rounds = times // 2
        with faulty({}, "--workers", "2") as server:
            until(lambda: ready(server, 2), 60)
            load = Load(server.port, connections=connections, retry=retry)
            waits, back, before = [], 0, 0.0
            with load.running():
                for _ in range(rounds):
                    killed = random.choice(sorted(workers(server)))
                    os.kill(killed, signal.SIGKILL)  # who looks at once still sees it
                    waits.append(until(lambda killed=killed: ready(server, 2, but={killed}), 30))
                    now = counted(server)
                    back += now < before
                    before = now
                    answered = load.answered
                    until(lambda load=load, answered=answered: load.answered > answered + connections)
            lost = load.outcomes["lost"]
            if retry:
                again = load.outcomes["lost twice"]
            else:
                without = lost
            report.exactly("counters that went back", back, 0)
            report.at_most("replacement ready, worst", max(waits), ready_s, "s")
            report.exactly("other failures", load.outcomes["refused"] + _statuses(load), 0)
    report.at_most("requests lost without a retry, each kill", without / rounds, connections)
    report.exactly("requests lost with one retry", again, 0)
    with faulty({"off": ["respawn"]}, "--workers", "2") as server:
        until(lambda: ready(server, 2), 60)
        os.kill(min(workers(server)), signal.SIGKILL)
        report.control("without replacement no second worker comes", until(lambda: ready(server, 2), 4) > 4)


def _statuses(load: Load) -> int:
    return sum(n for outcome, n in load.outcomes.items() if outcome.startswith("status"))


@drill("hanging-workers", "a worker that hangs, or that a model holds for ever, is found and replaced")
def hanging_workers(report: Report, *, hang_s: int = 3) -> None:
    """Hang one of two workers, once all of it and once the model's thread; the control does not look."""
    for fault, most in (("hang", hang_s + 8), ("stuck", 2 * hang_s + 8)):
        with faulty({fault: 13.0}, "--workers", "2", "--hang-s", str(hang_s), "--deadline-s", str(hang_s)) as server:
            until(lambda: ready(server, 2), 60)
            old = workers(server)
            status = _abandon(server)
            took = until(lambda old=old: len(workers(server) & old) == 1 and ready(server, 2), 60)
            report.at_most(f"{fault}: seconds until another worker is ready", took, most, "s")
            report.exactly(f"{fault}: predictions answered afterwards, of 20", _right(server, 20), 20)
            report.exactly(f"{fault}: log says so", float("it is replaced" in server.output()), 1)
            assert status == 0, "the request that hangs is not answered"
    with faulty({"hang": 13.0, "off": ["hang"]}, "--workers", "2", "--hang-s", "1", "--drain-s", "1") as server:
        until(lambda: ready(server, 2), 60)
        old = workers(server)
        _abandon(server)
        report.control("without looking it is never replaced", until(lambda: workers(server) != old, 6) > 6)


def _abandon(server: Server) -> int:
    """Ask what hangs, and do not wait for long."""
    try:
        return httpx.post(f"{server.url}{PATH}", content=BAD, timeout=0.5).status_code
    except httpx.TransportError:
        return 0


def _right(server: Server, times: int) -> int:
    return sum(post(server, ROW) == 200 for _ in range(times))


@drill("killing-model", "a version that ends two workers is quarantined, and the one before it serves")
def killing_model(report: Report, *, patience_s: float = 60, control: bool = True) -> None:
    """Send the query that kills until it kills no more, to one that was promoted and to one that is the highest.

    The control keeps the version.
    """
    from tempfile import TemporaryDirectory

    for promoted, off in ((True, ()), (False, ()), (False, ("quarantine",)))[: 3 if control else 1]:
        with TemporaryDirectory() as folder:
            root = copied(Path(folder))
            if promoted:
                (root / "iris" / "traffic.json").write_text('{"generation": 1, "stable": "2"}')
            with faulty({"kill": 13.0, "off": off}, "--workers", "2", models=root) as server:
                until(lambda: ready(server, 2), 60)
                deaths = 0
                for _ in range(3):
                    before = workers(server)
                    if post(server, BAD) == 0:
                        deaths += 1
                        until(lambda before=before: len(workers(server) & before) == 1, 10)
                        until(lambda: ready(server, 2), patience_s)
                        if deaths == 2 and not off:
                            # On every worker: connections are new each time, and the kernel deals them out.
                            until(lambda: {default_version(server) for _ in range(8)} == {"1"}, 20)
                if off:
                    report.control("without quarantine it kills on and on", deaths == 3)
                    return
                report.exactly("workers that died", deaths, 2)
                health = httpx.get(f"{server.url}/v2/health/ready", timeout=30)
                metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
                report.exactly("ready", health.status_code, 200)
                report.exactly("not_served names it", float("iris 2" in health.json()["not_served"]), 1)
                told = 'serving_model_quarantined{model="iris",version="2"} 1.0' in metrics
                report.exactly("a metric tells", float(told), 1)
                report.exactly("the version before answers, of 20", _right(server, 20), 20)
            with faulty({}, models=root) as server:
                report.exactly("a restart remembers", float(default_version(server) == "1"), 1)


def copied(folder: Path) -> Path:
    """Make a models folder with the two versions of iris."""
    import shutil

    from tests.conftest import MODELS

    shutil.copytree(MODELS / "iris", folder / "iris")
    return folder


def default_version(server: Server) -> str:
    """Return the version that answers for iris."""
    answer = httpx.post(f"{server.url}{PATH}", content=ROW, timeout=30)
    return str(answer.json().get("model_version"))


@drill("crash-loop", "workers that die at once are replaced ever more slowly, and the log says so")
def crash_loop(report: Report, *, seconds: float = 20) -> None:
    """Watch a server whose workers die before they are ready."""
    server = Server(module="tests.drills.faulty", environment={"FAULTS": json.dumps({"crash_at_start": True})})
    try:
        until(lambda: "crash loop" in server.output(), 60)
        time.sleep(seconds)
        waits = [float(wait) for wait in re.findall(r"its replacement starts in (\S+) s", server.output())]
        report.exactly("waits grow", float(waits == sorted(waits) and waits[-1] > waits[0]), 1)
        report.exactly("the log calls it a crash loop", float("is in a crash loop" in server.output()), 1)
        report.at_most("starts", len(waits), 4 + seconds)
    finally:
        code = server.stop()
    report.exactly("exit status after SIGTERM", code, 0)
