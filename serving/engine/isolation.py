"""Finds the requests that make a model fail: only they are refused, and the others cost as little more as can be.

A batch that fails is run again in groups. Which groups are cheapest depends on what runs of so many rows cost, those
that pass and those that fail, and on how many requests fail: all of it is learnt while some do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from serving.engine.admission import Pace
from serving.engine.request import Outcome, Request
from serving.errors import ServingError

_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Into how many groups a batch is thought to be divided."""
_MEMORY = 256
"""Requests that tell what share of them fails."""
_LEAST = 0.002
"""Share of failing requests below which whole batches run again, and no clock is read."""
_LOOK = 8
"""Of so many batches one is timed, and of the first all: clocks cost a tenth of a small run."""
_SUSPICION_S = 1.0
"""Seconds after a request that failed until its sender is a stranger like others again."""
_MOST_SUSPECTS = 1024
_WORTH = 0.9
"""Groups must cost so much less than single runs: to look for the culprits of one takes steps of ours, too."""


class _Crowd:
    """Requests of one kind. failing: what share of them fails. planned: for which their groups are made."""

    __slots__ = ("failing", "planned")

    def __init__(self) -> None:
        self.failing = self.planned = 0.0

    def learn(self, number: int, failed: int) -> None:
        if number:
            self.failing += (failed / number - self.failing) * number / (number + _MEMORY)

    def plan(self) -> None:
        self.planned = self.failing if self.failing >= _LEAST else 0.0


class Isolation:
    """Runs the batches of one thread. `run` takes requests together, and raises ServingError where any makes it fail.

    Nobody is refused for what another sent: who fails has failed alone. Nor does anybody run beside a sender whose
    requests failed of late, while others are there.
    """

    def __init__(self, run: Callable[[list[Request]], list[Outcome]]) -> None:
        self._run = run
        self._failing = False  # of late
        self._all, self._strangers, self._suspects = _Crowd(), _Crowd(), _Crowd()
        self._until: dict[Hashable, float] = {}  # by sender: monotonic seconds until which it is suspected
        self._passed, self._failed = Pace(), Pace()  # what runs cost
        self._rows = 1.0  # of a request
        self._sizes: dict[tuple[int, float], int] = {}
        self._batches = 0

    def outcomes(self, requests: list[Request]) -> list[Outcome]:
        """Run a batch, and return what became of each request."""
        if self._failing:
            return self._looked_for(requests)
        try:
            return self._run(requests)
        except ServingError as error:
            search = self._search()
            search.failed(requests, 0.0, error)
            self._strangers.learn(len(requests), len(search.culprits))
            self._learn(search)
            return [search.found[request] for request in requests]

    def _looked_for(self, requests: list[Request]) -> list[Outcome]:
        """Run requests of which some are thought to fail."""
        strangers: list[Request] = requests
        suspects: list[Request] = []
        if self._until:
            now, until = time.monotonic(), self._until
            strangers = []
            for request in requests:
                (suspects if until.get(request.sender, 0.0) > now else strangers).append(request)
        search = self._search()
        if strangers:
            search.groups(strangers, self._strangers.planned)
        caught = len(search.culprits)
        if suspects:
            search.groups(suspects, self._suspects.planned)
        self._strangers.learn(len(strangers), caught)
        self._suspects.learn(len(suspects), len(search.culprits) - caught)
        self._learn(search)
        return [search.found[request] for request in requests]

    def _search(self) -> _Search:
        timed = self._batches < _LOOK or self._batches % _LOOK == 0
        self._batches += 1
        return _Search(self._run, self._size, timed=timed)

    def _size(self, most: int, share: float) -> int:
        """Return how many requests run together, `most` at most, where `share` of them fail."""
        size = self._sizes.get((most, share))
        if size is None:
            size = self._sizes[most, share] = cheapest(most, share, self._rows, self._passed, self._failed)
        return size

    def _learn(self, search: _Search) -> None:
        """Learn whether requests fail, whose they are, and, of a batch that was timed, what runs cost."""
        failed = len(search.culprits)
        self._all.learn(len(search.found), failed)
        self._failing = failed > 0 or self._all.failing >= _LEAST
        if not self._failing:
            self._all, self._strangers, self._suspects = _Crowd(), _Crowd(), _Crowd()
            self._until.clear()
            self._batches = 0
            return
        if failed:
            self._suspect(search.culprits)
        if search.timed:
            for pace, seconds_of in ((self._passed, search.passed_in), (self._failed, search.failed_in)):
                for rows, seconds in seconds_of.items():
                    pace.learn(rows, sum(seconds) / len(seconds))
            self._rows = sum(request.rows for request in search.found) / len(search.found)
            self._strangers.plan()
            self._suspects.plan()
            self._sizes.clear()

    def _suspect(self, culprits: list[Request]) -> None:
        until = time.monotonic() + _SUSPICION_S
        for request in culprits:
            if request.sender is not None:
                self._until[request.sender] = until
        if len(self._until) > _MOST_SUSPECTS:
            self._until.clear()


