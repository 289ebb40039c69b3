"""The `serving` command: real processes, real signals, several workers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from serving.cli import main
from serving.server import CannotStart, check_folders, misnamed
from serving.settings import Settings, read
from tests.conftest import MODELS, running

Wait = Callable[[Callable[[], bool]], None]
ROW = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command where it is expected to end by itself."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SERVING_")}
    return subprocess.run(
        [sys.executable, "-m", "serving.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**clean, "COLUMNS": "200", **environment},
        check=False,
    )


def children(pid: int) -> set[int]:
    """Return the worker processes of a server: its children that multiprocessing has started, and no gate."""
    pids = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        pids |= {int(child) for child in task.read_text().split()}
    return {p for p in pids if b"spawn_main" in _command(p)}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def counted(url: str) -> float:
    """Return how many predictions of iris all workers have answered."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "serving_predictions_total"
        and sample.labels["model"] == "iris"
        and sample.labels["outcome"] == "ok"
    )


def ask(url: str, times: int) -> None:
    """Ask over a new connection each time, so that every worker gets some."""
    for _ in range(times):
        answer = httpx.post(f"{url}/v1/models/iris:predict", json=ROW)
        assert answer.status_code == 200
        assert answer.json()["predictions"][0]["label"] == "setosa"


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_two_workers_answer_count_together_and_survive_a_kill(eventually: Wait) -> None:
    """Two workers serve one port; /metrics is their sum; a killed one is replaced and no counter goes back."""
    with running("--workers", "2") as server:
        eventually(lambda: len(children(server.process.pid)) == 2)
        ask(server.url, 60)
        eventually(lambda: counted(server.url) == 60)
        assert {counted(server.url) for _ in range(10)} == {60}, "the sum depends on who answers"
        workers = children(server.process.pid)
        os.kill(min(workers), signal.SIGKILL)
        eventually(
            lambda: (
                len(children(server.process.pid) - {min(workers)}) == 2
                and 'worker="1"' in httpx.get(f"{server.url}/metrics").text
            )
        )
        assert counted(server.url) >= 60
        ask(server.url, 20)
        for _ in range(20):  # an answer is counted right behind it: whoever is asked something else has done so
            assert reachable(server.url)
        for worker in children(server.process.pid):  # at once, with what neither has written down
            os.kill(worker, signal.SIGKILL)
        eventually(lambda: reachable(server.url) and counted(server.url) == 80)
        ask(server.url, 20)
        eventually(lambda: counted(server.url) == 100)
        assert server.stop() == 0


def test_sigterm_is_unready_at_once_and_ends_with_zero() -> None:
    """SIGTERM ends the server with status 0, and Ctrl-C does too."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with running("--workers", "2") as server:
            ask(server.url, 3)
            workers = children(server.process.pid)
            server.process.send_signal(number)
            assert server.process.wait(20) == 0
            assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_workers_end_when_their_parent_is_killed(eventually: Wait) -> None:
    """A parent killed with SIGKILL does not leave workers behind."""
    with running("--workers", "2") as server:
        workers = children(server.process.pid)
        server.process.kill()
        server.process.wait()
        eventually(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()])


def test_a_models_folder_that_is_not_there_is_one_line_and_an_error(tmp_path: Path) -> None:
    """A server that is pointed at nothing does not start, and says what to name."""
    ended = command("run", "--port", "0", "--models", str(tmp_path / "modles"))
    assert ended.returncode == 1
    (line,) = ended.stderr.strip().splitlines()
    assert "modles can't be read: no such file or directory; name another with --models" in line


def test_without_a_temporary_folder_a_server_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only root without /tmp the remedy is named, and no trace is shown."""

    def refused() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(CannotStart, match=r"no temporary file can be written: no usable .*; mount .* in TMPDIR"):
        check_folders(MODELS)


def test_a_variable_that_is_no_setting_is_named() -> None:
    """A misspelt SERVING_ variable is named, with the setting that was meant; others are nobody's business."""
    found = misnamed(["SERVING_MODLES", "SERVING_MODELS", "serving_port", "SERVING_SERVICE_HOST", "PATH"])
    assert found == [
        "SERVING_MODLES in the environment is no setting: did you mean SERVING_MODELS?",
        "SERVING_SERVICE_HOST in the environment is no setting",
    ]


