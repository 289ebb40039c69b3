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
from serving.command_line import app
from serving.repository import servers
from serving.repository.servers import LEASE_S, SILENT_S, UNSEEN_S, ServerFile, ServerMonitor
from serving.repository.state_directory import state_folder
from serving.repository.traffic_store import TrafficStore
from tests.conftest import MODELS, faulty, running
from tests.drills.steady import PATH, ROW

Wait = Callable[[Callable[[], bool]], None]


def standing(scans: int = 1, **more: Any) -> dict[str, Any]:
    iris = {"asked": 1, "serving": 1, "busy": False, "error": "", **more}
    return {"models": {"iris": iris}, "problems": [], "scans": scans, "tried": {"iris": {"began": 7}}}


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
    """Its lock ends with it, so that it counts no more; the next server removes its file, and hears what it tried."""
    killed(tmp_path)
    assert ServerMonitor(tmp_path).servers() == []
    assert len(files(tmp_path)) == 1
    assert [dead.tried for dead in ServerMonitor(tmp_path).sweep()] == [{"iris": {"began": 7}}]
    assert files(tmp_path) == []
    assert ServerMonitor(tmp_path).sweep() == []


def test_a_disk_that_takes_a_part(tmp_path: Path) -> None:
    """What a server says of itself is there whole or not at all: what it said before stands, and it is known."""
    script = (
        "import resource, signal; from pathlib import Path\n"
        "from serving.repository.servers import ServerFile, ServerMonitor\n"
        f"file, said = ServerFile(Path({str(tmp_path)!r}), None), {standing()!r}\n"
        "file.write(said)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "file.write({**said, 'problems': [['iris', '2', 'x' * 8192]]})\n"
        f"print(len(ServerMonitor(Path({str(tmp_path)!r})).servers()))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "1\n"


def test_a_server_that_is_silent_is_not_known(tmp_path: Path, clock: Callable[[float], None]) -> None:
    """One that lives and says nothing is neither waited for for ever nor counted out: it is named."""
    one, other = ServerFile(tmp_path, None), ServerFile(tmp_path, None)
    one.write(standing())
    other.write(standing())
    clock(SILENT_S + 1)
    one.write(standing(asked=2, serving=2))
    waited = servers.Waiting(tmp_path, "iris", 2, seconds=0).wait()
    assert (waited.serving, waited.problems) == (1, [])
    assert ["has said nothing for" in server.unheard for server in waited.unknown] == [True]
    other.write(standing(asked=2, serving=2))
    assert servers.Waiting(tmp_path, "iris", 2, seconds=0).wait() == (2, [], [])


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
    assert len(observer.sweep()) == 1
    assert files(tmp_path) == []


def test_a_server_that_does_not_see_a_change(tmp_path: Path, clock: Callable[[float], None]) -> None:
    """One that has looked at its folder twice without finding the change is named; one that is busy is waited for."""
    ServerFile(tmp_path, None).write(standing(asked=2, serving=2))
    other = ServerFile(tmp_path, None)
    for meanwhile, known in ((standing(scans=9), False), (standing(scans=8), True), (standing(9, busy=True), True)):
        other.write(standing(scans=7))
        waiting = servers.Waiting(tmp_path, "iris", 2, seconds=60)
        assert waiting.poll() is None
        clock(UNSEEN_S)
        for file in (file for file in files(tmp_path) if orjson.loads(file.read_bytes())["scans"] == 1):
            rewrite(file, at=time.monotonic())
        other.write(meanwhile)
        waited = waiting.poll()
        assert (waited is None) == known
        if waited is not None:
            assert (waited.serving, waited.problems) == (1, [])
            assert ["does not show the change" in server.unheard for server in waited.unknown] == [True]


def test_servers_of_several_machines(tmp_path: Path, eventually: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promote waits for all, whatever their clocks say; one whose storage is another, or is gone, is named, and the
    others follow."""
    root, split = tmp_path / "models", tmp_path / "split"
    shutil.copytree(MODELS / "iris", root / "iris")
    split.symlink_to(root)
    state = ("--state-dir", str(tmp_path / "state"))

    def promote(version: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["promote", "iris", version, "--models", str(root), *state])
        return done.exit_code, done.output

    def versions() -> list[str]:
        asked = [httpx.post(f"{one.url}{PATH}", content=ROW).json()["model_version"] for one in (here, there)]
        return [str(version) for version in asked]

    with (
        running(*state, models=root) as here,
        faulty({"boot": "another", "clock": 60}, *state, models=split) as there,
    ):
        eventually(lambda: len(ServerMonitor(root, tmp_path / "state").servers()) == 2)
        code, said = promote("1")
        assert (code, "2 servers serve it" in said, versions()) == (0, True, ["1", "1"]), said
        monkeypatch.setattr(servers, "UNSEEN_S", 0.0)
        shutil.copytree(root, tmp_path / "copy")
        (tmp_path / "next").symlink_to(tmp_path / "copy")
        (tmp_path / "next").rename(split)
        pid = there.process.pid
        code, said = promote("2")
        assert (code, versions()) == (1, ["2", "1"]), said
        assert f"(process {pid}) can't follow: its models folder does not show the change" in said
        split.unlink()
        eventually(lambda: any(one.gone for one in ServerMonitor(root, tmp_path / "state").servers()))
        code, said = promote("1")
        assert (code, versions()[0]) == (1, "1"), said
        assert f"(process {pid}) can't follow: the models folder can't be read" in said
        split.symlink_to(root)
        eventually(lambda: not any(one.gone for one in ServerMonitor(root, tmp_path / "state").servers()))
        code, said = promote("2")
        assert (code, versions()) == (0, ["2", "2"]), said


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
