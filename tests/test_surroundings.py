"""What happens when the world around the server breaks: disks, descriptors, logs, clocks, folders."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from serving.log_pipe import MOST_LINES, LogPipe
from tests.conftest import MODELS, ROOT, faulty, running
from tests.drills.steady import PATH, ROW, until
from tests.drills.workers import copied, ready, workers
from tests.test_faults import predict, status, text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models folder with the two versions of iris."""
    return copied(tmp_path)


@contextmanager
def started(
    models: Path, *flags: str, wrapper: tuple[str, ...] = (), environment: dict[str, str] | None = None, **popen: Any
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run the real command in ways that the fixture does not know; wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "serving.cli", "run", "--port", str(port), "--models", str(models), *flags]
    process = subprocess.Popen(
        [*wrapper, *command],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("SERVING_")} | (environment or {}),
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **popen},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        assert until(lambda: status(url) == 200 or process.poll() is not None, 60) < 60
        assert process.poll() is None
        yield process, url
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


def test_a_log_that_nobody_reads_stops_nothing(folder: Path) -> None:
    """With a full pipe for stdout and stderr the server starts, answers and ends with 0."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 65536):
            pass
    os.set_blocking(writer, True)
    with started(folder, "--log-level", "debug", stdout=writer, stderr=writer) as (process, url):
        assert predict(url) == 200
        process.terminate()
        assert process.wait(30) == 0
    os.close(reader)
    os.close(writer)


def test_lines_that_nobody_reads_are_dropped_and_counted() -> None:
    """Beyond the bound lines are dropped; when the reader is back it is told how many."""
    reader, writer = os.pipe()
    pipe = LogPipe(writer)
    line = "x" * 99 + "\n"
    for _ in range(MOST_LINES + 2000):
        pipe.write(line)
    assert pipe.dropped > 0
    dropped = pipe.dropped
    got = b""
    while b"were dropped" not in got:
        got += os.read(reader, 65536)
    assert f"{dropped} lines of the log were dropped" in got.decode()


def test_descriptors_used_up_cost_only_new_connections(folder: Path) -> None:
    """With no descriptor left new connections fail and old ones are served, without a busy loop; then all is well."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    with started(folder, preexec_fn=few) as (process, url), httpx.Client(base_url=url, timeout=10) as old:
        assert old.post(PATH, content=ROW).status_code == 200
        port = int(url.rsplit(":", 1)[1])
        flood = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
        (worker,) = (pid for pid in _children(process.pid))
        before = _cpu(worker)
        for _ in range(20):
            assert old.post(PATH, content=ROW).status_code == 200
            time.sleep(0.05)
        assert _cpu(worker) - before < 0.7
        for connection in flood:
            connection.close()
        assert until(lambda: status(url) == 200) < 30
        assert predict(url) == 200


def _children(pid: int) -> list[int]:
    server = type("Server", (), {"process": type("Process", (), {"pid": pid})})
    return sorted(workers(server))  # type: ignore[arg-type]


def _cpu(pid: int) -> float:
    """Return the processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_corrupt_metrics_file_costs_only_its_figures(folder: Path, tmp_path: Path) -> None:
    """A worker whose predecessor's file is garbage starts from nothing, and scrapes go on."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with started(folder, environment={"TMPDIR": str(temporary)}) as (process, url):
        assert until(lambda: any(temporary.glob("serving-metrics-*/worker-0.json"))) < 30
        (file,) = temporary.glob("serving-metrics-*/worker-0.json")
        (worker,) = _children(process.pid)
        os.kill(worker, signal.SIGSTOP)
        file.write_bytes(b"\xff garbage")
        os.kill(worker, signal.SIGKILL)
        assert until(lambda: status(url) == 200) < 60
        assert predict(url) == 200
        assert "serving_predictions_total" in text(f"{url}/metrics")


def test_a_clock_set_back_an_hour_changes_nothing(folder: Path) -> None:
    """Deadlines, idle times and signs of life follow the monotonic clock."""
    with faulty({"clock": -3600}, "--hang-s", "2", models=folder) as server:
        old = workers(server)
        time.sleep(3)
        with httpx.Client(base_url=server.url, timeout=10) as client:
            for _ in range(5):
                assert client.post(PATH, content=ROW).status_code == 200
        assert workers(server) == old


def test_a_folder_that_goes_and_comes_back(folder: Path) -> None:
    """Without its folder the server serves what it has; a new worker waits for it rather than serve nothing."""
    with running("--workers", "2", models=folder) as server:
        assert until(lambda: ready(server, 2), 60) < 60
        away = folder.with_name(f"{folder.name}-away")
        folder.rename(away)
        first = min(workers(server))
        os.kill(first, signal.SIGKILL)
        assert until(lambda: "waits for the models folder" in server.output(), 60) < 60
        assert {predict(server.url) for _ in range(20)} == {200}
        away.rename(folder)
        assert until(lambda: ready(server, 2), 60) < 60
        assert {predict(server.url) for _ in range(20)} == {200}