def test_a_port_in_use_is_one_line_and_an_error() -> None:
    """A taken port is named in one line, with what to do, and a non-zero exit."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = command("run", "--port", str(port), "--models", str(MODELS))
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
    assert str(port) in ended.stderr
    assert "in use" in ended.stderr


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    """An option comes from the flag, else the environment, else the TOML file."""
    config = tmp_path / "serving.toml"
    config.write_text('port = 1\nmodels = "/nowhere"\nmax_batch_rows = 0\n')
    ended = command("run", "--config", str(config))
    assert ended.returncode == 2
    assert "max_batch_rows" in ended.stderr
    config.write_text("workers = 300\n")
    assert "workers" in command("run", "--config", str(config)).stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        config.write_text(f"port = {port}\n")
        assert port in command("run", "--config", str(config)).stderr
        config.write_text("port = 1\n")
        assert port in command("run", "--config", str(config), SERVING_PORT=port).stderr
        assert port in command("run", "--config", str(config), "--port", port, SERVING_PORT="1").stderr


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    """A misspelt key in the file does not pass silently."""
    config = tmp_path / "serving.toml"
    config.write_text("prot = 1\n")
    ended = command("run", "--config", str(config))
    assert ended.returncode == 2
    assert "prot" in ended.stderr


def test_a_file_of_settings_that_is_not_there_starts_no_server(tmp_path: Path) -> None:
    """A wrong path never makes a server without the keys and certificates that its file names, nor a broken file."""
    config = tmp_path / "serving.toml"
    for text, wanted in ((None, "no such file"), ('keys = "a\n', "is not TOML")):
        if text is not None:
            config.write_text(text)
        with pytest.raises(ValueError, match=f"--config: {config}.*{wanted}"):
            read(config)


def test_streams_that_were_closed_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts the command without a log has one that goes nowhere: it ended at once, and said nothing."""
    monkeypatch.setattr("sys.argv", ["serving", "--version"])
    monkeypatch.setattr("sys.stderr", None)
    with pytest.raises(SystemExit):
        main()
    with sys.stderr as opened:
        assert opened.name == os.devnull


def test_a_state_folder_among_the_models_is_refused(tmp_path: Path) -> None:
    """Others would take it for a model; the setting is named."""
    with pytest.raises(ValidationError, match=r"state_dir\n.*it lies in the models folder"):
        Settings(models=tmp_path, state_dir=tmp_path / "iris" / "state")
    assert Settings(models=tmp_path / "models", state_dir=tmp_path / "state").state_dir is not None


def test_strict_refuses_to_start_with_a_bad_model(tmp_path: Path) -> None:
    """Told to be strict, the server names the bad model and exits; otherwise it serves the others."""
    shutil.copytree(MODELS / "iris", tmp_path / "iris")
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "1" / "model.onnx").write_bytes(b"not onnx")
    ended = command("run", "--port", "0", "--models", str(tmp_path), "--strict")
    assert ended.returncode == 3
    assert "broken 1" in ended.stderr
    assert "Traceback" not in ended.stderr
    with running(models=tmp_path) as server:
        ask(server.url, 1)
        assert "broken" in server.output()


def test_no_models_at_all_is_live_and_not_ready(tmp_path: Path) -> None:
    """An empty folder: the server runs, says that it is not ready, and answers 404 for models."""
    with running(models=tmp_path) as server:
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 503
        assert httpx.post(f"{server.url}/v1/models/iris:predict", json=ROW).status_code == 404


def test_the_start_says_what_is_served_and_where_the_docs_are(eventually: Wait) -> None:
    """The start prints each model with its versions and features, and the address of the docs."""
    with running() as server:
        eventually(lambda: "docs:" in server.output())  # behind all else
        text = server.output()
        for name in ("iris", "breast_cancer", "diabetes", "digits", "penguins", "docs_topic"):
            assert name in text
        assert re.search(r"iris +1, \[2\] +classification +sepal_length", text)
        assert f"docs: {server.url}/docs" in text


def test_help_names_every_setting() -> None:
    """Each option is in the help with its default and its environment variable."""
    text = " ".join(command("run", "--help").stdout.split())
    for name in ("--workers", "--max-body-bytes", "SERVING_DRAIN_S", "--no-fast-path", "[default: 8080]"):
        assert name in text


MAKES_AN_APPLICATION = f"""
from serving.http_api.app import create_app
from serving.settings import Settings
from fastapi.testclient import TestClient
with TestClient(create_app(Settings(models={str(MODELS)!r}))) as client:
    assert client.get("/v2/health/ready").status_code == 200
"""


@pytest.mark.parametrize(
    ("code", "more"),
    [
        (MAKES_AN_APPLICATION, {"onnx", "google.protobuf", "rich.traceback"}),
        ("import serving.command_line", {"onnxruntime"}),
    ],
    ids=["worker", "command"],
)
def test_what_serves_imports_nothing_of_training(code: str, more: set[str]) -> None:
    """The server needs no training library: neither worker nor command imports one, nor the exporter."""
    code += "\nimport sys; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    imported = set(said.stdout.split())
    assert "serving.settings" in imported
    assert not imported & {"sklearn", "skl2onnx", "onnxmltools", "pandas", "serving.export", *more}
