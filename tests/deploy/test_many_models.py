"""A folder with more models than a small machine has threads for: all are served, by every worker, and cost little."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from serving.command_line import app
from tests.conftest import MODELS, Server, running
from tests.drills.workers import ready, workers

Wait = Callable[[Callable[[], bool]], None]
MANY = 60
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers that serve many models, each with a version that is to be promoted."""
    folder = tmp_path_factory.mktemp("crowd")
    for number in range(MANY):
        shutil.copytree(MODELS / "iris" / "1", folder / f"iris{number}" / "1")
    shutil.copytree(MODELS / "iris" / "2", folder / "iris0" / "2")
    (folder / "iris0" / "traffic.json").write_text('{"generation": 1, "stable": "1"}')
    with running("--workers", "2", models=folder) as server:
        yield server


def test_every_worker_serves_all_and_follows(crowd: Server, eventually: Wait) -> None:
    """Whoever answers knows every model, and a promotion reaches all workers before the command returns."""
    eventually(lambda: ready(crowd, 2))
    for _ in range(8):
        with httpx.Client(base_url=crowd.url) as client:  # a new connection each time: any worker
            assert len(client.get("/v1/models").json()["models"]) == MANY
            assert client.post(f"/v1/models/iris{MANY - 1}:predict", json=ROW).status_code == 200
    done = CliRunner().invoke(app, ["promote", "iris0", "2", "--models", str(crowd.models)])
    assert done.exit_code == 0, done.output
    for _ in range(8):
        answer = httpx.post(f"{crowd.url}/v1/models/iris0:predict", json=ROW)
        assert answer.json()["model_version"] == "2"


def test_models_that_nobody_asks_cost_no_threads_and_few_series(crowd: Server, eventually: Wait) -> None:
    """Threads and series are of what is asked; a scrape of 300 such models stays under 300 kB, gzipped under 30."""
    eventually(lambda: ready(crowd, 2))
    for worker in workers(crowd):
        assert len(list(Path(f"/proc/{worker}/task").iterdir())) < 30
    plain = httpx.get(f"{crowd.url}/metrics", headers={"accept-encoding": "identity"})
    packed = httpx.get(f"{crowd.url}/metrics", headers={"accept-encoding": "br, gzip;q=0.5"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.text.startswith("# HELP serving_predictions_total")
    assert len(plain.content) < 800 * MANY + 40_000  # what is told of each, and of the server
    assert int(packed.headers["content-length"]) < 100 * MANY + 5000
    refused = httpx.get(f"{crowd.url}/metrics", headers={"accept-encoding": "gzip;q=0, *"})
    assert "content-encoding" not in refused.headers
