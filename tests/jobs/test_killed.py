"""The whole command with jobs: workers that are killed, and uploads that are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx

from tests.conftest import running
from tests.drills import jobs
from tests.drills.drill import Report


def test_killed_workers_cost_no_row() -> None:
    """The drill in short: a few workers die amid a job on either database, and each row is answered once."""
    report = Report()
    jobs.jobs(report, rows=120_000, kills=2, restarts=1)
    assert not report.broken()


def test_an_upload_that_is_cut_leaves_nothing(tmp_path: Path, eventually: Callable[[Callable[[], bool]], None]) -> None:
    """Half of a file makes no job, and none of it is kept."""
    kept = tmp_path / "state" / "jobs"
    with running("--state-dir", str(tmp_path / "state"), "--jobs-database-url", "sqlite") as server:
        jobs.upload_is_cut(server)
        eventually(lambda: '"POST",route="/v1/jobs",status' in httpx.get(f"{server.url}/metrics", timeout=10).text)
        assert httpx.get(f"{server.url}/v1/jobs", timeout=10).json() == {"jobs": [], "total": 0}
        eventually(lambda: not [file for file in kept.rglob("*") if file.is_file()])
