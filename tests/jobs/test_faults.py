"""Databases and disks that are gone, full, locked or of another release: jobs wait, and say why; requests go on."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession

from serving.jobs import database as database_of_jobs
from serving.jobs.database import MIGRATIONS, Database, DatabaseAway
from serving.jobs.tables import Job
from tests.jobs.conftest import Make, Shared, ask, expected, finished, flowers, services
from tests.jobs.postgres import Postgres

LATER = '''
"""What a later release adds."""

import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("later", sa.Text))
'''
PREDICT = {"instances": [[5.1, 3.5, 1.4, 0.2]]}
Eventually = Callable[[Callable[[], bool]], None]


async def insert(database: Database, name: str) -> None:
    asked = {"fingerprint": "", "model": "m", "version": "1", "input_format": "csv", "output_format": "csv"}
    async with database.transaction() as session:
        session.add(Job(id=name, owner="a", **asked))


def remove(file: Path) -> None:
    """Remove a database of SQLite, while others have it open."""
    for left in file.parent.glob(f"{file.name}*"):
        left.unlink()


async def test_an_older_schema_is_brought_up_and_a_newer_is_left_alone(url: str, tmp_path: Path) -> None:
    """A release brings the schema of an older one up, with all jobs; an older release says that it is too old."""
    newer = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, newer)
    head = max(file.name[:4] for file in (newer / "versions").glob("0*.py"))
    (newer / "versions" / "9999_later.py").write_text(LATER.format(head=head))
    old = Database(url, tmp_path)
    await insert(old, "j")
    await old.close()
    # Workers start together: one of them brings it up, and the others wait.
    later = [Database(url, tmp_path, migrations=newer) for _ in range(3)]
    await asyncio.gather(*(insert(each, f"k{number}") for number, each in enumerate(later)))
    async with later[0].transaction() as session:
        found = await session.execute(text("select id from jobs where later is null order by id"))
        assert list(found.scalars()) == ["j", "k0", "k1", "k2"]
    again = Database(url, tmp_path)
    with pytest.raises(DatabaseAway, match="newer release"):
        await insert(again, "l")
    for each in (*later, again):
        await each.close()


async def test_sqlite_that_is_locked_full_or_removed_says_so(tmp_path: Path) -> None:
    """A file that others hold, or that finds no room, is said to be so; one that is removed is begun anew."""
    file = tmp_path / "jobs.db"
    database = Database(f"sqlite:///{file}", tmp_path, busy_s=0.05)
    await insert(database, "j")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(DatabaseAway, match="locked"):
        await insert(database, "k")
    other.execute("rollback")
    other.close()
    await insert(database, "k")
    await database.close()
    database = Database(f"sqlite:///{file}", tmp_path)
    limit = "pragma max_page_count = 1"
    event.listen(database.engine.sync_engine, "connect", lambda connection, _: connection.cursor().execute(limit))
    with pytest.raises(DatabaseAway, match="no space left"):
        await asyncio.gather(*(insert(database, f"l{number}") for number in range(1000)))
    remove(file)
    await database.close()
    database = Database(f"sqlite:///{file}", tmp_path)
    await insert(database, "m")
    remove(file)
    await insert(database, "m")
    await database.close()


async def test_no_connection_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs for too long when the database is closed, or meets another file than it had, leaves nothing behind."""
    monkeypatch.setattr(database_of_jobs, "BUSY_S", 0.05)
    begun = asyncio.Event()
    before = set(threading.enumerate())

    async def long(session: AsyncSession) -> None:
        begun.set()
        count = (
            "with recursive c(x) as (select 1 union all select x + 1 from c where x < 2000000) select count(*) from c"
        )
        await session.execute(text(count))

    for removed in (False, True):
        file = tmp_path / f"{removed}.db"
        database = Database(f"sqlite:///{file}", tmp_path)
        await insert(database, "j")
        begun.clear()
        running = asyncio.ensure_future(database.run(long))
        await begun.wait()
        if removed:
            remove(file)
            await insert(database, "k")
        await database.close()
        await asyncio.gather(running, return_exceptions=True)
        del database, running
        gc.collect()  # a connection that nobody closed says so here
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if "_connection_worker_thread" in name]


