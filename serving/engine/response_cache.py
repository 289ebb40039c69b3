"""Answers that are given again: to the same caller, for the very same tensors, by the same version.

Requests that are equal to one in progress wait for its answer instead of running too. Callers share nothing: how long
an answer takes would tell one what another has asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Hashable
from typing import NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from cachetools import LRUCache

from serving.engine.batcher import Batcher, Observer, reply
from serving.engine.limits import CacheSize
from serving.engine.request import Outcome, Request
from serving.errors import DeadlineExceeded, ServingError
from serving.tensors import Array, Overriding, Tensors

MOST_BYTES = 1024 * 1024
"""Requests with more are not looked up: reading them through for it would keep the event loop from its work."""
MOST_TEXTS = 4096
"""Of strings, whose bytes lie apart."""
_EACH_BYTES = 1000
"""What an answer takes beside its bytes: the objects around them."""

Key: TypeAlias = tuple[Hashable, ...]
Place: TypeAlias = tuple[Key, int]
"""A key, and a line: nobody waits in a slower one for another."""


class ResponseCache:
    """The answers of one version in one process. All of it runs on the event loop's thread.

    It stands before a batcher, and takes requests as that does; each gets its own reply, by its own deadline and
    priority. Errors are not kept. Made anew with each version, it never speaks for another.
    """

    def __init__(
        self, batcher: Batcher, size: CacheSize, *, loop: asyncio.AbstractEventLoop, observer: Observer
    ) -> None:
        self._batcher = batcher
        self._loop = loop
        self._tell = observer.cached
        # The batcher has those that wait and run: one that it drops, since nobody wants it any more, is forgotten here.
        self._flights: WeakValueDictionary[Place, _Flight] = WeakValueDictionary()
        self._answers: LRUCache[Key, _Answer] = LRUCache(
            size.bytes or size.entries or 1, getsizeof=(lambda answer: answer.bytes) if size.bytes else None
        )

    def submit(self, request: Request) -> None:
        """Answer a request from here, or let it wait for an equal one, or queue it. Raises what the batcher does."""
        key = _key(request)
        if key is None:
            self._batcher.submit(request)
            return
        found = self._answers.get(key)
        if found is not None:
            self._tell("hit")
            self._loop.call_soon(reply, request, found.outputs)  # later, as a batcher replies
            return
        place = key, request.priority
        flight = self._flights.get(place)
        if flight is not None and not flight.done:
            self._tell("joined")
            flight.members.append(request)
            return
        flight = _Flight(request, self, place)
        self._batcher.submit(flight)
        self._flights[place] = flight
        self._tell("miss")

    def landed(self, flight: _Flight, outcome: Outcome) -> None:
        """Keep the answer of a flight, where it is one."""
        if self._flights.get(flight.place) is flight:
            del self._flights[flight.place]
        if isinstance(outcome, ServingError):
            return
        key = flight.place[0]
        size = _EACH_BYTES + sum(map(_bytes, flight.inputs)) + sum(map(_bytes, outcome))
        if size <= 2 * MOST_BYTES:
            with contextlib.suppress(ValueError):  # it alone is more than may be kept
                self._answers[key] = _Answer(tuple(map(_copied, outcome)), size)

    def expire(self, now: float) -> None:
        """Answer those whose deadline passed while their flight waits, as the batcher does with a request."""
        for flight in list(self._flights.values()):
            if any(member.deadline <= now for member in flight.members) and self._batcher.waits(flight):
                late = [member for member in flight.members if member.deadline <= now]
                flight.members = [member for member in flight.members if member.deadline > now]
                for member in late:
                    reply(member, DeadlineExceeded("the deadline passed while the request waited for its turn"))


class _Answer(NamedTuple):
    outputs: Tensors
    bytes: int
    """Of request and answer."""


class _Flight(Request):
    """Equal requests of one caller on their way to a model: it goes on while one of them is still wanted."""

    __slots__ = ("__weakref__", "_answered", "_cache", "_first", "_sender", "members", "place")

    def __init__(self, first: Request, cache: ResponseCache, place: Place) -> None:
        self.members = [first]
        self._first = first
        self.ran = None
        self.inputs, self.rows, self.priority = first.inputs, first.rows, first.priority
        self.place = place
        self._sender = first.sender
        self._cache = cache
        self._answered = False

    @property
    def sender(self) -> Hashable:
        return self._sender

    @property
    def deadline(self) -> float:  # type: ignore[override]  # that of the last who waits
        return max((member.deadline for member in self.members), default=0.0)

    @property
    def done(self) -> bool:
        return self._answered or all(member.done for member in self.members)

    @done.setter
    def done(self, done: bool) -> None:
        self._answered = done

    def reply(self, outcome: Outcome) -> None:
        self._answered = True  # whoever asks from now on is no member
        self._first.ran, self._first.queued_at = self.ran, self.queued_at  # its stages are known; the others' are not
        self._cache.landed(self, outcome)
        for member in self.members:
            reply(member, outcome)


def _key(request: Request) -> Key | None:
    """Return what two requests with the same answer have in common: caller, shapes and every bit; None: not known."""
    caller, inputs = request.caller, request.inputs
    if caller is None or isinstance(inputs, Overriding) or sum(map(_bytes, inputs)) > MOST_BYTES:
        return None
    parts: list[Hashable] = [caller]
    for array in inputs:
        content = tuple(array.ravel().tolist()) if array.dtype.hasobject else array.tobytes()
        parts += (array.dtype, array.shape, content)
    return tuple(parts)


def _bytes(array: Array) -> int:
    """Return how much an array takes; more than any may, where it is many strings."""
    if not array.dtype.hasobject:
        return array.nbytes
    return sum(map(sys.getsizeof, array.ravel().tolist())) if array.size <= MOST_TEXTS else sys.maxsize


def _copied(array: Array) -> Array:
    """Return an array of its own, for an answer is a view of its whole batch's; that nobody can write to."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy
