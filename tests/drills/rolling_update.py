"""Pods of a Deployment behind nginx under load: replaced one by one, killed for memory, lost with their node."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import httpx2 as httpx
import yaml

from serving.manifests.tree import tree
from tests.conftest import Server
from tests.drills.drill import Report, drill
from tests.drills.nginx import RETRY, nginx
from tests.drills.steady import Load, until
from tests.drills.workers import ready, workers

PODS = 3
LAG_S = 8.0
"""Seconds that nginx goes on sending requests to a pod that is being deleted: shorter than preStop and drain delay."""
SPEC = yaml.safe_load(tree()["base/deployment.yaml"])["spec"]["template"]["spec"]
CONTAINER = SPEC["containers"][0]


class Pod(Server):
    """One server with the flags of the manifest; deleted as a kubelet does it."""

    def __init__(self, *flags: str, port: int = 0) -> None:
        of_manifest = [flag for flag in CONTAINER["args"][1:] if flag != "9000"]  # each its own port for gRPC
        of_manifest.insert(of_manifest.index("--grpc-port") + 1, "0")
        super().__init__(*of_manifest, "--workers", "2", *flags, "--port", str(port), own_group=True)

    @property
    def is_ready(self) -> bool:
        """Ask as the readiness probe does."""
        try:
            return httpx.get(self.url + CONTAINER["readinessProbe"]["httpGet"]["path"], timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def delete(self, pre_stop_s: float) -> float:
        """Run preStop, send SIGTERM, and kill it after the grace period; return the seconds it took, infinity then."""
        began = time.monotonic()
        time.sleep(pre_stop_s)
        self.process.send_signal(signal.SIGTERM)
        took = until(lambda: self.process.poll() is not None, SPEC["terminationGracePeriodSeconds"] - pre_stop_s)
        self.signal(signal.SIGKILL)
        return time.monotonic() - began if took < float("inf") and self.process.returncode == 0 else took

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the pod, as the kernel does that runs out of memory (memory.oom.group)."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


@contextmanager
def pods(*flags: str, count: int = PODS) -> Iterator[list[Pod]]:
    """Start pods, and wait until each is ready."""
    with ExitStack() as ending:
        started = [Pod(*flags) for _ in range(count)]
        for pod in started:
            ending.callback(pod.signal, signal.SIGKILL)
        for pod in started:
            pod.wait(60)
        assert until(lambda: all(pod.is_ready for pod in started), 60) < 60
        yield started


@drill("rolling-update", "pods replaced one by one lose no request; neither do kills and a lost node behind a retry")
def rolling_update(report: Report, *, rounds: int = 2, connections: int = 8) -> None:
    """Replace 3 pods `rounds` times with the manifest's times and no retry; then break pods behind nginx' retry."""
    with tempfile.TemporaryDirectory() as folder:
        pre_stop_s = float(CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"])
        load, took = _replaced(Path(folder), rounds, connections, pre_stop_s)
        report.at_least("pods replaced", len(took), PODS * rounds)
        report.at_least("requests meanwhile", load.answered, 1000)
        report.exactly("failed, nothing asked twice", _failed(load), 0)
        report.at_most("longest end of a pod", max(took), SPEC["terminationGracePeriodSeconds"], "s")
        broken, _ = _replaced(Path(folder), 1, connections, 0.0, "--drain-delay-s", "0")
        report.control("without preStop and drain delay requests fail", _failed(broken) > 0)
        for what, breaks in BREAKS.items():
            load = _broken(Path(folder), breaks, connections, RETRY)
            report.exactly(f"failed: {what}", _failed(load), 0)
        broken = _broken(Path(folder), _killed, connections, "off")
        report.control("killed for memory, nothing asked twice", _failed(broken) > 0)


def _failed(load: Load) -> int:
    return sum(count for outcome, count in load.outcomes.items() if outcome != "ok")


def _replaced(folder: Path, rounds: int, connections: int, pre_stop_s: float, *flags: str) -> tuple[Load, list[float]]:
    """Replace all pods under load, one new one first; return what became of requests, and how long each end took."""
    with ExitStack() as ending:
        running = ending.enter_context(pods(*flags))
        proxy = ending.enter_context(nginx(folder, [pod.port for pod in running], "off"))
        took: list[float] = []
        with Load(proxy.port, connections=connections).running() as load:
            for _ in range(PODS * rounds):
                fresh = Pod(*flags)
                ending.callback(fresh.signal, signal.SIGKILL)
                fresh.wait(60)
                assert until(lambda fresh=fresh: fresh.is_ready, 60) < 60
                running.append(fresh)
                proxy.route(pod.port for pod in running)
                old = running.pop(0)
                deleting = threading.Thread(target=lambda old=old: took.append(old.delete(pre_stop_s)))
                deleting.start()
                time.sleep(LAG_S)
                proxy.route(pod.port for pod in running)
                deleting.join()
            answered = load.answered
            until(lambda: load.answered > answered + 100)
    return load, took


Breaks: TypeAlias = Callable[[Pod, ExitStack], object]


def _broken(folder: Path, breaks: Breaks, connections: int, retry: str) -> Load:
    """Break one of the pods under load, which nobody tells nginx; return what became of requests."""
    with ExitStack() as ending:
        running = ending.enter_context(pods())
        proxy = ending.enter_context(nginx(folder, [pod.port for pod in running], retry))
        with Load(proxy.port, connections=connections).running() as load:
            until(lambda: load.answered > 500)
            breaks(running[0], ending)
            answered = load.answered
            until(lambda: load.answered > answered + 500)
    return load


def _terminated(pod: Pod, ending: ExitStack) -> None:
    pod.process.send_signal(signal.SIGTERM)
    assert until(lambda: pod.process.poll() is not None, 60) < 60


def _killed(pod: Pod, ending: ExitStack) -> None:
    pod.signal(signal.SIGKILL)
    pod.process.wait()
    again = Pod(port=pod.port)
    ending.callback(again.signal, signal.SIGKILL)
    assert until(lambda: again.wait().is_ready, 60) < 60


def _worker_killed(pod: Pod, ending: ExitStack) -> None:
    before = workers(pod)
    os.kill(min(before), signal.SIGKILL)
    assert until(lambda: ready(pod, 1, but=before), 60) < 60


def _lost(pod: Pod, ending: ExitStack) -> None:
    pod.signal(signal.SIGSTOP)
    time.sleep(LAG_S)


BREAKS: dict[str, Breaks] = {
    "told to end, and asked all the while": _terminated,
    "killed for memory, and started again": _killed,
    "a worker killed for memory": _worker_killed,
    "lost with its node (all stand still)": _lost,
}
