"""What tests of jobs share: databases of both kinds, an application with jobs, and what onnxruntime itself answers."""

from __future__ import annotations

import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fastapi.testclient import TestClient

from serving.access.key_store import KeyStore
from serving.http_api.app import create_app
from serving.settings import Settings
from tests.conftest import MODELS
from tests.jobs.postgres import Postgres

Make = Callable[..., AbstractContextManager[TestClient]]
NAMES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    made = Postgres()
    yield made
    made.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of either kind, with nothing in it."""
    return _database(request, tmp_path)


def _database(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{folder / 'jobs.db'}"
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.database(f"t{zlib.crc32(str(folder).encode())}")


@contextmanager
def application(folder: Path, **settings: Any) -> Iterator[TestClient]:
    """Run an application with jobs, in this process; settings as `Settings` has them."""
    models = folder / "models"
    if not models.exists():
        shutil.copytree(MODELS / "iris", models / "iris")
    given = {
        "models": models,
        "jobs_folder": str(folder / "kept"),
        "jobs_database_url": f"sqlite:///{folder / 'jobs.db'}",
        **settings,
    }
    with TestClient(create_app(Settings(**given)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def serving_jobs(tmp_path: Path) -> Make:
    """Make an application of a test's own."""
    return partial(application, tmp_path)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """An application on a database of either kind, that tests share; small pieces, so that each job has several."""
    folder = tmp_path_factory.mktemp(request.param)
    store = KeyStore(folder / "keys")
    keys = [store.create(f"k{number}", frozenset({"jobs"})) for number in range(60)]
    keys.append(store.create("predicts", frozenset({"predict", "metrics"})))
    (folder / "in").mkdir()
    settings = {"keys": str(folder / "keys"), "jobs_inputs": (str(folder / "in"),)}
    with application(folder, jobs_database_url=_database(request, folder), **settings) as client:
        pieces = services(client).runner.pieces
        pieces.piece_bytes, pieces.piece_rows = 20_000, 500
        yield Shared(client, folder, keys)


@dataclass
class Shared:
    """The shared application: its folder, with `in` for inputs, and keys that nobody has used yet; the last may not."""

    client: TestClient
    folder: Path
    keys: list[str]


@pytest.fixture
def client(shared: Shared) -> TestClient:
    """The shared application, as somebody whose first jobs these are."""
    shared.client.headers["authorization"] = f"Bearer {shared.keys.pop(0)}"
    return shared.client


def services(client: TestClient) -> Any:
    """Return what an application serves with."""
    return client.app.state.serving  # type: ignore[attr-defined]


def finished(client: TestClient, made: Any, seconds: float = 120) -> dict[str, Any]:
    """Wait until a job that an answer is of has ended, and return it."""
    assert made.status_code in (200, 201), made.text
    until = time.monotonic() + seconds
    while True:
        job: dict[str, Any] = client.get(f"/v1/jobs/{made.json()['id']}").json()
        if job["state"] not in ("queued", "running"):
            return job
        assert time.monotonic() < until, job
        time.sleep(0.02)


def flowers(rows: int) -> np.ndarray[Any, Any]:
    """Make rows that are measurements of irises, each another one."""
    rng = np.random.default_rng(7)
    return (rng.random((rows, 4)) * [4, 2.5, 6, 2.4] + [4, 2, 1, 0.1]).round(3).astype(np.float32)


def expected(rows: np.ndarray[Any, Any], version: str = "2") -> tuple[list[str], np.ndarray[Any, Any]]:
    """Return the labels and probabilities [rows, 3] that onnxruntime gives without this server."""
    session = onnxruntime.InferenceSession(MODELS / "iris" / version / "model.onnx")
    labels, probabilities = session.run(None, {session.get_inputs()[0].name: rows})
    if isinstance(probabilities, list):
        probabilities = np.array([list(each.values()) for each in probabilities])
    return [str(label) for label in labels], probabilities


def ask(client: TestClient, rows: Any = ((5.1, 3.5, 1.4, 0.2),), **more: Any) -> Any:
    """Ask for a job with rows in the request."""
    headers = more.pop("headers", {})
    return client.post("/v1/jobs", json={"model": "iris", "rows": list(rows), **more}, headers=headers)


def send(client: TestClient, content: Any, kind: str = "text/csv", output: str = "ndjson") -> Any:
    """Ask for a job with a file as the body."""
    asked = f"/v1/jobs?model=iris&output={output}"
    return client.post(asked, content=content, headers={"content-type": kind})
