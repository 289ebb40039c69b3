"""What goes: what only active jobs need, results that are old or too many, and files of which there is no job."""

from __future__ import annotations

import logging
import random

from sqlalchemy import and_, delete, func, or_, select, update

from serving.jobs.database import Database
from serving.jobs.results import Results
from serving.jobs.tables import ENDED, Job, now

log = logging.getLogger("serving.jobs")

_AT_A_TIME = 50
_MOST_ASKED = 1000


async def remove(database: Database, results: Results, job_id: str) -> None:
    """Remove a job and its files; files first, so that what a crash leaves is still known. Raises NotReady."""
    await results.remove(job_id)
    await database.execute(delete(Job).where(Job.id == job_id))


async def tidy(database: Database, results: Results) -> None:
    """Remove inputs that were sent, and parts, of jobs that have ended. Raises NotReady."""
    ended = select(Job.id).where(Job.state.in_(ENDED), ~Job.tidied).limit(_AT_A_TIME)
    for job_id in await database.execute(ended):
        for name in ("input", "parts"):
            await results.remove(f"{job_id}/{name}")
        await database.execute(update(Job).where(Job.id == job_id).values(tidied=True))


async def expire(database: Database, results: Results, *, keep_s: float, keep_bytes: int) -> None:
    """Remove jobs that ended more than `keep_s` ago, and the oldest whose results are over `keep_bytes` together.

    The newest stays, however large. Raises NotReady.
    """
    newest = (Job.finished_at.desc(), Job.id)
    so_far = func.sum(Job.result_bytes).over(order_by=newest, rows=(None, 0)).label("so_far")
    place = func.row_number().over(order_by=newest).label("place")
    ended = select(Job.id, Job.finished_at, so_far, place).where(Job.state.in_(ENDED)).subquery()
    large = and_(ended.c.so_far > keep_bytes, ended.c.place > 1)
    old = select(ended.c.id).where(or_(ended.c.finished_at < now() - keep_s, large)).limit(_AT_A_TIME)
    for job_id in await database.execute(old):
        log.info("job %s is removed: it is old, or results are too many", job_id)
        await remove(database, results, job_id)


async def sweep(database: Database, results: Results) -> None:
    """Remove files of which there is no job: who wrote them was taken for dead, or died. Raises NotReady."""
    old = sorted(await results.old())
    some = random.sample(old, min(len(old), _MOST_ASKED))
    known = await database.execute(select(Job.id).where(Job.id.in_(some)))
    for job_id in set(some) - set(known):
        await results.remove(job_id)
