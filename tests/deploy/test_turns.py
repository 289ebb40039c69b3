"""Workers load a version in turns, so that live requests find a free core; what loads nothing waits for nobody."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from serving.deploy.channel import Channel, pair
from serving.deploy.coordinator import Coordinator
from serving.engine.batching import Independence
from serving.gate.report import Report
from serving.repository.repository import ModelVersion, Repository
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import keep, promote
from tests.conftest import MODELS

Wait = Callable[[Callable[[], bool]], None]


class Lenient:
    """A gate that lets all pass."""

    def known(self, found: ModelVersion) -> Report:
        return Report(ok=True, content=found.content, runtime="", time=0, independence=Independence(proved=True))

    def examine(self, found: ModelVersion, serving: ModelVersion | None) -> Report:
        return self.known(found)

    def rest(self) -> None: ...


class Worker:
    """The other end of a channel, which notes what it is told and answers when it is asked to."""

    def __init__(self, sock: socket.socket, link: Channel) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.link = link
        self.heard: list[dict[str, Any]] = []
        self._read = b""

    def _send(self, text: bytes) -> None:
        self.sock.sendall(struct.pack("!I", len(text)) + text)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := self.sock.recv(65536):
                self._read += data
        while len(self._read) >= 4 and len(self._read) >= 4 + (size := struct.unpack_from("!I", self._read)[0]):
            message = orjson.loads(self._read[4 : 4 + size])
            self._read = self._read[4 + size :]
            if message:  # else it acknowledges ours
                self.heard.append(message)
                self._send(b"{}")

    def kinds(self) -> list[str]:
        """Return what it was told of iris so far, news of how all stand left out."""
        self._hear()
        return [m["kind"] for m in self.heard if m["kind"] not in ("status", "ping")]

    def done(self, **failed: Any) -> None:
        """Say that the last that it was told is done."""
        last = [m for m in self.heard if m["kind"] not in ("status", "ping")][-1]
        revision = last["revision"] if "revision" in last else last["plan"]["revision"]
        self._send(orjson.dumps({"kind": "done", "name": "iris", "revision": revision, **failed}))


@pytest.fixture
def store(tmp_path: Path) -> TrafficStore:
    """A folder with two versions of iris, of which only the first is to be loaded."""
    for version in ("1", "2"):
        shutil.copytree(MODELS / "iris" / version, tmp_path / "iris" / version)
    made = TrafficStore(tmp_path)
    made.change("iris", promote("1", available=["1", "2"]), who="test", what="promote 1")
    made.change("iris", keep(("1",), available=["1", "2"]), who="test", what="keep 1")
    return made


class Told(NamedTuple):
    """A coordinator, two workers that have joined, and what changes what they are to serve."""

    coordinator: Coordinator
    first: Worker
    second: Worker
    store: TrafficStore

    def promote(self) -> None:
        """Ask for the version that nobody has loaded."""
        self.store.change("iris", promote("2", available=["1", "2"]), who="test", what="promote 2")
        self.coordinator.rescan()


@pytest.fixture
def told(tmp_path: Path, store: TrafficStore, eventually: Wait) -> Iterator[Told]:
    coordinator = Coordinator(
        Repository(tmp_path, store.import_edit), Lenient(), report=lambda _: None, loads_at_once=1
    )
    workers = []
    for _ in range(2):
        ours, theirs = pair()
        workers.append(Worker(theirs, coordinator.attach(ours)))
    coordinator.start()
    eventually(lambda: all(worker.kinds() == ["join"] for worker in workers))
    for worker in workers:
        worker.heard.clear()
    yield Told(coordinator, *workers, store)
    coordinator.stop()
    for worker in workers:
        worker.sock.close()


def test_one_loads_after_the_other(told: Told, eventually: Wait) -> None:
    """A second worker begins to load when the first has done so, and both serve the version when both have it."""
    _, first, second, _ = told
    told.promote()
    eventually(lambda: first.kinds() == ["prepare"])
    assert second.kinds() == []
    first.done()
    eventually(lambda: second.kinds() == ["prepare"])
    assert first.kinds() == ["prepare"]
    second.done()
    eventually(lambda: first.kinds() == second.kinds() == ["prepare", "commit"])


def test_what_loads_nothing_is_told_to_all(told: Told, eventually: Wait) -> None:
    """A change among versions that are loaded does not wait for one worker after the other."""
    coordinator, first, second, store = told
    store.change("iris", keep(("1", "2"), available=["1", "2"]), who="test", what="keep both")
    coordinator.rescan()
    for worker in (first, second):
        eventually(lambda worker=worker: worker.kinds() == ["prepare"])
        worker.done()
    eventually(lambda: first.kinds() == second.kinds() == ["prepare", "commit"])
    first.done()
    second.done()
    eventually(
        lambda: any(m.get("models", {}).get("iris", {}).get("serving") == 3 for m in first.heard if first.kinds())
    )
    told.promote()
    eventually(lambda: first.kinds() == second.kinds() == ["prepare", "commit", "prepare"])


def test_who_waits_for_its_turn_may_end(told: Told, eventually: Wait) -> None:
    """A worker that dies before its turn is not waited for."""
    _, first, second, _ = told
    told.promote()
    eventually(lambda: first.kinds() == ["prepare"])
    second.sock.close()
    eventually(lambda: second.link.ended_at is not None)  # its end has been noticed
    first.done()
    eventually(lambda: first.kinds() == ["prepare", "commit"])


def test_what_one_could_not_load_no_other_tries(told: Told, eventually: Wait) -> None:
    """A version that the first worker can't load is given up, and the others never load it."""
    _, first, second, _ = told
    told.promote()
    eventually(lambda: first.kinds() == ["prepare"])
    first.done(failed=["2", "no memory"])
    eventually(lambda: first.kinds() == ["prepare", "abort"] and second.kinds() == ["abort"])


def test_a_worker_that_comes_while_others_swap_and_cant_load_is_asked_again(told: Told, eventually: Wait) -> None:
    """It does not go on without the model beside others that serve it: the plan is tried once more, by all."""
    coordinator, first, second, _ = told
    told.promote()
    for worker in (first, second):
        eventually(lambda worker=worker: worker.kinds() == ["prepare"])
        worker.done()
    eventually(lambda: first.kinds() == second.kinds() == ["prepare", "commit"])
    ours, theirs = pair()
    third = Worker(theirs, coordinator.attach(ours))
    with theirs:
        eventually(lambda: third.kinds() == ["join"])
        plan = next(m for m in third.heard if m["kind"] == "join")["plans"][0]
        answer = {"kind": "done", "name": "iris", "revision": plan["revision"], "failed": ["2", "no memory"]}
        third._send(orjson.dumps(answer))
        first.done()
        second.done()
        eventually(lambda: third.kinds()[:2] == ["join", "prepare"])
