"""Hundreds of models, started again and again: every worker comes to serve all, and follows what is promoted."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
from typer.testing import CliRunner

from serving.command_line import app
from tests.conftest import MODELS, running
from tests.drills.drill import Report, drill
from tests.drills.steady import until
from tests.drills.workers import ready, workers


@drill("many_models", "with 300 models every start is whole: all workers serve all, and a promotion reaches them")
def many_models(report: Report, *, models: int = 300, times: int = 20) -> None:
    """Start two workers `times` times over; each time promote a version and ask new connections for it."""
    whole, promoted, longest, threads = 0, 0, 0.0, 0
    with tempfile.TemporaryDirectory(prefix="many-") as temporary:
        folder = Path(temporary)
        for number in range(models):
            shutil.copytree(MODELS / "iris" / "1", folder / f"iris{number}" / "1")
        shutil.copytree(MODELS / "iris" / "2", folder / "iris0" / "2")
        for turn in range(times):
            due = str(turn % 2 + 1)
            began = time.monotonic()
            with running("--workers", "2", models=folder) as server:
                ok = until(lambda: ready(server, 2), 60) < 60
                longest = max(longest, time.monotonic() - began)
                listed = {len(httpx.get(f"{server.url}/v1/models").json()["models"]) for _ in range(8)}
                whole += ok and listed == {models}
                threads = max(threads, *(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in workers(server)))
                done = CliRunner().invoke(app, ["promote", "iris0", due, "--models", str(folder)])
                answers = {httpx.get(f"{server.url}/v1/models/iris0").json()["version"] for _ in range(8)}
                promoted += done.exit_code == 0 and answers == {due}
    report.exactly("starts after which all workers served all models", whole, times)
    report.exactly("promotions that reached all workers before the command returned", promoted, times)
    report.at_most("slowest start", longest, 60, "s")
    report.at_most("threads of a worker", threads, 64)
