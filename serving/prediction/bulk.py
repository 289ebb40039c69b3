"""Rows in bulk through one version of a model: behind all others, and a short piece at a time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import NamedTuple

from serving.access.principal import ANYONE, Principal
from serving.bulk.batch import BadRow, Batch, Found, Lines, gathered
from serving.engine.request import LOW, Outcome, Request, Run
from serving.errors import DeadlineExceeded, InferenceFailed, QueueFull, RateLimited, ServingError
from serving.metrics.recorders import outcome_of
from serving.prediction.authorization import authorize
from serving.prediction.endpoint import Endpoint
from serving.prediction.request_options import RequestOptions
from serving.protocols.headers import Headers, header
from serving.tensors import Tensors

PROTOCOL = "bulk"
"""What it is counted as."""
PIECE_S = 0.0003
"""Seconds that a piece should run beside live requests: each may wait for one."""
ALONE_S = 0.004
"""As PIECE_S, where none came of late: the hop to the model's thread and back costs a tenth of a millisecond."""
REST = 12.0
"""For how many times as long as a piece ran it rests beside live requests: they have the processor meanwhile."""
_OF_LATE_S = 1.0
_FIRST_ROWS = 16
_COME_BACK_S = 0.02


class Scored(NamedTuple):
    """What became of some rows; outputs: of the good ones, None where there is none. See `AnswerForm.written`."""

    outputs: Tensors | None
    lines: Lines
    bad: tuple[BadRow, ...]


class Piece(Request):
    """Some rows in the last line of the queue, whose outcome a coroutine waits for."""

    __slots__ = ("outcome",)

    def __init__(self, inputs: Tensors, rows: int, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        self.inputs = inputs
        self.rows = rows
        self.deadline = deadline
        self.priority = LOW
        self.done = False
        self.ran = None
        self.outcome: asyncio.Future[Outcome] = loop.create_future()

    def reply(self, outcome: Outcome) -> None:  # noqa: D102
        self.done = True
        if not self.outcome.done():
            self.outcome.set_result(outcome)


class BulkPrediction:
    """The rows of one caller, whatever their number, and the version that answers them all.

    headers: who asks, and whom a canary goes by. options: `timeout` bounds all of it; without one each piece has the
    model's deadline to find its place. Raises Unauthenticated, Forbidden, RateLimited.
    """

    def __init__(self, endpoint: Endpoint, headers: Headers, options: RequestOptions) -> None:
        self.caller: Principal = ANYONE
        if endpoint.access is not None:
            self.caller = authorize(endpoint.access, headers, "predict", endpoint.model.limits.callers)
            if self.caller.limit is not None:
                self.caller.limit.take_request()
        if endpoint.canary is not None:
            selection, stable, candidate = endpoint.canary
            key = header(headers, selection.header) if selection.header is not None else None
            # A feature would send one row here and another there.
            endpoint = candidate if selection.feature is None and selection.takes(key) else stable
        self.endpoint = endpoint
        self.model = endpoint.model
        self.good = self.bad = 0
        self._until = float("inf") if options.timeout is None else time.monotonic() + options.timeout
        self._row_seconds = PIECE_S / _FIRST_ROWS
        signature = self.model.signature
        # Rows that may see each other are answered as if each was sent alone.
        self._most = 1
        if signature.batch == "one" or self.model.batched:
            self._most = max(1, self.model.limits.max_queued_rows // 2)

    async def run(self, batch: Batch) -> list[Scored]:
        """Answer the rows of a batch, in order; a row that the model refuses is a bad one.

        Raises DeadlineExceeded where the time is over, or live requests leave no room; NotReady.
        """
        found: list[Found] = list(batch.bad)
        running: deque[asyncio.Task[list[Found]]] = deque()
        at = 0
        try:
            while at < batch.rows or running:
                # While one runs the next one waits already, unless there is somebody to rest for.
                while at < batch.rows and len(running) < (1 if self.beside_live() else 2):
                    piece = slice(at, at + self._piece_rows())
                    inputs = tuple([array[piece] for array in batch.inputs or ()])
                    running.append(asyncio.create_task(self._answers(inputs, batch.lines[piece])))
                    at = piece.stop
                found += await running.popleft()
        finally:
            for task in running:
                task.cancel()
        good = sum([len(each[1]) for each in found if not isinstance(each, BadRow)])
        bad = sum([isinstance(each, BadRow) for each in found])
        self.good += good
        self.bad += bad
        if self.endpoint.metrics is not None:
            self.endpoint.metrics.bulk_rows(good, bad)
        found.sort(key=lambda each: each.line if isinstance(each, BadRow) else int(each[1][0]))
        together = gathered(found, at_once=self.model.signature.batch != "none")
        return [Scored(each.inputs, each.lines, each.bad) for each in together]

    def ended(self, error: ServingError | None, *, gone: bool = False) -> None:
        """Count how it ended. gone: the caller left before."""
        if self.endpoint.metrics is not None:
            outcome = "gone" if gone else "ok" if error is None else outcome_of(error)[0]
            self.endpoint.metrics.bulk_ended(PROTOCOL, outcome)

    async def _answers(self, inputs: Tensors, lines: Lines) -> list[Found]:
        """Have some rows run; of those that the model refuses, find out by halves which it does."""
        outcome = await self._outcome(inputs, len(lines))
        if not isinstance(outcome, InferenceFailed):
            if isinstance(outcome, ServingError):
                raise outcome
            return [(outcome, lines)]
        if len(lines) == 1:
            return [BadRow(int(lines[0]), "", outcome.message)]
        half = len(lines) // 2
        first = await self._answers(tuple([array[:half] for array in inputs]), lines[:half])
        return first + await self._answers(tuple([array[half:] for array in inputs]), lines[half:])

    async def _outcome(self, inputs: Tensors, rows: int) -> Outcome:
        """Wait for room, for rows in the caller's rate, and for the answer."""
        batcher = self.model.batcher
        await self._within_rate(rows)
        patience = time.monotonic() + self.endpoint.deadline
        while True:
            now = time.monotonic()
            if now >= min(patience, self._until):
                what = "the time that it may take is over" if now >= self._until else "other requests leave no room"
                return DeadlineExceeded(f"after {self.good} good rows {what}")
            piece = Piece(inputs, rows, min(now + self.endpoint.deadline, self._until), self.endpoint.loop)
            try:
                batcher.submit(piece)
                outcome = await piece.outcome
            except QueueFull as full:
                outcome = full
            finally:
                piece.done = True
            if piece.ran is not None:
                self._learn(piece.ran)
            if not isinstance(outcome, QueueFull):
                if piece.ran is not None and self.beside_live():
                    await asyncio.sleep(REST * (piece.ran.ended - piece.ran.started))
                return outcome
            await asyncio.sleep(_COME_BACK_S)

    async def _within_rate(self, rows: int) -> None:
        while self.caller.limit is not None:
            try:
                self.caller.limit.take_rows(rows)
                return
            except RateLimited as error:
                await asyncio.sleep(min(error.retry_after, max(0.0, self._until - time.monotonic())))
                if time.monotonic() >= self._until:
                    return

    def _learn(self, ran: Run) -> None:
        self._row_seconds += 0.3 * ((ran.ended - ran.started) / max(1, ran.rows) - self._row_seconds)

    def beside_live(self) -> bool:
        """Tell whether the model has had others' requests of late."""
        return time.monotonic() - self.model.batcher.live_at < _OF_LATE_S

    def _piece_rows(self) -> int:
        seconds = PIECE_S if self.beside_live() else ALONE_S
        return max(1, min(self._most, int(seconds / max(self._row_seconds, 1e-9))))
