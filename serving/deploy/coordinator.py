"""Brings all workers to what the folder says: one coordinator for each server, a thread in the parent process.

It scans the folder, has the gate examine what is new, makes a plan for each model that changed (`decision`), and takes
the workers to it in two phases: each loads and warms what the plan asks for; once all have, each swaps. If one can't,
none does, and the old plan stays. A worker that starts later gets the plans that are in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from serving.deploy.channel import Channel
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

GONE_S = 2.0
"""Seconds for which a model's folder must be missing before it stops being served: a copy may replace it."""


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
        self._loop = asyncio.SelectorEventLoop()
        self._moved = asyncio.Event()
        self._joining: list[Channel] = []
        """Workers that have not been told yet what is in force."""
        self._workers: list[Channel] = []
        """Those that have: a change waits for each of them."""
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
        self.unfinished: Counter[Channel] = Counter()
        """By worker, how many changes it was told and has not finished; replaced as `plans` is."""
        self._general: tuple[Problem, ...] = ()
        self._guard = FolderGuard()
        self._status: bytes = b""
        self._due = 0.0
        self._rest_until = 0.0
        self._unpublished = False
        """Whether something was said or found since the state of all models was summed up."""
        self._is_held = False
        """Whether workers that start wait until the models folder is there again."""
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

    def attach(self, sock: socket.socket) -> Channel:
        """Take a worker, by our end of its channel: it gets all plans in force, and those to come until that ends."""
        # In a turn of the loop of its own: what fails then is our fault, and must not close the worker's channel.
        worker = Channel(
            sock,
            lambda message: self._loop.call_soon(self._on_message, worker, message),
            lambda: self._loop.call_soon(self._lose, worker),
        )

        async def join() -> None:
            await worker.connect()
            if worker.ended_at is None:  # or all changes would wait for one that has gone
                self._joining.append(worker)
                self._scan_soon()

        asyncio.run_coroutine_threadsafe(join(), self._loop)
        return worker

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

        def act() -> None:
            self._scan_soon()
            action()

        with contextlib.suppress(RuntimeError):  # the loop has closed: nothing changes any more
            self._loop.call_soon_threadsafe(act)

    # All below runs on the coordinator's own thread.

    def _run(self) -> None:
        give_way()
        self._loop.set_exception_handler(self._on_error)
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._follow())

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Note what went wrong. The workers serve on; whatever it was, the next scan starts afresh."""
        self._errors += 1
        log.error("the coordinator failed: %s", context["message"], exc_info=context.get("exception"))

    async def _follow(self) -> None:
        while not self._stopped:
            try:
                self._step()
            except Exception as error:
                self._on_error(self._loop, {"message": "it goes on", "exception": error})
                await asyncio.sleep(0.5)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, max(self._due, self._rest_until) - time.monotonic())):
                    await self._moved.wait()
            self._moved.clear()
        for worker in (*self._joining, *self._workers):
            worker.close()
        await asyncio.sleep(0)  # they are closed in a turn of the loop

    def _scan_soon(self) -> None:
        self._due = 0.0
        self._moved.set()

    def _step(self) -> None:
        began = time.monotonic()
        is_due = began >= max(self._due, self._rest_until)
        if is_due:
            self._due = began + SCAN_S
            self._scan()
            # Four times as long for others: while the gate judges thousands of models, each verdict asks for a scan.
            self._rest_until = 5 * time.monotonic() - 4 * began
            for worker in self._workers:
                if worker.idle:  # or its silence would show only at the next change
                    worker.send({"kind": "ping"})
        if is_due or self._unpublished:
            self._unpublished = False
            self._publish(is_due=is_due)

    def _on_message(self, worker: Channel, message: dict[str, Any]) -> None:
        self._unpublished = True
        self._moved.set()
        if message["kind"] == "scan":
            self._retry(message.get("retry"))
            self._scan_soon()
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
            self._scan_soon()
            if self._workers == [worker]:
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

    def _lose(self, worker: Channel) -> None:
        """Go on without a worker that ended; its replacement comes as a new one."""
        self._unpublished = True
        self._moved.set()
        for there in (self._joining, self._workers):
            if worker in there:
                there.remove(worker)
        for state in self._models.values():
            if state.change is not None:  # or it would wait for this answer for ever
                state.change.waiting.discard(worker)
                if worker in state.change.queued:
                    state.change.queued.remove(worker)
                self._advance(state)

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
        elif state.missing_since is None or time.monotonic() - state.missing_since < GONE_S:
            state.missing_since = state.missing_since or time.monotonic()
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
            # Each try has a number of its own: what a worker says late of one that was given up counts for no other.
            self._revision += 1
            self._begin(state, replace(decision.target, revision=self._revision))

    def _begin(self, state: ModelState, plan: Plan) -> None:
        before = state.served.batching if state.served is not None else {}
        new = {version: batching for version, batching in plan.batching.items() if before.get(version) != batching}
        for version, batching in new.items():
            if not batching.together:
                log.info("%s %s: requests run alone: %s", plan.name, version, batching.reason)
        # New settings may need a session of their own, which is loaded as a new version is.
        at_once = self._loads_at_once if new else len(self._workers)
        state.change = Change(plan, list(self._workers), at_once)
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
            worker.send({"kind": "prepare", "plan": change.plan.dump()})
        if change.waiting:
            return
        if change.committing:
            # All that swap have loaded it; a worker that came meanwhile may have failed to.
            state.served, state.change, state.diverged = change.plan, None, change.failed is not None
            self._scan_soon()  # the folder may have moved on meanwhile
        elif change.failed is not None:
            self._send_all("abort", change.plan)
            version, reason = change.failed
            self._mark(change.plan, version, reason)
            state.refusal, state.change = Refusal(change.plan, reason, invalid=not version), None
            self._scan_soon()
        else:
            change.committing = True
            change.waiting = self._send_all("commit", change.plan)
            self._advance(state)

    def _send_all(self, kind: str, plan: Plan) -> set[Channel]:
        for worker in self._workers:
            worker.send({"kind": kind, "name": plan.name, "revision": plan.revision})
        return set(self._workers)

    def _publish(self, *, is_due: bool) -> None:
        """Sum up the state of all models, and give workers that start what is in force."""
        self.plans = {name: state.served for name, state in self._models.items() if state.served is not None}
        self.asked = {name: (state.asked, bool(state.error)) for name, state in self._models.items()}
        changes = [state.change for state in self._models.values() if state.change is not None]
        self.unfinished = Counter(worker for change in changes for worker in change.waiting)
        summary = self.summary()
        text = orjson.dumps(summary)
        is_new, self._status = text != self._status, text
        status = b'{"kind":"status",' + text[1:]
        if is_due or is_new:
            self._report(summary)
        if is_new:
            for worker in self._workers:
                worker.send_latest(status)
        examined = self.scans and not any(s.pending and not s.served for s in self._models.values())
        # While the folder is gone a new worker can load nothing, and would answer 404 beside others that serve.
        was_held, self._is_held = self._is_held, bool(self._joining and self._guard.gone and self.plans)
        if self._is_held and not was_held:
            log.warning("a worker that starts waits for the models folder")
        if self._joining and examined and not self._is_held:
            for worker in self._joining:
                worker.send_latest(status)
                self._join(worker, changes)
            self._workers += self._joining
            self._joining.clear()

    def _join(self, worker: Channel, changes: list[Change]) -> None:
        """Tell a worker that starts all that is in force, and then what the others are preparing.

        A plan that is being committed is in force: the others may answer by it already, and none of them goes back.
        """
        committing = {change.plan.name: change.plan for change in changes if change.committing}
        worker.send({"kind": "join", "plans": [plan.dump() for plan in (self.plans | committing).values()]})
        for change in changes:
            if not change.committing:
                change.waiting.add(worker)
                worker.send({"kind": "prepare", "plan": change.plan.dump()})

    def summary(self) -> dict[str, Any]:
        """Return the state of each model, what the gate found, what is not served, and how often this failed itself.

        passed: name, version, and whether the gate let it pass. figures: see `gate.results.Figure`. problems: name,
        version and reason; without a name, of the folder.
        """
        problems = (*self._general, *(p for state in self._models.values() for p in state.problems))
        return {
            "models": {name: state.standing() for name, state in self._models.items()},
            "passed": self._results.passed(),
            "figures": self._results.figures(),
            "errors": self._errors,
            "problems": [[p.name, p.version, p.reason] for p in problems],
        }
