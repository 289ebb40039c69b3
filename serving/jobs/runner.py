"""A worker's background task: claims pieces, has them done, and keeps house. Whatever happens to it, requests go on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import partial

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from serving.errors import DeadlineExceeded, NotReady, QueueFull, ServingError
from serving.jobs import leases, retention
from serving.jobs.database import Database
from serving.jobs.leases import LEASE_S, Claim, LeaseLost
from serving.jobs.pieces import Pieces
from serving.jobs.results import Results
from serving.jobs.tables import ACTIVE, STATES, Job, now
from serving.metrics.metrics import Metrics
from serving.prediction.spans import Described
from serving.prediction.tracing import Tracing

log = logging.getLogger("serving.jobs")

_POLL_S = 1.0
_MOST_BACK_OFF_S = 30.0
_HOUSE_S, _SWEEP_S = 10.0, 6 * 3600.0
_PASSING = (NotReady, QueueFull, DeadlineExceeded)
_BY_STATE = select(Job.state, func.count().label("number")).group_by(Job.state)
FAULT = "the server failed on a part of it; its log has the reason"


@dataclass
class Runner:
    """Claims pieces one after the other, and has `pieces` do them.

    asked: is set when this process got a new job. running, lease_s: see `leases`. keep_s, keep_bytes: see `retention`.
    """

    database: Database
    results: Results
    pieces: Pieces
    _: KW_ONLY
    asked: asyncio.Event
    metrics: InitVar[Metrics | None]
    running: int
    keep_s: float
    keep_bytes: int
    lease_s: float = LEASE_S
    tracing: Tracing | None = None

    def __post_init__(self, metrics: Metrics | None) -> None:
        self._states = dict.fromkeys(STATES, 0)
        self._oldest_s = 0.0
        self._swept = time.monotonic()
        self._ended = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        if metrics is not None:
            for state in STATES:
                metrics.follow("serving_jobs", partial(self._states.__getitem__, state), state)
            for outcome in ("good", "bad"):
                metrics.follow("serving_job_rows", partial(self.pieces.rows.__getitem__, outcome), outcome)
            metrics.follow("serving_jobs_oldest_seconds", lambda: self._oldest_s)
            metrics.follow("serving_jobs_database_up", lambda: float(self.database.up or False))

    async def __aenter__(self) -> None:
        """Begin to work in the background."""
        self._tasks = [asyncio.create_task(self._claim()), asyncio.create_task(self._keep_house())]

    async def __aexit__(self, *_: object) -> None:
        """Give back the piece at hand, and close the database."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.database.close()

    async def _claim(self) -> None:
        claim = partial(leases.claim, running=self.running, lease_s=self.lease_s)
        failures = 0
        while True:
            self.asked.clear()
            claimed, wait = None, _POLL_S
            try:
                claimed = await self.database.run(claim, alone=True)
                failures = 0
            except NotReady as error:
                failures += 1
                wait = min(_MOST_BACK_OFF_S, 0.5 * 2 ** min(failures, 10)) * random.uniform(0.5, 1)  # noqa: S311
                if failures == 1:
                    log.warning("jobs wait: %s", error.message)
            except Exception:  # jobs must not end for a fault of ours
                log.exception("no piece could be claimed")
            if claimed is not None:
                await self._do(claimed)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self.asked.wait()

    async def _do(self, claimed: Claim) -> None:
        """Have a piece done, as long as it is this worker's, and say what became of it."""
        doing = asyncio.ensure_future(self.pieces.do(claimed))
        holding = asyncio.create_task(self._hold(claimed))
        began, done = time.monotonic(), False
        try:
            await asyncio.wait((doing, holding), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                holding.result()  # raises LeaseLost
            await doing
            done = True
        except LeaseLost:
            log.info("a piece of job %s is no longer this worker's", claimed.job.id)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._note(claimed, None)
            raise
        except ServingError as error:
            await self._note(claimed, error)
        except Exception:
            log.exception("a piece of job %s could not be done", claimed.job.id)
            await self._note(claimed, NotReady(FAULT))
        finally:
            self._trace(claimed, began, done=done)
            self._ended.set()
            for task in (doing, holding):
                task.cancel()
            await asyncio.gather(doing, holding, return_exceptions=True)

    def _trace(self, claimed: Claim, began: float, *, done: bool) -> None:
        """Make a piece a span of the trace that its job was asked for in."""
        job, piece = claimed.job, claimed.piece
        if self.tracing is None or job.traceparent is None:
            return
        context = self.tracing.sampled([(b"traceparent", job.traceparent.encode())])
        if context is not None:
            facts: dict[str, str | int] = {
                "job.id": job.id,
                "job.piece": piece.number,
                "model.name": job.model,
                "model.version": job.version,
            }
            made = Described(
                f"job {piece.kind}", {f"serving.{fact}": value for fact, value in facts.items()}, not done, "CONSUMER"
            )
            self.tracing.record(context, lambda: made, began=began, ended=time.monotonic())

    async def _hold(self, claimed: Claim) -> None:
        """Renew the lease for as long as it takes. Raises LeaseLost."""
        while True:
            await asyncio.sleep(self.lease_s / 3)
            with contextlib.suppress(NotReady):  # who commits will see whose it is
                await self.database.run(partial(leases.renew, claimed=claimed, lease_s=self.lease_s))

    async def _note(self, claimed: Claim, error: ServingError | None) -> None:
        """Give a piece back, or fail its job."""
        change = partial(leases.give_back, claimed=claimed)
        if isinstance(error, _PASSING):
            log.warning("job %s waits: %s", claimed.job.id, error.message)
            change = partial(leases.give_back, claimed=claimed, why=error.message)
        elif error is not None:
            more = [f"{detail.path}: {detail.message}" for detail in error.details[1:]]
            why = "; ".join([error.message, *more])
            log.warning("job %s failed: %s", claimed.job.id, why)
            change = partial(leases.fail, claimed=claimed, why=why)
        try:
            await self.database.run(change)
        except LeaseLost:
            pass
        except NotReady as away:  # the lease ends by itself
            log.warning("jobs wait: %s", away.message)

    async def _keep_house(self) -> None:
        while True:
            try:
                await self._count()
                await retention.tidy(self.database, self.results)
                await retention.expire(self.database, self.results, keep_s=self.keep_s, keep_bytes=self.keep_bytes)
                if time.monotonic() - self._swept > _SWEEP_S:
                    self._swept = time.monotonic()
                    await retention.sweep(self.database, self.results)
            except NotReady as error:
                log.debug("jobs are not tidied: %s", error.message)
            except Exception:
                log.exception("jobs could not be tidied")
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HOUSE_S):
                    await self._ended.wait()
            self._ended.clear()

    async def _count(self) -> None:
        async def counted(session: AsyncSession) -> tuple[dict[str, int], float]:
            states = {row.state: row.number for row in await session.execute(_BY_STATE)}
            oldest = await session.scalar(select(now() - func.min(Job.created_at)).where(Job.state.in_(ACTIVE)))
            return states, max(0.0, oldest or 0.0)

        states, self._oldest_s = await self.database.run(counted)
        self._states.update({state: states.get(state, 0) for state in STATES})
