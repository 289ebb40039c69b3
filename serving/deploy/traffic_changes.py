"""Makes a change of traffic and waits until every worker of every server serves it; takes it back where one can't."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from serving.deploy.worker_agent import WorkerAgent
from serving.errors import GenerationConflict, InvalidRequest, NotReady, ServingError
from serving.repository.servers import POLL_S, Waited, Waiting
from serving.repository.traffic import Traffic
from serving.repository.traffic_store import TrafficStore
from serving.repository.transitions import Transition

log = logging.getLogger("serving.changes")

WAIT_S = 120.0
"""Seconds that a version may take to load in every worker."""


class Made(NamedTuple):
    """A change that is served, and the servers, in words, that are silent: whether they serve it is not known."""

    traffic: Traffic
    unknown: list[str]


class Changes:
    """Changes what the folder asks for, on behalf of somebody, and sees it through.

    gone: says why the folder can't be followed now; '' where it can.
    """

    def __init__(self, store: TrafficStore, followers: WorkerAgent, *, gone: Callable[[], str]) -> None:
        self.store = store
        self._followers = followers
        self._gone = gone

    def check(self) -> None:
        """Raise NotReady where the folder is gone: what lies in its place must not be written to, or believed."""
        gone = self._gone()
        if gone:
            raise NotReady(f"nothing can be changed now: {gone}")

    async def make(
        self,
        name: str,
        transition: Transition,
        *,
        who: str,
        what: str | Callable[[Traffic, Traffic], str],
        why: str = "",
        if_generation: int | None = None,
        anyway: bool = False,
    ) -> Made:
        """Write a change and return once every worker of every server serves it.

        The arguments are those of `TrafficStore.change`. Raises what that raises, InvalidRequest where it asks for what
        the versions do not have, and NotReady where a worker can't serve it, with the reason: nothing is changed then,
        and the history says so.
        """
        self.check()
        after = await asyncio.to_thread(
            self.store.change,
            name,
            transition,
            who=who,
            what=what,
            why=why,
            if_generation=if_generation,
            anyway=anyway,
        )
        self._followers.rescan(retry=name)
        try:
            await asyncio.wait_for(self._followers.settled(name, after.generation), WAIT_S)
            waited = await self._others(name, after.generation)
        except TimeoutError:
            refusal: ServingError = NotReady(f"not every worker served it within {WAIT_S:.0f} s")
        except (InvalidRequest, NotReady) as error:
            refusal = error
        else:
            unknown = [f"{server.host} {server.unheard}" for server in waited.unknown]
            if unknown:
                log.warning("%s: it is not known whether every server serves it: %s", name, "; ".join(unknown))
            return Made(after, unknown)
        try:
            await asyncio.to_thread(self.store.revert, name, after, who=who, why=refusal.message)
            self._followers.rescan()
        except GenerationConflict:
            log.info("%s: generation %d is not taken back: there is a later one", name, after.generation)
        raise type(refusal)(f"{refusal.message}; what served before goes on")

    async def _others(self, name: str, generation: int) -> Waited:
        """Wait for the other servers of the folder. Raises NotReady where one can't serve it."""
        store = self.store
        waiting = Waiting(store.root, name, generation, seconds=WAIT_S, state_dir=store.state_dir)
        while (waited := await asyncio.to_thread(waiting.poll)) is None:  # noqa: ASYNC110  it is a file that moves
            await asyncio.sleep(POLL_S)
        if waited.problems:
            raise NotReady("; ".join(waited.problems))
        return waited
