"""Leases on databases of both kinds: who has a piece, whose turn it is, and that late workers change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text

from serving.jobs import leases, retention
from serving.jobs.database import Database
from serving.jobs.leases import Claim, LeaseLost
from serving.jobs.results import Results
from serving.jobs.tables import PUBLISH, SCORE, Job, Piece


@asynccontextmanager
async def opened(url: str, *jobs: tuple[str, str]) -> AsyncIterator[Database]:
    """Open a database, with a job that is ready to be predicted for each (owner, id); it has two pieces."""
    database = Database(url, Path("/nowhere"))
    try:
        for owner, name in jobs:
            async with database.transaction() as session:
                asked = {"fingerprint": "", "model": "m", "version": "1", "input_format": "csv", "output_format": "csv"}
                session.add(Job(id=name, owner=owner, **asked))
                await session.flush()
                for number, kind in ((1, SCORE), (2, SCORE), (3, PUBLISH)):
                    session.add(Piece(job_id=name, number=number, kind=kind, start=0, end=10))
        yield database
    finally:
        await database.close()


async def claim(database: Database, running: int = 100, lease_s: float = 60) -> Claim | None:
    return await database.run(partial(leases.claim, running=running, lease_s=lease_s), alone=True)


async def scored(database: Database, claimed: Claim | None) -> None:
    assert claimed is not None
    await database.run(partial(leases.commit_scored, claimed=claimed, good=5, bad=1))


async def job(database: Database, name: str = "j") -> Job:
    async with database.transaction() as session:
        found = await session.get(Job, name)
        assert found is not None
        return found


async def test_of_two_workers_with_one_piece_the_later_counts(url: str) -> None:
    """A worker that was taken for dead, and is not, can neither commit, renew, fail nor give back what others have."""
    async with opened(url, ("a", "j")) as database:
        late = await claim(database, lease_s=0)
        again = await claim(database)
        assert late is not None
        assert again is not None
        assert (late.piece.number, late.token + 1) == (again.piece.number, again.token)
        for change in (
            partial(leases.commit_scored, good=1, bad=0),
            leases.renew,
            leases.give_back,
            partial(leases.fail, why="x"),
            partial(leases.commit_published, result_bytes=1),
        ):
            with pytest.raises(LeaseLost):
                await database.run(partial(change, claimed=late))  # type: ignore[arg-type]
        await scored(database, again)
        await scored(database, again)  # its confirmation got lost: it counts once
        found = await job(database)
        assert (found.state, found.rows_good, found.rows_bad, found.done) == ("running", 5, 1, 10)


async def test_many_workers_get_each_piece_once(url: str) -> None:
    """Whoever claims at the same time as others gets another piece; a result is made when all are done, and once."""
    async with opened(url, ("a", "j"), ("b", "k")) as database:
        got = await asyncio.gather(*(claim(database) for _ in range(8)))
        claims = [each for each in got if each is not None]
        assert sorted((each.job.id, each.piece.number) for each in claims) == [("j", 1), ("j", 2), ("k", 1), ("k", 2)]
        await scored(database, claims[0])
        assert await claim(database) is None
        for each in claims[1:]:
            await scored(database, each)
        publish = [await claim(database), await claim(database), await claim(database)]
        assert [each and each.piece.kind for each in publish] == ["publish", "publish", None]
        await database.run(partial(leases.commit_published, claimed=publish[0], result_bytes=7))  # type: ignore[arg-type]
        first = publish[0].job.id if publish[0] else ""
        assert [(await job(database, name)).state for name in sorted("jk", key=lambda name: name != first)] == [
            "succeeded",
            "running",
        ]


async def test_keys_take_turns(url: str) -> None:
    """Of the jobs that run each key has its first before any has its second, however many another has asked for."""
    async with opened(url, *(("a", f"a{number}") for number in range(3)), ("b", "b0")) as database:
        got = [await claim(database, running=2) for _ in range(5)]
        assert [each and each.job.id for each in got] == ["a0", "b0", "a0", "b0", None]
        assert [(await job(database, name)).state for name in ("a0", "a1", "b0")] == ["running", "queued", "running"]
        await database.run(partial(leases.end, job_id="b0", state="cancelled"))
        assert (next_one := await claim(database, running=2)) is not None
        assert next_one.job.id == "a1"


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_a_job_that_is_cancelled_as_it_is_claimed_stays_cancelled(url: str) -> None:
    """A worker that has chosen a piece of a job, and waits for who cancels that, gets none."""
    async with opened(url, ("a", "j")) as database:
        async with database.transaction() as session:
            assert await leases.end(session, "j", "cancelled")
            claiming = asyncio.ensure_future(claim(database))
            await somebody_waits(database)
        assert await claiming is None
        assert (await job(database)).state == "cancelled"


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_a_piece_that_is_done_as_it_is_claimed_counts_once(url: str) -> None:
    """A worker that has chosen the piece of one taken for dead, which commits just then, does not do it again."""
    async with opened(url, ("a", "j")) as database:
        late = await claim(database, lease_s=0)
        assert late is not None
        async with database.transaction() as session:
            await leases.commit_scored(session, late, good=5, bad=1)
            claiming = asyncio.ensure_future(claim(database))
            await somebody_waits(database)
        assert await claiming is None
        assert (next_one := await claim(database)) is not None
        assert next_one.piece.number == 2
        assert (await job(database)).rows_good == 5


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_a_worker_and_who_cancels_do_not_wait_for_each_other(url: str) -> None:
    """What a worker does with a piece while its job is cancelled fails neither of them."""
    async with opened(url, ("a", "j")) as database:
        claimed = await claim(database)
        assert claimed is not None
        async with database.transaction() as session:
            await leases.renew(session, claimed)
            cancelling = asyncio.ensure_future(database.run(partial(leases.end, job_id="j", state="cancelled")))
            await somebody_waits(database)
            await leases.give_back(session, claimed, why="the store is away")
        assert await cancelling
        assert (await job(database)).state == "cancelled"


async def somebody_waits(database: Database) -> None:
    """Wait until a transaction waits for another one's lock."""
    waiting = text(
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    )
    async with asyncio.timeout(20):
        while True:
            async with database.transaction() as session:
                if await session.scalar(waiting):
                    return


