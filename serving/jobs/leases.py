"""Who does what: workers claim pieces for a while, and what they did counts only while nobody else has claimed them.

A lease is a row's token and a time by the database's clock. A worker that is late, or whose clock is wrong, finds that
the token is another's, and none of its work counts; clocks only decide how soon a dead worker's piece goes on.

Whoever changes pieces locks their job first. In another order two transactions of PostgreSQL would wait for each other;
and what was read before may have been cancelled, or done by a late worker, when the lock is had.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import delete, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from serving.jobs.tables import ACTIVE, DONE, LEASED, PUBLISH, SCORE, WAITING, Job, Piece, now

LEASE_S = 10.0
MOST_ATTEMPTS = 25
"""Claims of one piece after which its job fails: it may be what ends the workers."""
_LONGEST_WAIT_S = 300.0
_AS_IT_IS = {"synchronize_session": False}  # what a session has read stays as it was read
_JOBS = update(Job).execution_options(**_AS_IT_IS)
_PIECES = update(Piece).execution_options(**_AS_IT_IS)


class LeaseLost(Exception):
    """The piece is somebody else's by now, or its job has ended: what was made of it does not count."""


class Claim(NamedTuple):
    """A piece that is this worker's until its lease ends, and the job as it was then."""

    job: Job
    piece: Piece
    token: int


async def claim(session: AsyncSession, *, running: int, lease_s: float = LEASE_S) -> Claim | None:
    """Give this worker a piece, or None where there is none to do now. The transaction must be one that is alone.

    running: most jobs that take pieces at a time. Of these each key has its first before any has its second, and pieces
    go to the key that has fewest at work.
    """
    turn = func.row_number().over(partition_by=Job.owner, order_by=(Job.created_at, Job.id))
    ranked = select(Job.id, turn.label("turn"), Job.created_at).where(Job.state.in_(ACTIVE)).subquery()
    chosen = select(ranked.c.id).order_by(ranked.c.turn, ranked.c.created_at).limit(running)
    ids = (await session.scalars(chosen)).all()
    if not ids:
        return None
    at_work = (
        select(Job.owner, func.count().label("pieces"))
        .join(Piece, Piece.job_id == Job.id)
        .where(Piece.state == LEASED, Piece.lease_until > now())
        .group_by(Job.owner)
        .subquery()
    )
    other = aliased(Piece)
    ready = (
        select(Job, Piece)
        .join(Piece, Piece.job_id == Job.id)
        .join(at_work, at_work.c.owner == Job.owner, isouter=True)
        .where(
            Job.id.in_(ids),
            Piece.state != DONE,
            Piece.lease_until <= now(),
            or_(
                Piece.kind != PUBLISH,
                ~exists().where(other.job_id == Job.id, other.kind != PUBLISH, other.state != DONE),
            ),
        )
        .order_by(func.coalesce(at_work.c.pieces, 0), Job.created_at, Job.id, Piece.number)
        .limit(1)
    )
    found = (await session.execute(ready)).first()
    if found is None:
        return None
    job, piece = found
    if not await _hold(session, job.id):
        return None
    if piece.token >= MOST_ATTEMPTS:
        why = job.error.removeprefix("waits: ") or "each worker that began a certain part of it died, or stopped"
        await end(session, job.id, "failed", f"given up after {MOST_ATTEMPTS} attempts: {why}")
        return None
    token = piece.token + 1
    leased = {"token": token, "state": LEASED, "lease_until": now() + lease_s}
    as_read = (Piece.job_id == job.id, Piece.number == piece.number, Piece.token == piece.token, Piece.state != DONE)
    if await session.scalar(_PIECES.where(*as_read).values(**leased).returning(Piece.number)) is None:
        return None
    # What runs and takes no pieces now, since others come first, waits in the queue again.
    paused = ~exists().where(Piece.job_id == Job.id, Piece.state == LEASED, Piece.lease_until > now())
    await session.execute(_JOBS.where(Job.state == "running", Job.id.not_in(ids), paused).values(state="queued"))
    started = {"state": "running", "started_at": func.coalesce(Job.started_at, now())}
    await session.execute(_JOBS.where(Job.id == job.id).values(**started))
    return Claim(job, piece, token)


async def renew(session: AsyncSession, claimed: Claim, *, lease_s: float = LEASE_S) -> None:
    """Keep a piece for longer. Raises LeaseLost."""
    await _change(session, claimed, lease_until=now() + lease_s)