@pytest.mark.parametrize("shared", ["postgresql"], indirect=True)
def test_while_the_database_is_away_jobs_wait_and_requests_go_on(
    shared: Shared, client: TestClient, postgres: Postgres, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """A crash of the database amid a job costs no row and no prediction; who asks for a job hears that it is away."""
    rows = flowers(3000)
    pieces = services(client).runner.pieces
    do, begun = pieces.do, []

    async def slow(claimed: Any) -> None:
        begun.append(claimed)
        if len(begun) == 4:
            await asyncio.to_thread(postgres.stop)
        await do(claimed)

    monkeypatch.setattr(pieces, "do", slow)
    made = ask(client, rows.tolist(), output="ndjson")
    eventually(lambda: len(begun) == 4)
    eventually(lambda: client.get("/v1/jobs").status_code == 503)
    away = ask(client)
    assert (away.status_code, away.json()["error"]) == (503, "the database of jobs does not answer: try again later")
    assert client.post("/v1/models/iris:predict", json=PREDICT, headers=predicting(shared)).status_code == 200
    eventually(lambda: "serving_jobs_database_up 0.0" in client.get("/metrics", headers=predicting(shared)).text)
    postgres.start()
    eventually(lambda: client.get("/v1/jobs").status_code == 200)
    job = finished(client, made)
    assert (job["state"], job["rows_good"], job["rows_bad"]) == ("succeeded", 3000, 0), job
    lines = client.get(f"/v1/jobs/{job['id']}/result").text.splitlines()
    assert [line.split('"')[5] for line in lines] == expected(rows)[0]


def predicting(shared: Shared) -> dict[str, str]:
    return {"authorization": f"Bearer {shared.keys[-1]}"}


@pytest.mark.skipif(os.getuid() != 0, reason="a small disk is mounted")
def test_a_full_disk_leaves_no_half_of_a_result(serving_jobs: Make, tmp_path: Path, eventually: Eventually) -> None:
    """Without space a job waits and says so, nothing has its result's name; with space again it ends as any other."""
    kept = tmp_path / "kept"
    kept.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(kept)], check=True)
    try:
        with serving_jobs() as client:
            services(client).runner.pieces.piece_bytes = 20_000
            made = ask(client, flowers(1500).tolist(), output="ndjson")
            path = f"/v1/jobs/{made.json()['id']}"
            eventually(lambda: "no space left" in client.get(path).json()["error"])
            assert client.get(path).json()["state"] in ("running", "queued")
            assert not list(kept.rglob("result*"))
            assert client.post("/v1/models/iris:predict", json=PREDICT).status_code == 200
            refused = ask(client, flowers(12_000).tolist())
            assert (refused.status_code, "no space left" in refused.json()["error"]) == (503, True)
            subprocess.run(["mount", "-o", "remount,size=32m", str(kept)], check=True)
            job = finished(client, made)
            assert (job["state"], job["rows_good"], job["error"]) == ("succeeded", 1500, ""), job
    finally:
        subprocess.run(["umount", "-l", str(kept)], check=True)


@pytest.mark.parametrize("shared", ["sqlite"], indirect=True)
def test_a_version_that_is_deleted_meanwhile_fails_the_job(
    shared: Shared, client: TestClient, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """A job keeps to the version that it began with; where that is deleted, it fails and says so."""
    pieces = services(client).runner.pieces
    do = pieces.do

    async def late(claimed: Any) -> None:
        if claimed.piece.kind == "score":
            shutil.rmtree(shared.folder / "models" / "iris" / "1", ignore_errors=True)
            await asyncio.to_thread(eventually, lambda: "1" not in services(client).fleet.models["iris"].versions)
        await do(claimed)

    monkeypatch.setattr(pieces, "do", late)
    job = finished(client, ask(client, version="1"))
    assert (job["state"], job["error"]) == ("failed", "version 1 of model iris was deleted meanwhile"), job