class _Search:
    """One batch of which some requests fail. found: what became of each. culprits: those that failed, alone.

    passed_in, failed_in: processor seconds of the runs, by their rows. Wall time would count waiting for the
    interpreter.
    """

    __slots__ = ("_size", "_together", "culprits", "failed_in", "found", "passed_in", "timed")

    def __init__(
        self, run: Callable[[list[Request]], list[Outcome]], size: Callable[[int, float], int], *, timed: bool
    ) -> None:
        self._together = run
        self._size = size
        self.timed = timed
        self.found: dict[Request, Outcome] = {}
        self.culprits: list[Request] = []
        self.passed_in: dict[int, list[float]] = {}
        self.failed_in: dict[int, list[float]] = {}

    def groups(self, requests: list[Request], share: float) -> None:
        """Run requests of which `share` will fail, in the groups that cost least."""
        size = self._size(len(requests), share) if share else len(requests)
        if size == 1 and not self.timed:
            self._one_by_one(requests)
            return
        at = 0
        if self.timed and 2 * size < len(requests):
            at = 2 * size  # another size once in a while: of what never runs nobody knows what it costs
            self._run(requests[:at], share)
        for start in range(at, len(requests), size):
            self._run(requests[start : start + size], share)

    def failed(self, requests: list[Request], share: float, error: ServingError) -> None:
        """Run those again that failed together with `error`, in groups of which `share` would fail by itself."""
        number = len(requests)
        if number == 1:
            self.found[requests[0]] = error.bare()
            self.culprits.append(requests[0])
            return
        share = max(share, _LEAST)
        share /= 1 - (1 - share) ** number  # at least one does
        size = self._size(number - 1, share)
        if size == 1 and not self.timed:
            self._one_by_one(requests)
            return
        passing = True
        for start in range(0, number, size):
            group = requests[start : start + size]
            if passing and start + size >= number and len(group) > 1:
                self.failed(group, share, error)  # all others passed: it is in here
            else:
                passing = self._run(group, share) and passing

    def _one_by_one(self, requests: list[Request]) -> None:
        """Do what `_run` does for each of them, in fewer steps: this is what small models and bad days come down to."""
        found, together = self.found, self._together
        for request in requests:
            try:
                found[request] = together([request])[0]
            except ServingError as error:
                found[request] = error.bare()
                self.culprits.append(request)

    def _run(self, requests: list[Request], share: float) -> bool:
        began = time.thread_time() if self.timed else 0.0
        try:
            outcomes = self._together(requests)
        except ServingError as error:
            if self.timed:
                _note(self.failed_in, requests, began)
            self.failed(requests, share, error)
            return False
        if self.timed:
            _note(self.passed_in, requests, began)
        if len(requests) == 1:
            self.found[requests[0]] = outcomes[0]
        else:
            self.found.update(zip(requests, outcomes, strict=True))
        return True


def _note(seconds_of: dict[int, list[float]], requests: list[Request], began: float) -> None:
    spent = time.thread_time() - began
    seconds_of.setdefault(sum(request.rows for request in requests), []).append(spent)


def cheapest(most: int, share: float, rows: float, passed: Pace, failed: Pace) -> int:
    """Return the size of the groups, `most` at most, in which a request costs least.

    share: of requests that fail, each by itself. rows: of a request. passed, failed: what runs cost. A group that fails
    is thought to be run one by one; half of `most` while nothing is known.
    """
    if not passed.seconds(1):
        return (most + 1) // 2
    alone = passed.seconds(rows)
    one = (1 - share) * alone + share * failed.seconds(rows)
    best, least = 1, _WORTH * one
    for parts in _PARTS:
        size = -(-most // parts)
        if size == 1:
            break
        passes = (1 - share) ** size
        again = size * (one - passes * alone)
        cost = passes * passed.seconds(size * rows) + (1 - passes) * failed.seconds(size * rows) + again
        if cost / size < least:
            best, least = size, cost / size
    return best