async def commit_scored(session: AsyncSession, claimed: Claim, *, good: int, bad: int) -> None:
    """Have a piece count as done, its rows with it. Raises LeaseLost; where it is done already, nothing changes."""
    try:
        await _change(session, claimed, state=DONE, bad=bad)
    except LeaseLost:
        piece = await session.get(Piece, (claimed.job.id, claimed.piece.number))
        if piece is None or (piece.state, piece.token) != (DONE, claimed.token):
            raise
        return  # it was committed before, and the confirmation got lost: its rows count once
    done = claimed.piece.end - claimed.piece.start
    changed = {"rows_good": Job.rows_good + good, "rows_bad": Job.rows_bad + bad, "done": Job.done + done, "error": ""}
    await session.execute(_JOBS.where(Job.id == claimed.job.id).values(**changed))


async def commit_split(
    session: AsyncSession, claimed: Claim, cuts: Sequence[tuple[int, int]], *, size: int, last: bool
) -> None:
    """Note where the input was cut: what lies between two cuts is a piece, and behind the last one it goes on.

    cuts: offsets, each with the number of its line. size: of the whole input. last: it ends there, so that there is a
    result once all pieces are done. Raises LeaseLost.
    """
    job_id, (start, line) = claimed.job.id, cuts[-1]
    await _change(session, claimed, state=DONE if last else LEASED, start=start, line=line)
    await session.execute(_JOBS.where(Job.id == job_id).values(size=size))
    highest = await session.scalar(select(func.max(Piece.number)).where(Piece.job_id == job_id)) or 0
    pieces = [
        Piece(job_id=job_id, number=highest + i, kind=SCORE, start=begin, line=line, end=end)
        for i, ((begin, line), (end, _)) in enumerate(pairwise(cuts), 1)
    ]
    if last:
        pieces.append(Piece(job_id=job_id, number=highest + len(cuts), kind=PUBLISH))
    session.add_all(pieces)


async def scored(session: AsyncSession, job_id: str) -> Sequence[Piece]:
    """Return the pieces whose parts make the result, in order."""
    its = select(Piece).where(Piece.job_id == job_id, Piece.kind == SCORE)
    return (await session.scalars(its.order_by(Piece.number))).all()


async def commit_published(session: AsyncSession, claimed: Claim, *, result_bytes: int) -> None:
    """Have the job count as succeeded. Raises LeaseLost, also where it does so already."""
    await _change(session, claimed, state=DONE)
    await session.execute(_JOBS.where(Job.id == claimed.job.id).values(result_bytes=result_bytes))
    await end(session, claimed.job.id, "succeeded")


async def give_back(session: AsyncSession, claimed: Claim, why: str = "") -> None:
    """Let somebody else have a piece that could not be done now: at once, or after a while where it says why."""
    wait = min(_LONGEST_WAIT_S, 0.5 * 2.0 ** min(claimed.token, 10)) if why else 0.0
    await _change(session, claimed, state=WAITING, lease_until=now() + wait if why else 0.0)
    if why:
        await session.execute(_JOBS.where(Job.id == claimed.job.id).values(error=f"waits: {why}"))


async def fail(session: AsyncSession, claimed: Claim, why: str) -> None:
    """End the job of a piece that can't be done however often it is tried. Raises LeaseLost."""
    await _change(session, claimed, state=DONE)
    await end(session, claimed.job.id, "failed", why)


async def end(session: AsyncSession, job_id: str, state: str, error: str = "") -> bool:
    """End a job that is active, and forget its pieces; return whether it was."""
    # An error names columns, of which PostgreSQL keeps no NUL.
    ended = {"state": state, "error": error.replace("\0", "\ufffd"), "finished_at": now()}
    active = _JOBS.where(Job.id == job_id, Job.state.in_(ACTIVE)).values(**ended)
    if await session.scalar(active.returning(Job.id)) is None:
        return False
    await session.execute(delete(Piece).where(Piece.job_id == job_id))
    return True


async def _hold(session: AsyncSession, job_id: str) -> bool:
    """Lock a job until the transaction ends; return whether it is active."""
    active = select(Job.id).where(Job.id == job_id, Job.state.in_(ACTIVE)).with_for_update()
    return await session.scalar(active) is not None


async def _change(session: AsyncSession, claimed: Claim, **values: Any) -> None:
    # The token is the fence: without it a worker that was taken for dead would commit over the one in its place.
    mine = (Piece.job_id == claimed.job.id, Piece.number == claimed.piece.number, Piece.token == claimed.token)
    changed = _PIECES.where(*mine, Piece.state == LEASED).values(**values).returning(Piece.number)
    if not await _hold(session, claimed.job.id) or await session.scalar(changed) is None:
        raise LeaseLost
