"""Makes a change of traffic and waits until every worker serves it; takes it back where one can't."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from serving.errors import GenerationConflict, InvalidRequest, NotReady, ServingError
from serving.fleet.ledger import Ledger
from serving.fleet.traffic import Traffic
from serving.fleet.transitions import Transition

log = logging.getLogger("serving.changes")

WAIT_S = 120.0
"""Seconds that a version may take to load in every worker."""


class Followers(Protocol):
    """The workers, as one that can be asked where all stand."""

    def look(self, *, retry: str | None = None) -> None:
        """Have the folder looked at now."""

    async def settled(self, name: str, generation: int) -> object:
        """Wait until every worker serves a generation. Raises NotReady or InvalidRequest where one can't."""


class Changes:
    """Changes what the folder asks for, on behalf of somebody, and sees it through."""

    def __init__(self, ledger: Ledger, followers: Followers) -> None:
        self.ledger = ledger
        self._followers = followers

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
    ) -> Traffic:
        """Write a change and return once every worker serves it; the arguments are those of `Ledger.change`.

        Raises what that raises, InvalidRequest where it asks for what the versions do not have, and NotReady where a
        worker can't serve it, with the reason: nothing is changed then, and the history says so.
        """
        after = await asyncio.to_thread(
            self.ledger.change,
            name,
            transition,
            who=who,
            what=what,
            why=why,
            if_generation=if_generation,
            anyway=anyway,
        )
        self._followers.look(retry=name)
        try:
            await asyncio.wait_for(self._followers.settled(name, after.generation), WAIT_S)
        except TimeoutError:
            refusal: ServingError = NotReady(f"not every worker served it within {WAIT_S:.0f} s")
        except (InvalidRequest, NotReady) as error:
            refusal = error
        else:
            return after
        try:
            await asyncio.to_thread(self.ledger.revert, name, after, who=who, why=refusal.message)
            self._followers.look()
        except GenerationConflict:
            log.info("%s: generation %d is not taken back: there is a later one", name, after.generation)
        raise type(refusal)(f"{refusal.message}; what served before goes on")
