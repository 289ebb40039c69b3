"""Brings all workers to what the folder says: one coordinator for each server, a thread in the parent process.

It scans the folder, has the gate examine what is new, makes a plan for each model that changed (`decision`), and takes
the workers to it in two phases: each loads and warms what the plan asks for; once all have, each swaps. If one can't,
none does, and the old plan stays. A worker that starts later gets the plans that are in force.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import orjson

from serving.deploy.channel import Link
from serving.deploy.decision import ModelContents, by_name, decide, unreplaced
from serving.deploy.folder_guard import FolderGuard
from serving.deploy.model_state import Change, ModelState, Refusal
from serving.deploy.plan import Plan
from serving.gate.results import Gate, GateResults
from serving.linux.thread_scheduling import give_way
from serving.repository.model_settings import ModelSettings
from serving.repository.repository import Contents, ModelVersion, Problem, Repository
from serving.repository.traffic import Traffic

log = logging.getLogger("serving.coordinator")

SCAN_S = 2.0
"""Seconds between scans of the folder when no event came: for file systems that raise none."""


class Coordinator:
    """Owns the truth of what is served. Public methods may be called on any thread.

    report: called on the coordinator's own thread, every SCAN_S and at each change, with `summary()`.
    loads_at_once: how many workers may load a version at the same time, so that live requests find a free core.
    """

    def __init__(
        self,
        repository: Repository,
        gate: Gate,
        *,
        report: Callable[[dict[str, Any]], None],
        loads_at_once: int = 1,
    ) -> None:
        self._repository = repository
        self._results = GateResults(gate, self._call)
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
        self._models: dict[str, ModelState] = {}
        self.scans = 0
        """How often the folder was looked at."""
        self.plans: dict[str, Plan] = {}
        """What is served, by model; replaced and never changed, for other threads."""
        self.contents: Contents | None = None
        """What the last scan found that is followed."""
        self.asked: dict[str, tuple[int, bool]] = {}
        """By model, the generation that the folder asks for, and whether it can't be served; replaced as `plans` is."""
        self.unfinished: dict[Link, int] = {}
        """By worker, how many changes it was told and has not finished; replaced as `plans` is."""
        self._general: tuple[Problem, ...] = ()
        self._guard = FolderGuard()
        self._status: bytes = b""
        self._sent: dict[int, bytes] = {}
        """The status that each worker was sent last."""
        self._due = 0.0
        self._rest_until = 0.0
        self._stopped = False
        self._errors = 0
        """How often something went wrong that nobody foresaw."""
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)

    def start(self) -> None:
        """Begin to follow the folder."""
        self._thread.start()

    def stop(self) -> None:
        """Change nothing any more; the workers keep what they have."""

        def end() -> None:
            self._stopped = True

        self._call(end)
        self._thread.join(5)
        self._results.close()
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

    def rescan(self) -> None:
        """Scan the folder now."""
        self._call(lambda: None)

    def quarantine(self, held: dict[tuple[str, str], str]) -> None:
        """Serve these versions, by name and version, for these reasons no more, whatever the folder says."""

        def hold() -> None:
            self._results.quarantined = dict(held)

        self._call(hold)

    def _call(self, action: Callable[[], None]) -> None:
        """Have something done on the coordinator's thread, and the folder scanned after it."""
        self._inbox.put(action)
        with contextlib.suppress(BlockingIOError):  # it is awake already
            os.write(self._wake, b"x")

    # All below runs on the coordinator's own thread.

    def _run(self) -> None:
        give_way()
        while not self._stopped:
            try:
                self._step()
            except Exception:  # the workers serve on; whatever it was, the next scan starts afresh
                self._errors += 1
                log.exception("the coordinator failed")
                time.sleep(0.5)

    def _step(self) -> None:
        for worker, link in self._workers.items():
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.writes else 0)
            self._selector.modify(link, events, worker)
        is_changed = False
        for key, events in self._selector.select(max(0.0, max(self._due, self._rest_until) - time.monotonic())):
            if key.data is None:
                os.read(self._woken, 65536)
            else:
                is_changed |= self._exchange(key.data, events)
        while True:
            try:
                self._inbox.get_nowait()()
                self._due = 0.0
            except Empty:
                break
        if time.monotonic() >= max(self._due, self._rest_until):
            began = time.monotonic()
            self._due = began + SCAN_S
            self._scan()
            # Four times as long for others: while the gate judges thousands of models, each verdict asks for a scan.
            self._rest_until = 5 * time.monotonic() - 4 * began
            self._report(self.summary())
            for worker, link in self._workers.items():
                if link.idle:  # or its silence would show only at the next change
                    self._send(worker, {"kind": "ping"})
            is_changed = True
        if is_changed:
            self._publish()
        for worker, link in self._workers.items():
            # Anew only when it has taken the one before: a worker that lags gets the last status, not all of them.
            if worker not in self._joining and link.idle and self._sent.get(worker) != self._status:
                self._send_status(worker)

    def _exchange(self, worker: int, events: int) -> bool:
        """Read from and write to a worker; return whether it said more than acknowledgements."""
        link = self._workers[worker]
        if events & selectors.EVENT_WRITE:
            link.flush()
        try:
            messages = link.receive()
        except (EOFError, ValueError):
            self._lose(worker)
            return True
        for message in messages:
            self._on_message(worker, message)
        return bool(messages)

    def _on_message(self, worker: int, message: dict[str, Any]) -> None:
        if message["kind"] == "scan":
            self._retry(message.get("retry"))
            self._due = 0.0
            return
        state = self._models.get(message["name"])
        if state is None:
            return
        version, reason = message.get("failed", ("", ""))
        change = state.change
        if change is not None and change.plan.revision == message["revision"]:
            change.waiting.discard(worker)
            if reason:
                change.failed = (version, reason)
            self._advance(state)
        elif reason and state.served is not None and state.served.revision == message["revision"]:
            # A worker that starts could not load what the others serve, or there are no others yet.
            state.diverged = True
            self._due = 0.0
            if set(self._workers) - self._joining == {worker}:
                self._mark(state.served, version, reason)
            else:  # what serves elsewhere is asked for once more: a change begins, and fails if it can't be
                log.error("%s %s: a worker that starts can't load it: %s", state.served.name, version, reason)

    def _retry(self, name: str | None) -> None:
        """Forget what failed, for a model that somebody asks to be loaded again."""
        if name in self._models:
            self._results.forget(name)
            self._models[name].refusal = None

    def _mark(self, plan: Plan, version: str, reason: str) -> None:
        """Remember that a version can't be loaded."""
        log.error("not served: %s %s: %s", plan.name, version, reason)
        for item in plan.versions:
            if item.version == version:
                self._results.mark(item, reason)
                self._repository.invalidate(item)

    def _lose(self, worker: int) -> None:
        """Go on without a worker that ended; its replacement comes as a new one."""
        link = self._workers.pop(worker)
        self._selector.unregister(link)
        link.close()
        self._joining.discard(worker)
        self._sent.pop(worker, None)
        for state in self._models.values():
            if state.change is not None:
                state.change.waiting.discard(worker)
                if worker in state.change.queued:
                    state.change.queued.remove(worker)
                self._advance(state)

    def _send(self, worker: int, message: dict[str, Any]) -> None:
        self._workers[worker].send(orjson.dumps(message))

    def _scan(self) -> None:
        contents = self._repository.scan()
        served = [name for name, state in self._models.items() if state.served is not None and state.served.versions]
        gone = self._guard.check(contents, served)
        self._general = (Problem("", "", gone),) if gone else tuple(p for p in contents.problems if not p.name)
        self.scans += 1
        if gone:
            return  # what is loaded serves on
        self.contents = contents
        found, problems = by_name(contents.found), by_name(contents.problems)
        for name in sorted((found.keys() | problems.keys() | self._models.keys()) - {""}):
            state = self._models.setdefault(name, ModelState())
            if state.change is None:  # else its turn comes when that is done
                self._reconcile(name, state, contents, tuple(found[name]), tuple(problems[name]))

    def _reconcile(
        self,
        name: str,
        state: ModelState,
        contents: Contents,
        found: tuple[ModelVersion, ...],
        problems: tuple[Problem, ...],
    ) -> None:
        """Begin a change of a model where what it should serve is not what it does."""
        found, replaced = unreplaced(found, state.served)
        problems += replaced
        if found or problems:
            state.missing_since = None
        elif state.served is None:
            del self._models[name]
            return
        elif state.may_come_back():
            return
        if self._results.forget_changed(name, list(found)):
            state.refusal = None
        asked = contents.traffic.get(name) or (state.served.traffic if state.served else Traffic())
        settings = contents.settings.get(name, ModelSettings())
        held = frozenset(self._results.held(name))
        mine = ModelContents(name, found, problems, asked, settings, held)
        results = self._results.part(name, list(found), mine.traffic(state.served), state.reference)
        decision = decide(state, mine, results, self._results.independence)
        state.asked, state.pending = asked.generation, results.pending
        state.error, state.problems = decision.error, decision.problems
        if decision.target is not None:
            self._revision += 1
            self._begin(state, replace(decision.target, revision=self._revision))

    def _begin(self, state: ModelState, plan: Plan) -> None:
        workers = sorted(set(self._workers) - self._joining)
        before = state.served.batching if state.served is not None else {}
        new = {version: batching for version, batching in plan.batching.items() if before.get(version) != batching}
        # Settings may ask for a session of its own too.
        loads = bool(new) or state.served is None or not set(plan.versions) <= set(state.served.versions)
        for version, batching in new.items():
            if not batching.together:
                log.info("%s %s: requests run alone: %s", plan.name, version, batching.reason)
        state.change = Change(plan, workers, self._loads_at_once if loads else len(workers))
        self._advance(state)

    def _advance(self, state: ModelState) -> None:
        """Take a change one phase further where all workers have done theirs.

        Nothing is committed before every worker has prepared: else some would answer with the new version while others
        can't, and a failure could not be taken back without anybody having seen it.
        """
        change = state.change
        if change is None:
            return
        if change.failed is not None:
            change.queued.clear()
        while change.queued and len(change.waiting) < change.at_once:
            worker = change.queued.pop(0)
            change.waiting.add(worker)
            self._send(worker, {"kind": "prepare", "plan": change.plan.dump()})
        if change.waiting:
            return
        if change.committing:
            # All that swap have loaded it; a worker that came meanwhile may have failed to.
            state.served, state.change, state.diverged = change.plan, None, change.failed is not None
            self._due = 0.0  # the folder may have moved on meanwhile
        elif change.failed is not None:
            self._send_all("abort", change.plan)
            version, reason = change.failed
            self._mark(change.plan, version, reason)
            state.refusal, state.change = Refusal(change.plan, reason, invalid=not version), None
            self._due = 0.0
        else:
            change.committing = True
            change.waiting = self._send_all("commit", change.plan)
            self._advance(state)

    def _send_all(self, kind: str, plan: Plan) -> set[int]:
        workers = set(self._workers) - self._joining
        for worker in workers:
            self._send(worker, {"kind": kind, "name": plan.name, "revision": plan.revision})
        return workers

    def _publish(self) -> None:
        """Sum up the state of all models, and give workers that start what is in force."""
        self.plans = {name: state.served for name, state in self._models.items() if state.served is not None}
        self.asked = {name: (state.asked, bool(state.error)) for name, state in self._models.items()}
        waited = Counter(worker for s in self._models.values() if s.change is not None for worker in s.change.waiting)
        self.unfinished = {link: waited[worker] for worker, link in self._workers.items()}
        summary = self.summary()
        status = orjson.dumps(summary)
        if status != self._status:
            self._status = status
            self._report(summary)
        examined = self.scans and not any(s.pending and not s.served for s in self._models.values())
        # While the folder is gone a new worker can load nothing, and would answer 404 beside others that serve.
        if self._joining and examined and not (self._guard.gone and self.plans):
            for worker in self._joining:
                self._send_status(worker)
                self._join(worker)
            self._joining.clear()

    def _send_status(self, worker: int) -> None:
        self._sent[worker] = self._status
        self._workers[worker].send(b'{"kind":"status",' + self._status[1:])

    def _join(self, worker: int) -> None:
        changes = [state.change for state in self._models.values() if state.change is not None]
        committing = {change.plan.name: change.plan for change in changes if change.committing}
        plans = [plan.dump() for plan in (self.plans | committing).values()]
        self._send(worker, {"kind": "join", "plans": plans})
        for change in changes:
            if not change.committing:
                change.waiting.add(worker)
                self._send(worker, {"kind": "prepare", "plan": change.plan.dump()})

    def summary(self) -> dict[str, Any]:
        """Return the state of each model, what the gate found, and what is not served."""
        problems = (*self._general, *(p for state in self._models.values() for p in state.problems))
        return {
            "models": {name: state.standing() for name, state in self._models.items()},
            "passed": self._results.passed(),
            "figures": self._results.figures(),
            "errors": self._errors,
            "problems": [[p.name, p.version, p.reason] for p in problems],
        }