def test_a_worker_that_comes_too_late_to_load_takes_no_requests(folder: Path) -> None:
    """One that starts while the folder goes waits for it, where others serve; then both do."""
    go = folder.with_name(f"{folder.name}-go")
    with faulty({"wait": str(go)}, "--workers", "2", models=folder) as server:
        assert until(lambda: ready(server, 1), 60) < 60
        away = folder.with_name(f"{folder.name}-away")
        folder.rename(away)
        gone = re.compile(r"^serving_models_folder_gone 1", re.MULTILINE)
        assert until(lambda: gone.search(text(f"{server.url}/metrics")), 30) < 30
        go.touch()
        assert until(lambda: "a worker that starts can't load it" in server.output(), 30) < 30
        late = time.monotonic() + 2  # it would take requests at once
        while time.monotonic() < late:
            assert predict(server.url) == 200
        away.rename(folder)
        assert until(lambda: ready(server, 2), 60) < 60
        assert {predict(server.url) for _ in range(20)} == {200}


MOUNTS = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
in_a_mount_namespace = pytest.mark.skipif(not MOUNTS, reason="mounting needs rights that this user has not")


@in_a_mount_namespace
def test_a_read_only_models_folder_serves(folder: Path) -> None:
    """A folder that can't be written serves as any other."""
    mount = f'mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec "$@"'
    with started(folder, wrapper=("unshare", "-m", "sh", "-c", mount, "sh")) as (process, url):
        assert predict(url) == 200
        process.terminate()
        assert process.wait(30) == 0
    assert sorted(os.listdir(folder)) == ["iris"]


@in_a_mount_namespace
def test_an_unmounted_volume_takes_nothing_down(folder: Path, tmp_path: Path) -> None:
    """The server serves on beside an empty mount point, says so, and follows the volume when it is there again."""
    volume = tmp_path / "mnt"
    volume.mkdir()
    mount = f'mount -t tmpfs none {volume} && cp -r {folder}/iris {volume} && exec "$@"'
    wrapper = ("unshare", "-m", "sh", "-c", mount, "sh")
    with (
        (tmp_path / "log").open("w+") as log,
        started(volume, "--workers", "2", wrapper=wrapper, stdout=log, stderr=log) as (process, url),
    ):

        def inside(*command: str) -> None:
            subprocess.run(["nsenter", "-t", str(process.pid), "-m", *command], check=True)

        def gone() -> str:
            return re.findall(r"^serving_models_folder_gone (.*)", text(f"{url}/metrics"), re.M)[0]

        assert until(lambda: (tmp_path / "log").read_text().count(" models, ") == 2, 30) < 30, "both have loaded"
        assert gone() == "0.0"
        inside("umount", str(volume))
        assert until(lambda: gone() == "1.0", 30) < 30
        assert "is its volume mounted?" in text(f"{url}/v1/models")
        both = set(_children(process.pid))
        os.kill(min(both), signal.SIGKILL)
        until_s = time.monotonic() + 5
        while time.monotonic() < until_s:
            assert predict(url) == 200, "a worker that comes does not answer before it has what the other one serves"
        inside("mount", "-t", "tmpfs", "none", str(volume))
        inside("cp", "-r", f"{folder}/iris", str(volume))
        assert until(lambda: gone() == "0.0", 30) < 30
        shutil.copytree(MODELS / "iris" / "2", folder / "iris" / "7")
        inside("cp", "-r", f"{folder}/iris/7", f"{volume}/iris/7")
        assert until(lambda: '"7"' in text(f"{url}/v1/models/iris"), 30) < 30
    assert list(volume.iterdir()) == [], "nothing is written into the bare mount point"


@in_a_mount_namespace
def test_a_full_disk_stops_nothing(folder: Path, tmp_path: Path) -> None:
    """With no room for its files the server answers, counts its own, replaces workers and ends with 0."""
    small = tmp_path / "full"
    small.mkdir()
    fill = f'mount -t tmpfs -o size=64k none {small} && head -c 1m /dev/zero > {small}/fill; exec "$@"'
    wrapper = ("unshare", "-m", "sh", "-c", fill, "sh")
    with started(folder, wrapper=wrapper, environment={"TMPDIR": str(small)}) as (process, url):
        assert predict(url) == 200
        assert "serving_predictions_total" in text(f"{url}/metrics")
        (worker,) = _children(process.pid)
        os.kill(worker, signal.SIGKILL)
        assert until(lambda: _children(process.pid) not in ([], [worker]) and status(url) == 200, 60) < 60
        assert predict(url) == 200
        process.terminate()
        assert process.wait(30) == 0
