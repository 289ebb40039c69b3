"""A worker's side of deployment: does what the coordinator says, off the event loop, and reports back."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from serving.deploy.channel import Channel
from serving.deploy.plan import Plan
from serving.engine.model import Model
from serving.errors import InvalidRequest, NotReady
from serving.repository.repository import ModelVersion, Problem

Load = Callable[[Plan], Awaitable[dict[ModelVersion, Model]]]
Swap = Callable[[Plan, dict[ModelVersion, Model]], None]


class Standing(NamedTuple):
    """A model's state as the coordinator sees it: generations asked for and served, and why they differ."""

    asked: int
    serving: int | None
    stable: str | None
    error: str
    invalid: bool
    """Whether what was asked for fits no version that is there, so that asking again can't help."""
    busy: bool
    versions: list[str]
    """Versions that passed, loaded or not."""
    alone: dict[str, str]
    """Why requests of a version that is served do not run together, by version; those that do are not in it."""


class PlanFailed(Exception):
    """A plan can't be served: `version` can't be loaded; where that is empty, the plan does not fit those that can."""

    def __init__(self, version: str, reason: str) -> None:
        super().__init__(reason)
        self.version = version
        self.reason = reason


class WorkerAgent:
    """Speaks with the coordinator over one end of a channel.

    load: loads and warms what a plan asks for and is not there yet; raises PlanFailed. swap: puts a plan's versions in
    their place, at once. on_status: takes `Coordinator.summary()` whenever that changes.
    """

    def __init__(
        self, sock: socket.socket, *, load: Load, swap: Swap, on_status: Callable[[dict[str, Any]], None]
    ) -> None:
        self._channel = Channel(sock, self._on_message)
        self._load = load
        self._swap = swap
        self._on_status = on_status
        self._prepared: dict[str, tuple[Plan, dict[ModelVersion, Model]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._joined = asyncio.Event()
        self._failed: list[Problem] = []
        self._moved = asyncio.Event()
        self.standings: dict[str, Standing] = {}

    async def start(self) -> None:
        """Listen to the coordinator."""
        await self._channel.connect()

    @property
    def silent_s(self) -> float:
        """Seconds since the coordinator has said anything."""
        return time.monotonic() - self._channel.last_message_at

    async def joined(self) -> list[Problem]:
        """Wait until all that was in force when this worker came is loaded; return what of it could not be."""
        await self._joined.wait()
        return self._failed

    def close(self) -> None:
        """Listen no more."""
        self._channel.close()
        for task in self._tasks:
            task.cancel()

    def rescan(self, *, retry: str | None = None) -> None:
        """Ask the coordinator to scan the folder now; `retry` names a model whose failures are to be forgotten."""
        self._channel.send({"kind": "scan", "retry": retry})

    async def settled(self, name: str, generation: int) -> Standing:
        """Wait until every worker serves a generation of a model or can't.

        Raises InvalidRequest where that asks for what the versions do not have, else NotReady, with the reason.
        """
        while True:
            self._moved.clear()
            standing = self.standings.get(name)
            if standing is not None and standing.asked >= generation:
                if standing.serving is not None and standing.serving >= generation:
                    return standing
                if standing.error and not standing.busy:
                    raise InvalidRequest(standing.error) if standing.invalid else NotReady(standing.error)
            await self._moved.wait()

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "join":
            self._begin(self._join([Plan.read(given) for given in message["plans"]]))
        elif kind == "prepare":
            self._begin(self._prepare(Plan.read(message["plan"])))
        elif kind == "status":
            self.standings = {name: Standing(**standing) for name, standing in message["models"].items()}
            self._on_status(message)
            self._moved.set()
        elif kind in ("commit", "abort"):
            self._end(message["name"], message["revision"], commit=kind == "commit")

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, plans: Iterable[Plan]) -> None:
        """Serve all that is in force: nobody waits for this worker, so each plan as soon as it is loaded."""
        for wanted in plans:
            try:
                self._swap(wanted, await self._load(wanted))
            except PlanFailed as error:
                self._failed.append(Problem(wanted.name, error.version, error.reason))
                self._answer(wanted, error)
        self._joined.set()

    async def _prepare(self, wanted: Plan) -> None:
        # What was in force comes first: its late swap would put an older plan in the place of this one.
        await self._joined.wait()
        try:
            self._prepared[wanted.name] = wanted, await self._load(wanted)
        except PlanFailed as error:
            self._answer(wanted, error)
        else:
            self._answer(wanted)

    def _end(self, name: str, revision: int, *, commit: bool) -> None:
        wanted, models = self._prepared.pop(name, (None, {}))
        if wanted is None or wanted.revision != revision:
            return  # it could not be prepared here, or is a word about an older plan
        if commit:
            self._swap(wanted, models)
            self._answer(wanted)

    def _answer(self, wanted: Plan, error: PlanFailed | None = None) -> None:
        message: dict[str, Any] = {"kind": "done", "name": wanted.name, "revision": wanted.revision}
        if error is not None:
            message["failed"] = [error.version, error.reason]
        self._channel.send(message)
