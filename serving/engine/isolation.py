"""Finds the requests that make a model fail: only they are refused, and nobody for what another sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from serving.engine.request import Outcome, Request
from serving.errors import ServingError

_SUSPICION_S = 1.0
"""Seconds after a request that failed until its sender is a stranger like others again."""
_MOST_SUSPECTS = 1024


class Isolation:
    """Runs the batches of one thread. `run` takes requests together, and raises ServingError where any makes it fail.

    A batch that fails is halved until who fails has failed alone. The requests of a sender that sent such a one in the
    last second run alone at once: where many fail, hardly any healthy row then runs twice, and no stranger pays for it.
    """

    def __init__(self, run: Callable[[list[Request]], list[Outcome]]) -> None:
        self._run = run
        self._suspected_until: dict[Hashable, float] = {}  # monotonic seconds, by sender

    def outcomes(self, requests: list[Request]) -> list[Outcome]:
        """Run a batch, and return what became of each request, in order."""
        if not self._suspected_until:
            return self._halved(requests)
        now, until = time.monotonic(), self._suspected_until
        strangers = [request for request in requests if until.get(request.sender, 0.0) <= now]
        if len(strangers) == len(requests):
            if max(until.values()) <= now:
                until.clear()
            return self._halved(requests)
        found = dict(zip(strangers, self._halved(strangers), strict=True)) if strangers else {}
        return [found[request] if request in found else self._halved([request])[0] for request in requests]

    def _halved(self, requests: list[Request]) -> list[Outcome]:
        try:
            return self._run(requests)
        except ServingError as error:
            return self._culprits_of(requests, error)

    def _culprits_of(self, requests: list[Request], error: ServingError) -> list[Outcome]:
        """Find who of `requests`, which failed together with `error`, fails alone."""
        if len(requests) == 1:
            self._suspect(requests[0])
            return [error.bare()]
        middle = len(requests) // 2
        first, second = requests[:middle], requests[middle:]
        try:
            passed = self._run(first)
        except ServingError as first_error:
            return self._culprits_of(first, first_error) + self._halved(second)
        # The first half is innocent, so the second would fail: it is not run whole to learn that. One that is alone is.
        return passed + (self._halved(second) if len(second) == 1 else self._culprits_of(second, error))

    def _suspect(self, request: Request) -> None:
        if request.sender is None:
            return
        if len(self._suspected_until) >= _MOST_SUSPECTS:
            self._suspected_until.clear()
        self._suspected_until[request.sender] = time.monotonic() + _SUSPICION_S
