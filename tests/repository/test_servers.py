"""Who serves from a folder is known without comparing clocks, and who deploys waits for all of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import orjson
import pytest
from typer.testing import CliRunner

from serving.access.key_store import KeyStore
from serving.cli import app
from serving.repository import servers
from serving.repository.servers import LEASE_S, SILENT_S, ServerFile, ServerMonitor
from serving.repository.state_directory import state_folder
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS, running

Wait = Callable[[Callable[[], bool]], None]


def standing(**more: Any) -> dict[str, Any]:
    return {"models": {"iris": {"asked": 1, "serving": 1, "busy": False, "error": "", **more}}, "problems": []}


def files(root: Path) -> list[Path]:
    return sorted((state_folder(root) / "servers").glob("*.json"))


def rewrite(file: Path, **more: Any) -> None:
    """Have a file say something else, as one of another machine that is seen through a shared folder."""
    file.write_bytes(orjson.dumps({**orjson.loads(file.read_bytes()), **more}))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass, for who looks and who is looked at."""
    passed, real = 0.0, time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed)

    def let_pass(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    return let_pass


def killed(root: Path) -> None:
    """Have a server that is killed leave its file."""
    script = (
        "import os; from pathlib import Path; from serving.repository.servers import ServerFile\n"
        f"ServerFile(Path({str(root)!r}), None).write({standing()!r})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)


def test_a_server_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    """Its lock ends with it, so that it counts no more, and its file is removed by whoever looks next."""
    killed(tmp_path)
    assert len(files(tmp_path)) == 1
    assert ServerMonitor(tmp_path).servers() == []
    assert files(tmp_path) == []


def test_a_server_that_is_silent_is_not_known(tmp_path: Path, clock: Callable[[float], None]) -> None:
    """One that lives and says nothing is neither waited for for ever nor counted out: it is named."""
    one, other = ServerFile(tmp_path, None), ServerFile(tmp_path, None)
    one.write(standing())
    other.write(standing())
    clock(SILENT_S + 1)
    one.write(standing(asked=2, serving=2))
    waited = servers.wait(tmp_path, "iris", 2, seconds=0)
    assert (waited.serving, waited.problems) == (1, [])
    assert ["has said nothing for" in server.unheard for server in waited.unknown] == [True]
    other.write(standing(asked=2, serving=2))
    assert servers.wait(tmp_path, "iris", 2, seconds=0) == (2, [], [])


def test_a_server_on_another_machine_is_judged_by_what_moves(tmp_path: Path, clock: Callable[[float], None]) -> None:
    """Its clock says nothing here, nor need its lock be seen: it lives while it counts on, and else a lease ends."""
    there = ServerFile(tmp_path, None)
    there.write(standing())
    (file,) = files(tmp_path)
    rewrite(file, boot="another", at=1e12, beat=1)
    there._release()  # as where a mount does not carry locks
    observer = ServerMonitor(tmp_path)
    for beat in range(2, 12):
        clock(SILENT_S - 1)
        rewrite(file, beat=beat)
        (seen,) = observer.servers()
        assert not seen.unheard
    clock(SILENT_S + 1)
    (seen,) = observer.servers()
    assert "has said nothing" in seen.unheard
    clock(LEASE_S)
    assert observer.servers() == []
    assert files(tmp_path) == []


def test_a_state_folder_for_two_models_folders(tmp_path: Path) -> None:
    """A server of another models folder of this machine that was given the same state folder is not waited for."""
    state = tmp_path / "state"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ServerFile(tmp_path / name, state).write(standing())
    (tmp_path / "c").symlink_to(tmp_path / "a")
    assert len(ServerMonitor(tmp_path / "a", state).servers()) == 1
    assert len(ServerMonitor(tmp_path / "c", state).servers()) == 1


def test_a_silent_server_beside_one_that_serves(tmp_path: Path, eventually: Wait) -> None:
    """A parent that stands still leaves its workers answering with the old version: promote says so, with status 1."""
    root = tmp_path / "models"
    shutil.copytree(MODELS / "iris", root / "iris")
    key = KeyStore(tmp_path / "keys").create("ops", frozenset({"deploy"}))
    flags = ("--keys", str(tmp_path / "keys"))
    killed(root)
    with running(*flags, models=root) as stopped, running(*flags, models=root) as other:

        def version(url: str) -> str:
            answer = httpx.post(f"{url}/v1/models/iris:predict", json={"instances": [[5.1, 3.5, 1.4, 0.2]]})
            return str(answer.json()["model_version"])

        def silent(url: str) -> bool:
            text = httpx.get(f"{url}/metrics").text
            return float(re.findall(r"^serving_coordinator_silent_seconds (.*)$", text, re.MULTILINE)[0]) > 0

        def promote(version: str) -> httpx.Response:
            return httpx.post(
                f"{other.url}/v1/repository/models/iris/promote",
                json={"version": version},
                headers={"authorization": f"Bearer {key}"},
                timeout=60,
            )

        eventually(lambda: len(files(root)) == 2)  # of those that run
        assert promote("1").status_code == 200
        assert version(stopped.url) == version(other.url) == "1", "it waits for the other server too"
        os.kill(stopped.process.pid, signal.SIGSTOP)
        try:
            answers: list[httpx.Response] = []
            asking = threading.Thread(target=lambda: answers.append(promote("2")))
            asking.start()
            done = CliRunner().invoke(app, ["promote", "iris", "2", "--models", str(root)])
            asking.join()
            assert done.exit_code == 1
            assert f"(process {stopped.process.pid}) has said nothing for" in done.stderr
            assert answers[0].status_code == 202
            assert "has said nothing for" in answers[0].json()["unknown"][0]
            assert (version(stopped.url), version(other.url)) == ("1", "2")
            assert TrafficStore(root).read("iris").stable == "2", "it stands: one that hangs must not keep others back"
            eventually(lambda: httpx.get(f"{stopped.url}/v2/health/ready").json()["coordinator_silent_s"] > SILENT_S)
            assert not silent(other.url)
            assert silent(stopped.url)
            status = CliRunner().invoke(app, ["status", "--models", str(root)]).stdout
            assert f"process {stopped.process.pid}: has said nothing" in status
        finally:
            os.kill(stopped.process.pid, signal.SIGCONT)
        eventually(lambda: version(stopped.url) == "2")
        eventually(lambda: not silent(stopped.url))
        assert CliRunner().invoke(app, ["promote", "iris", "1", "--models", str(root)]).exit_code == 0
