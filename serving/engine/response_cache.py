"""Answers that are given again: to the same caller, for the very same tensors, by the same version.

Callers share nothing: how long an answer takes would tell one what another has asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Hashable
from typing import NamedTuple, TypeAlias

from cachetools import LRUCache

from serving.engine.batcher import Batcher, Observer
from serving.engine.limits import CacheSize
from serving.engine.request import Outcome, Request
from serving.errors import ServingError
from serving.tensors import Array, Overriding, Tensors

MOST_BYTES = 1024 * 1024
"""Requests with more are not looked up: reading them through for it would keep the event loop from its work."""
MOST_TEXTS = 4096
"""Of strings, whose bytes lie apart."""
_EACH_BYTES = 1000
"""What an answer takes beside its bytes: the objects around them."""

Key: TypeAlias = tuple[Hashable, ...]


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
        if size.bytes is not None:
            self._answers: LRUCache[Key, _Answer] = LRUCache(size.bytes, getsizeof=lambda answer: answer.bytes)
        else:
            self._answers = LRUCache(size.entries or 1)

    def submit(self, request: Request) -> None:
        """Answer a request from here, or queue it. Raises what the batcher does."""
        key = _key(request)
        found = None if key is None else self._answers.get(key)
        if found is not None:
            self._tell("hit")
            self._loop.call_soon(_give, request, found.outputs)  # later, as a batcher replies
        elif key is None:
            self._batcher.submit(request)
        else:
            self._batcher.submit(_Miss(request, key, self))
            self._tell("miss")

    def keep(self, key: Key, inputs: Tensors, outcome: Outcome) -> None:
        """Keep an answer, where it is one."""
        if isinstance(outcome, ServingError):
            return
        size = _EACH_BYTES + sum(map(_bytes, inputs)) + sum(map(_bytes, outcome))
        if size <= 2 * MOST_BYTES:
            with contextlib.suppress(ValueError):  # it alone is more than may be kept
                self._answers[key] = _Answer(tuple(map(_copied, outcome)), size)


class _Answer(NamedTuple):
    outputs: Tensors
    bytes: int
    """Of request and answer."""


class _Miss(Request):
    """A request on its way to the model, whose answer will be kept."""

    __slots__ = ("_cache", "_key", "_request")

    def __init__(self, request: Request, key: Key, cache: ResponseCache) -> None:
        self.inputs, self.rows, self.priority = request.inputs, request.rows, request.priority
        self.deadline = request.deadline
        self._request, self._key, self._cache = request, key, cache

    @property
    def sender(self) -> Hashable:
        return self._request.sender

    @property
    def done(self) -> bool:
        return self._request.done

    @done.setter
    def done(self, done: bool) -> None:
        self._request.done = done

    def reply(self, outcome: Outcome) -> None:
        self._cache.keep(self._key, self.inputs, outcome)
        self._request.reply(outcome)


def _give(request: Request, outcome: Outcome) -> None:
    """Answer one request, unless its caller has left."""
    if not request.done:
        request.reply(outcome)


def _key(request: Request) -> Key | None:
    """Return what two requests with the same answer have in common: caller, shapes and every bit; None: not known."""
    caller, inputs = request.caller, request.inputs
    if caller is None or isinstance(inputs, Overriding):
        return None
    parts: list[Hashable] = [caller]
    left = MOST_BYTES
    for array in inputs:
        content: Hashable
        if array.dtype.hasobject:
            if array.size > MOST_TEXTS:
                return None
            texts = array.ravel().tolist()
            if not all(type(text) is str for text in texts):
                return None
            left -= sum(map(len, texts))
            content = tuple(texts)
        else:
            left -= array.nbytes
            content = array.tobytes() if left >= 0 else None
        if left < 0:
            return None
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
