"""What tests share: the shipped models, and the real command running on real sockets."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx2 as httpx
import pytest
import uvloop
from fastapi import FastAPI

from serving.gate.findings import Limits
from serving.gate.gate import Gate
from serving.http_api.app import create_app
from serving.settings import Settings
from serving.worker import grpc_beside

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function to its end, on uvloop, as the server does."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    uvloop.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


class Server:
    """The real `serving run`, started on a free port; `url` answers once it is ready."""

    def __init__(
        self,
        *flags: str,
        models: Path = MODELS,
        module: str = "serving.cli",
        environment: dict[str, str] | None = None,
        python: str = sys.executable,
        own_group: bool = False,
        cwd: Path | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in stop
        self.process = subprocess.Popen(
            [python, "-m", module, *(command or ("run", "--port", "0", "--models", str(models))), *flags],
            stderr=self._log,
            stdout=self._log,
            start_new_session=own_group,
            cwd=cwd,
            env={k: v for k, v in os.environ.items() if not k.startswith("SERVING_")}
            | {"COLUMNS": "200"}
            | (environment or {}),
        )
        self.models = models
        self.port = 0
        self._last = ""

    def wait(self, seconds: float = 60) -> Self:
        """Wait until it has said where it listens."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = re.search(r"serving on (?:https?://(?:127\.0\.0\.1|0\.0\.0\.0):(\d+)|unix:/)", self.output())
            if found:
                self.port = int(found[1] or 0)
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the server did not start:\n{self.output()}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def output(self) -> str:
        """Return all that it has printed."""
        if self._log.closed:
            return self._last
        self._log.seek(0)
        return self._log.read().decode()

    def stop(self) -> int:
        """End it with SIGTERM and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._last = self.output()
            self._log.close()


@pytest.fixture(autouse=True)
def _priority_stays() -> Iterator[None]:
    """Whatever a test starts after one that gave way would give way too."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    yield
    assert os.getpriority(os.PRIO_PROCESS, 0) == before, "this test lowered the priority of all that come after it"


@pytest.fixture(scope="session", autouse=True)
def _state_goes_with_the_tests() -> Iterator[None]:
    """Keep the state folders of the models folders that tests make out of the system's."""
    with tempfile.TemporaryDirectory(prefix="state-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield


@contextmanager
def running(*flags: str, models: Path = MODELS, python: str = sys.executable) -> Iterator[Server]:
    """Run the real command for a while."""
    server = Server(*flags, models=models, python=python)
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="session", params=["fast_path", "asgi"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The real command, once answering by the fast path and once by plain ASGI."""
    with running("--no-fast-path" if request.param == "asgi" else "--fast-path") as started:
        yield started


@pytest.fixture(autouse=True)
def usual_policy() -> Iterator[None]:
    """A command that gives way does so for its whole process, which here is that of other tests and their servers."""
    yield
    if sys.platform == "linux" and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def with_grpc(models: Path = MODELS, **settings: Any) -> FastAPI:
    """Make the application in this process, with gRPC beside it at `app.state.serving.companion.port`."""
    made = Settings(models=models, **settings)
    return create_app(made, companion=grpc_beside(made, "127.0.0.1:0"))


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as made:
        yield made


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait on a condition; fail if it does not come true."""

    def wait(condition: Callable[[], bool], seconds: float = 15) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "the condition did not come true"
            time.sleep(0.02)

    return wait


@contextmanager
def faulty(faults: dict[str, object], *flags: str, models: Path = MODELS) -> Iterator[Server]:
    """Run the real command with faults built in (tests/drills/faulty.py)."""
    server = Server(*flags, models=models, module="tests.drills.faulty", environment={"FAULTS": json.dumps(faults)})
    try:
        yield server.wait(120)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def examiner() -> Iterator[Gate]:
    """One open gate for all tests that ask it, since its libraries take longest to load."""
    with Gate(Limits(wall_s=60, cpu_s=3, memory_bytes=2 * 2**30)) as gate:
        yield gate
