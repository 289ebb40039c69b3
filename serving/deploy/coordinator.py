"""Brings all workers to what the folder says: one coordinator for each server, a thread in the parent process.

It looks at the folder, has the gate judge what it has not seen before, makes a plan for each model that changed, and
takes the workers to it in two phases: each loads and warms what the plan asks for; once all have, each swaps. If one
can't, none does, and the old plan stays. A worker that starts later gets the plans that are in force.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import orjson

from serving.deploy.channel import Link
from serving.deploy.folder_guard import FolderGuard
from serving.deploy.model_state import Change, Known, reasons, roles_of
from serving.deploy.plan import Plan
from serving.gate.results import Judge, Verdicts
from serving.linux.thread_scheduling import give_way
from serving.repository.model_settings import ModelSettings
from serving.repository.repository import Contents, Problem, Repository
from serving.repository.traffic import NOTHING, Traffic, without

log = logging.getLogger("serving.coordinator")

LOOK_S = 2.0
"""Seconds between looks at the folder when nothing was heard of it: for file systems that tell nothing."""


class Coordinator:
    """Owns the truth of what is served. Public methods may be called on any thread.

    report: called on the coordinator's own thread, every LOOK_S and at each change, with `summary()`. judge: the gate.
    loads_at_once: how many workers may load a version at the same time, so that live requests find a free core.
    """

    def __init__(
        self,
        repository: Repository,
        judge: Judge,
        *,
        report: Callable[[dict[str, Any]], None],
        loads_at_once: int = 1,
    ) -> None:
        self._repository = repository
        self._verdicts = Verdicts(judge, self._call)
        self._report = report
        self._loads_at_once = loads_at_once
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._workers: dict[int, Link] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._joining: set[int] = set()
        self._next = 0
        self._revision = 0
        self._models: dict[str, Known] = {}
        self._looked = False
        self.plans: dict[str, Plan] = {}
        """What is served, by model; replaced and never changed, for other threads."""
        self.contents: Contents | None = None
        """What the last look has found that is followed."""
        self.asked: dict[str, tuple[int, bool]] = {}
        """By model, the generation that the folder asks for, and whether it can't be served; replaced as `plans` is."""
        self._general: tuple[Problem, ...] = ()
        self._guard = FolderGuard()
        self._news: bytes = b""
        self._told: dict[int, bytes] = {}
        """What each worker was told last of how all stand."""
        self._due = 0.0
        self._stopped = False
        self._stumbles = 0
        """How often something went wrong that nobody foresaw."""
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Change nothing any more; the workers keep what they have."""

        def end() -> None:
            self._stopped = True

        self._call(end)
        self._thread.join(5)
        self._verdicts.close()
        if not self._thread.is_alive():
            for link in self._workers.values():
                link.close()
            self._selector.close()

    def attach(self, sock: socket.socket) -> Link:
        """Take a worker, by our end of its channel: it gets all plans in force, and those to come until that ends."""
        link = Link(sock)

        def join() -> None:
            self._next += 1
            self._workers[self._next] = link
            self._selector.register(link, selectors.EVENT_READ, self._next)
            self._joining.add(self._next)

        self._call(join)
        return link

    def look(self) -> None:
        """Look at the folder now."""
        self._call(lambda: None)

    def quarantine(self, held: dict[tuple[str, str], str]) -> None:
        """Serve these versions, by name and version, for these reasons no more, whatever the folder says."""

        def hold() -> None:
            self._verdicts.quarantined = dict(held)

        self._call(hold)

    def _call(self, action: Callable[[], None]) -> None:
        """Have something done on the coordinator's thread, and the folder looked at after it."""
        self._inbox.put(action)
        with contextlib.suppress(BlockingIOError):  # it is awake already
            os.write(self._wake, b"x")

    # All below runs on the coordinator's own thread.

    def _run(self) -> None:
        give_way()
        while not self._stopped:
            try:
                self._turn()
            except Exception:  # the workers serve on; whatever it was, the next look starts afresh
                self._stumbles += 1
                log.exception("the coordinator stumbled")
                time.sleep(0.5)

    def _turn(self) -> None:
        for worker, link in self._workers.items():
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.writes else 0)
            self._selector.modify(link, events, worker)
        is_news = False
        for key, events in self._selector.select(max(0.0, self._due - time.monotonic())):
            if key.data is None:
                os.read(self._woken, 65536)
            else:
                is_news |= self._exchange(key.data, events)
        while True:
            try:
                self._inbox.get_nowait()()
                self._due = 0.0
            except Empty:
                break
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + LOOK_S
            self._look()
            self._report(self.summary())
            for worker, link in self._workers.items():
                if link.idle:  # or its silence would show only at the next change
                    self._send(worker, {"kind": "ping"})
            is_news = True
        if is_news:
            self._review()
        self._tell()

    def _exchange(self, worker: int, events: int) -> bool:
        """Read from and write to a worker; return whether it said anything but that it listens."""
        link = self._workers[worker]
        if events & selectors.EVENT_WRITE:
            link.flush()
        try:
            messages = link.receive()
        except (EOFError, ValueError):
            self._lose(worker)
            return True
        for message in messages:
            self._hear(worker, message)
        return bool(messages)

    def _hear(self, worker: int, message: dict[str, Any]) -> None:
        if message["kind"] == "look":
            self._retry(message.get("retry"))
            self._due = 0.0
            return
        known = self._models.get(message["name"])
        if known is None:
            return
        version, reason = message.get("failed", ("", ""))
        change = known.change
        if change is not None and change.plan.revision == message["revision"]:
            change.waiting.discard(worker)
            if reason:
                change.failed = (version, reason)
            self._proceed(known)
        elif reason and known.served is not None and known.served.revision == message["revision"]:
            # A worker that starts could not load what the others serve, or there are no others yet.
            known.uneven = True
            self._due = 0.0
            if set(self._workers) - self._joining == {worker}:
                self._mark(known.served, version, reason)
            else:  # what serves elsewhere is asked for once more: a change begins, and fails if it can't be
                log.error("%s %s: a worker that starts can't load it: %s", known.served.name, version, reason)

    def _retry(self, name: str | None) -> None:
        """Forget what failed, for a model that somebody asks to be loaded again."""
        if name in self._models:
            self._verdicts.forget(name)
            self._models[name].refused = None

    def _mark(self, wanted: Plan, version: str, reason: str) -> None:
        """Remember that a version can't be loaded."""
        log.error("not served: %s %s: %s", wanted.name, version, reason)
        for item in wanted.versions:
            if item.version == version:
                self._verdicts.mark(item, reason)
                self._repository.doubt(item)

    def _lose(self, worker: int) -> None:
        """Go on without a worker that ended; its replacement comes as a new one."""
        link = self._workers.pop(worker)
        self._selector.unregister(link)
        link.close()
        self._joining.discard(worker)
        self._told.pop(worker, None)
        for known in self._models.values():
            if known.change is not None:
                known.change.waiting.discard(worker)
                if worker in known.change.untold:
                    known.change.untold.remove(worker)
                self._proceed(known)

    def _send(self, worker: int, message: dict[str, Any]) -> None:
        self._workers[worker].send(orjson.dumps(message))

    def _look(self) -> None:
        contents = self._repository.look()
        served = [name for name, known in self._models.items() if known.served is not None and known.served.versions]
        gone = self._guard.judge(contents, served)
        self._general = (Problem("", "", gone),) if gone else ()
        self._looked = True
        if gone:
            return  # what is loaded serves on
        self.contents = contents
        names = {item.name for item in contents.found} | {p.name for p in contents.problems}
        for name in sorted((names | self._models.keys()) - {""}):
            known = self._models.setdefault(name, Known())
            if known.change is None:  # else it is looked at again when that is done
                self._consider(name, known, contents)

    def _consider(self, name: str, known: Known, contents: Contents) -> None:
        found = [item for item in contents.found if item.name == name]
        problems = [p for p in contents.problems if p.name == name]
        if found or problems:
            known.missing_since = None
        elif known.served is None:
            del self._models[name]
            return
        elif known.may_come_back():
            return
        if self._verdicts.forget_changed(name, found):
            known.refused = None
        traffic = asked = contents.traffic.get(name) or (known.served.traffic if known.served else Traffic())
        held = self._verdicts.held(name)
        ends = known.served is not None and any(item.version in held for item in known.served.versions)
        # A later generation that asks for what is in quarantine is refused, as all that can't be served.
        if ends or known.served is None or known.served.traffic.generation == asked.generation:
            traffic = without(held, asked, [item.version for item in found])
        good, refused, pending = self._verdicts.part(name, found, traffic, known.reference)
        known.problems = (*problems, *refused)
        known.asked, known.pending = asked.generation, pending
        if pending and known.served is None:
            return  # until the gate has spoken
        bad = [problem for problem in known.problems if problem.version]
        stays = bool(bad) and known.served is not None and not traffic.unloaded
        roles, error = roles_of(asked, traffic, good, refused, stays=stays)
        if pending and (roles is None or roles.problems or not good):
            return  # what is examined is asked for by name; a version that nobody names may come later
        known.error = error or (reasons(bad) if roles is None else "")
        if not found and not problems and not traffic.unloaded:
            known.error = "it has vanished from the folder"
        known.problems += tuple(Problem(name, "", text) for text in (error, *(roles or NOTHING).problems) if text)
        if roles is None:
            if not ends:
                return  # what serves goes on
            good, roles = [], NOTHING
        self._revision += 1
        versions = tuple(item for item in good if item.version in roles.loaded)
        settings = contents.settings.get(name, ModelSettings())
        wanted = Plan(
            name,
            self._revision,
            traffic,
            versions,
            tuple(item.version for item in good if item.version not in roles.loaded),
            {item.version: settings.decide(self._verdicts.independence(item)) for item in versions},
        )
        if wanted.same(known.refused):
            known.error = known.reason
            known.problems += (Problem(name, "", known.reason),)
        elif known.uneven or not wanted.same(known.served):
            self._begin(known, wanted)

    def _begin(self, known: Known, wanted: Plan) -> None:
        workers = sorted(set(self._workers) - self._joining)
        loads = known.served is None or not set(wanted.versions) <= set(known.served.versions)
        for version, batching in wanted.batching.items():
            if not batching.together and (known.served is None or known.served.batching.get(version) != batching):
                log.info("%s %s: requests run alone: %s", wanted.name, version, batching.reason)
        known.change = Change(wanted, workers, self._loads_at_once if loads else len(workers))
        self._proceed(known)

    def _proceed(self, known: Known) -> None:
        """Take a change one phase further where all workers have done theirs."""
        change = known.change
        if change is None:
            return
        if change.failed is not None:
            change.untold.clear()
        while change.untold and len(change.waiting) < change.at_once:
            worker = change.untold.pop(0)
            change.waiting.add(worker)
            self._send(worker, {"kind": "prepare", "plan": change.plan.dump()})
        if change.waiting:
            return
        word = {"name": change.plan.name, "revision": change.plan.revision}
        if change.committing:
            # All that swap have loaded it; a worker that came meanwhile may have failed to.
            known.served, known.change, known.uneven = change.plan, None, change.failed is not None
            self._due = 0.0  # the folder may have moved on meanwhile
        elif change.failed is not None:
            for worker in set(self._workers) - self._joining:
                self._send(worker, {"kind": "abort", **word})
            self._mark(change.plan, *change.failed)
            version, known.reason = change.failed
            known.refused, known.unfit = change.plan, not version
            known.change = None
            self._due = 0.0
        else:
            change.committing = True
            change.waiting = set(self._workers) - self._joining
            for worker in change.waiting:
                self._send(worker, {"kind": "commit", **word})
            self._proceed(known)

    def _review(self) -> None:
        """Sum up how all stand, and give workers that start what is in force."""
        self.plans = {name: known.served for name, known in self._models.items() if known.served is not None}
        self.asked = {name: (known.asked, bool(known.error)) for name, known in self._models.items()}
        summary = self.summary()
        news = orjson.dumps(summary)
        if news != self._news:
            self._news = news
            self._report(summary)
        examined = self._looked and not any(k.pending and not k.served for k in self._models.values())
        # While the folder is gone a new worker can load nothing, and would answer 404 beside others that serve.
        if self._joining and examined and not (self._guard.gone and self.plans):
            for worker in self._joining:
                self._tell_one(worker)
                self._join(worker)
            self._joining.clear()

    def _tell(self) -> None:
        """Tell workers how all stand where that changed: each anew only when it has taken what it was told before."""
        for worker, link in self._workers.items():
            if worker not in self._joining and link.idle and self._told.get(worker) != self._news:
                self._tell_one(worker)

    def _tell_one(self, worker: int) -> None:
        self._told[worker] = self._news
        self._workers[worker].send(b'{"kind":"told",' + self._news[1:])

    def _join(self, worker: int) -> None:
        changes = [known.change for known in self._models.values() if known.change is not None]
        committing = {change.plan.name: change.plan for change in changes if change.committing}
        served = {k.served.name: k.served for k in self._models.values() if k.served is not None}
        plans = [plan.dump() for plan in (served | committing).values()]
        self._send(worker, {"kind": "join", "plans": plans})
        for change in changes:
            if not change.committing:
                change.waiting.add(worker)
                self._send(worker, {"kind": "prepare", "plan": change.plan.dump()})

    def summary(self) -> dict[str, Any]:
        """Return, by model, the generation that is asked for and that which is served, and what is not served."""
        problems = (*self._general, *(p for known in self._models.values() for p in known.problems))
        return {
            "models": {name: known.standing() for name, known in self._models.items()},
            "passed": self._verdicts.passed(),
            "figures": self._verdicts.figures(),
            "stumbles": self._stumbles,
            "problems": [[p.name, p.version, p.reason] for p in problems],
        }
