"""Two machines serve a repository in an object store that fails at random, while deployers on both change it."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from serving.deploy.mirror import located
from serving.deploy.publish import publish
from serving.deploy.staging import embed_entry
from serving.errors import ServingError
from serving.gate.findings import Limits
from serving.gate.gate import Gate
from serving.repository import transitions
from serving.repository.traffic_store import TrafficStore
from tests.drills.drill import Report, drill
from tests.drills.steady import Load
from tests.faulty_store import FAULTS, FaultyStore, faulty_store

URL = "s3://bucket/m"


@drill(
    "object_store",
    "a store that is slow, wrong or away costs no prediction and no change; no half version is taken",
)
def object_store(report: Report, *, seconds: float = 60) -> None:
    """Fail a third of the requests in every way there is, and all of them for a while; then see what is left."""
    from tests.conftest import MODELS, Server

    with faulty_store() as store, tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        ending.enter_context(patch.dict("os.environ", store.environment))
        store.put("m/iris/1", MODELS / "iris" / "1")
        states = [Path(folder) / name for name in ("a", "b")]
        hosts = [Server("--state-dir", str(state), models=Path(URL), environment=store.environment) for state in states]
        for host in hosts:
            ending.callback(host.stop)
        for host in hosts:
            host.wait(120)
        seen = _Seen(states)
        ending.callback(seen.stop)
        loads = [Load(host.port, connections=1) for host in hosts]
        until, confirmed = time.monotonic() + seconds, []
        store.fault = _Faults(until - seconds, seconds)
        with ThreadPoolExecutor(4) as pool, loads[0].running(), loads[1].running():
            running = [pool.submit(_deploy, state, i, until, MODELS) for i, state in enumerate((*states, *states))]
            confirmed = [label for one in running for label in one.result()]
            store.fault = lambda method, path: ""
        outcomes = loads[0].outcomes + loads[1].outcomes
        report.at_least("predictions answered", outcomes["ok"], seconds * 10)
        report.exactly("predictions that failed", outcomes.total() - outcomes["ok"], 0)
        report.at_least("requests that the store failed", store.failed, seconds)
        history = _history(store)
        labels = [entry["what"] for entry in history if entry["what"] in set(confirmed)]
        report.at_least("changes that deployers were told are made", len(confirmed), seconds / 10)
        report.exactly("of them in the history", len(set(labels)), len(confirmed))
        broken = sum(one["after"] != two["before"] for one, two in itertools.pairwise(history))
        report.exactly("lines whose `before` is not the `after` above", broken, 0)
        wanted = history[-1]["generation"]
        behind = sum(not _serves(host.url, wanted) for host in hosts)
        report.exactly("machines that do not come to the last state", behind, 0)
        report.exactly("versions in a mirror that were not whole at some time", len(seen.stop()), 0)
        report.at_least("versions that were looked at", seen.looked, 1)
        report.control("deployers that write without a condition lose changes", _unconditional(store))


class _Faults:
    """One request of three fails somehow; in the middle fifth of the time the store is away."""

    def __init__(self, began: float, seconds: float) -> None:
        self._chance = random.Random(3)
        self._away = began + 0.4 * seconds, began + 0.6 * seconds

    def __call__(self, method: str, path: str) -> str:
        if self._away[0] < time.monotonic() < self._away[1]:
            return "away"
        return self._chance.choice([*FAULTS, *[""] * 2 * len(FAULTS)])


class _Seen(threading.Thread):
    """Looks at the versions in the mirrors all the time, as a worker would, by nothing but their manifests."""

    def __init__(self, states: list[Path]) -> None:
        super().__init__(daemon=True)
        self._states, self._ended = states, threading.Event()
        self._broken: set[str] = set()
        self.looked = 0
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            for state in self._states:
                for folder in state.glob("mirrors/*/iris/[1-9]*"):
                    self._look(folder)

    def _look(self, folder: Path) -> None:
        self.looked += 1
        try:
            declared = json.loads((folder / "manifest.json").read_bytes())["files"]
            for name, entry in declared.items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]:
                    self._broken.add(str(folder))
        except (OSError, ValueError, KeyError):
            if folder.exists():
                self._broken.add(str(folder))

    def stop(self) -> set[str]:
        self._ended.set()
        self.join()
        return self._broken


def _deploy(state: Path, number: int, until: float, models: Path) -> list[str]:
    """Be a deployer: publish versions, promote and label them, and return the changes that were confirmed."""
    root, place = located(Path(URL), state)
    traffic, chance = TrafficStore(root, place), random.Random(number)
    confirmed: list[str] = []
    turns = itertools.count()
    with Gate(Limits()) as gate, tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < until:
            turn = next(turns)
            what = f"{number}: {turn}"
            try:
                if turn % 10 == 0:
                    model = Path(folder) / "model.onnx"
                    shutil.copy(models / "iris" / "1" / "model.onnx", model)
                    embed_entry(model, "drill", what.encode())
                    publish(root, "iris", model, examiner=gate, state_dir=place, who=str(number))
                there = traffic.versions("iris")
                version = chance.choice(there)
                step = transitions.promote(version, available=there)
                if turn % 3:
                    step = transitions.label(f"by-{number}", version, available=there)
                traffic.change("iris", step, who=str(number), what=what)
                confirmed.append(what)
            except ServingError:
                time.sleep(0.2)
    return confirmed


def _history(store: FaultyStore) -> list[dict[str, Any]]:
    text = store.client.get_object(Bucket="bucket", Key="m/iris/history.jsonl")["Body"].read()
    return [json.loads(line) for line in text.splitlines()]


def _serves(url: str, generation: int) -> bool:
    import httpx2 as httpx

    until = time.monotonic() + 150  # a minute at most between two tries, and what was downloaded loads
    while time.monotonic() < until:
        serving = httpx.get(f"{url}/v1/repository/models/iris").json()["serving"]
        if serving is not None and serving["generation"] == generation:
            return True
        time.sleep(0.5)
    return False


def _unconditional(store: FaultyStore) -> bool:
    """Tell whether deployers lose lines when the store is not told what they have read."""
    key = "control"
    store.client.put_object(Bucket="bucket", Key=key, Body=b"")

    def add(number: int) -> None:
        for _ in range(20):
            text = store.client.get_object(Bucket="bucket", Key=key)["Body"].read()
            store.client.put_object(Bucket="bucket", Key=key, Body=text + f"{number}\n".encode())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    return len(store.client.get_object(Bucket="bucket", Key=key)["Body"].read().splitlines()) < 80