async def test_what_ends_each_worker_ends_its_job(url: str) -> None:
    """A piece that was begun very often, and never done, fails its job and names the last reason."""
    async with opened(url, ("a", "j")) as database:
        for _ in range(leases.MOST_ATTEMPTS):
            claimed = await claim(database)
            assert claimed is not None
            await database.run(partial(leases.give_back, claimed=claimed, why="the store is away"))
            assert (await job(database)).error == "waits: the store is away"
            async with database.transaction() as session:
                (await session.get_one(Piece, ("j", 1))).lease_until = 0
                (await session.get_one(Piece, ("j", 2))).lease_until = 1e12
        assert await claim(database) is None
        assert ((found := await job(database)).state, "the store is away" in found.error) == ("failed", True)


async def test_results_that_are_old_or_too_many_go(url: str, tmp_path: Path) -> None:
    """The oldest results go beyond the bound, the newest stays however large, and all go when they are old."""
    async with opened(url, *(("a", f"j{number}") for number in range(3))) as database:
        results = Results(str(tmp_path / "kept"))
        for number in range(3):
            await results.put(f"j{number}/result.csv", b"x")
            async with database.transaction() as session:
                await leases.end(session, f"j{number}", "succeeded")
                (await session.get_one(Job, f"j{number}")).result_bytes = 10
        expire = partial(retention.expire, database, results)
        await expire(keep_s=60, keep_bytes=20)
        assert sorted(folder.name for folder in (tmp_path / "kept").iterdir()) == ["j1", "j2"]
        await expire(keep_s=60, keep_bytes=5)
        assert sorted(folder.name for folder in (tmp_path / "kept").iterdir()) == ["j2"]
        await expire(keep_s=0, keep_bytes=20)
        assert not any((tmp_path / "kept").iterdir())
        async with database.transaction() as session:
            assert await session.get(Job, "j2") is None
