"""What happens when the world around the server breaks: disks, descriptors, logs, clocks, folders; and short drills."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.log_pipe import MOST_LINES, LogPipe
from serving.repository.quarantine import Quarantine, select_culprit
from serving.repository.state_directory import state_folder
from tests.conftest import MODELS, ROOT, Server, faulty, running
from tests.drills.batches import departed
from tests.drills.canaries import canaries
from tests.drills.draining import draining
from tests.drills.drill import Report
from tests.drills.lent_sockets import lent_sockets
from tests.drills.poison import poison
from tests.drills.steady import PATH, ROW, Load, until
from tests.drills.workers import copied, default_version, killing_model, post, ready, workers

Wait = Callable[[Callable[[], bool]], None]


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


def status(url: str) -> int:
    """Return the status of the readiness check; 0 where nobody answers."""
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=10).status_code
    except httpx.TransportError:
        return 0


def predict(url: str) -> int:
    return httpx.post(f"{url}{PATH}", content=ROW, timeout=30).status_code


def test_draining_loses_nothing() -> None:
    """SIGTERM under load: every request is answered, the last with `connection: close`, and the status is 0."""
    report = Report()
    draining(report, times=1, connections=6)
    assert not report.broken()


def test_a_model_that_kills_is_quarantined() -> None:
    """The second death puts the version in quarantine; the one before it serves; readiness and a metric tell."""
    report = Report()
    killing_model(report, control=False)
    assert not report.broken()


def test_a_canary_is_judged_by_what_it_did() -> None:
    """Other files in its place, or a server that dies, begin it again; a worker that dies then takes it back."""
    report = Report()
    canaries(report, long=False)
    assert not report.broken()


def test_threads_answer_their_own_callers() -> None:
    """Answers that a model's thread writes itself are whole, once and their caller's, whatever clients do meanwhile."""
    report = Report()
    lent_sockets(report, clients=2, rounds=60)
    assert not report.broken()


def test_a_poisoned_batch_and_departed_clients() -> None:
    """Among strangers only the culprit fails; who leaves while waiting is not run."""
    report = Report()
    poison(report, rounds=0, requests=300)
    departed(report, clients=200)
    assert not report.broken()


def test_reload_takes_new_settings_without_a_failed_request(folder: Path) -> None:
    """SIGHUP reads the file again and replaces workers one by one; a broken file changes nothing, and is named."""
    config = folder / "serving.toml"
    config.write_text("max_batch_rows = 8\n")
    with running("--workers", "2", "--config", str(config), models=folder) as server:
        assert until(lambda: ready(server, 2), 60) < 60
        before = workers(server)

        def limit() -> int:
            return int(httpx.get(f"{server.url}/v2/models/iris/config", timeout=30).json()["max_batch_size"])

        config.write_text("max_batch_rows = nonsense\n")
        server.process.send_signal(signal.SIGHUP)
        assert until(lambda: "the old one stays" in server.output()) < 30
        assert workers(server) == before
        config.write_text("max_batch_rows = 16\nhost = '0.0.0.0'\n")
        load = Load(server.port, connections=4)
        with load.running():
            server.process.send_signal(signal.SIGHUP)
            assert until(lambda: "every worker is new" in server.output(), 60) < 60
        assert set(load.outcomes) == {"ok"}, load.outcomes
        assert until(lambda: ready(server, 2, but=before)) < 30
        assert not workers(server) & before
        assert {limit() for _ in range(6)} == {16}
        assert "host can only change with a restart" in server.output()


def test_sigterm_during_a_reload_answers_what_the_leaving_worker_accepted(folder: Path) -> None:
    """A worker that a reload has told to drain is not hurried by the end of the server."""
    with faulty({"slow": 5.0}, models=folder) as server:
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(post(server, ROW)))
        with socket.create_connection(("127.0.0.1", server.port), 30) as idle:
            idle.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\n\r\n")
            assert idle.recv(4096)
            asking.start()
            url = f"{server.url}/metrics"
            assert until(lambda: 'in_flight{method="POST",route="/v1/models/{model}:predict"} 1' in _text(url)) < 30
            server.process.send_signal(signal.SIGHUP)
            while idle.recv(4096):  # until the worker closes it, as one that drains does
                pass
        server.process.send_signal(signal.SIGTERM)
        asking.join(30)
        assert answers == [200]
        assert server.process.wait(30) == 0


def test_a_second_sigterm_refuses_what_is_left() -> None:
    """With a model that takes long, the second SIGTERM answers 503 to all that waits, and the status is 0."""
    with faulty({"slow": 60.0}, "--drain-s", "60") as server:
        outcomes: Counter[int] = Counter()
        asking = [threading.Thread(target=lambda: outcomes.update([post(server, ROW)])) for _ in range(5)]
        for thread in asking:
            thread.start()
        url = f"{server.url}/metrics"
        assert until(lambda: 'in_flight{method="POST",route="/v1/models/{model}:predict"} 5' in _text(url)) < 30
        server.process.send_signal(signal.SIGTERM)
        assert until(lambda: status(server.url) == 0) < 30
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        for thread in asking:
            thread.join(10)
        assert outcomes == {503: 5}


def _text(url: str) -> str:
    return httpx.get(url, timeout=30).text


def test_the_end_of_the_grace_time_refuses_what_is_left() -> None:
    """The same without a second signal, once the drain time is over."""
    with faulty({"slow": 60.0}, "--drain-s", "1") as server:
        outcomes: Counter[int] = Counter()
        asking = threading.Thread(target=lambda: outcomes.update([post(server, ROW)]))
        asking.start()
        url = f"{server.url}/metrics"
        assert until(lambda: 'in_flight{method="POST",route="/v1/models/{model}:predict"} 1' in _text(url)) < 30
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        asking.join(10)
        assert outcomes == {503: 1}


def test_a_worker_that_is_deaf_is_noticed_and_replaced() -> None:
    """A worker that hears nothing of what is to be served shows in readiness and metrics, and is replaced."""
    with faulty({"deaf": 13.0}, "--hang-s", "4") as server:
        (old,) = workers(server)
        assert httpx.get(f"{server.url}/v2/health/ready").json()["lag_s"] == 0
        assert predict(server.url) == 200
        assert httpx.post(f"{server.url}{PATH}", content=ROW.replace(b"5.1", b"13.0"), timeout=30).status_code == 200
        assert until(lambda: httpx.get(f"{server.url}/v2/health/ready").json()["lag_s"] > 1) < 30
        lag = re.compile(r'serving_worker_lag_seconds\{worker="0"\} (\S+)')
        assert until(lambda: float(lag.findall(_text(f"{server.url}/metrics"))[0]) > 1) < 30
        assert until(lambda: old not in workers(server) and ready(server), 60) < 60
        assert "worker 0 is deaf" in server.output()
        assert server.output().count("is deaf") == 1
        assert 'serving_worker_restarts_total{reason="hang"} 1.0' in _text(f"{server.url}/metrics")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_to_the_whole_group_drains_as_one_to_the_parent(number: signal.Signals) -> None:
    """systemd, `timeout` and Ctrl-C signal every process: what was accepted is answered, and the status is 0."""
    flags, faults = ("--workers", "2"), {"FAULTS": json.dumps({"slow": 0.1})}
    server = Server(*flags, module="tests.drills.faulty", environment=faults, own_group=True)
    try:
        server.wait()
        assert until(lambda: ready(server, 2), 60) < 60
        load = Load(server.port, connections=6)
        with load.running():
            until(lambda: load.answered > 12)
            os.killpg(server.process.pid, number)
            assert server.process.wait(30) == 0
        assert set(load.outcomes) <= {"ok", "refused"}, load.outcomes  # the latter: nobody listens any more
    finally:
        server.stop()


def test_a_drain_delay_is_unready_first_and_accepts_on() -> None:
    """With a drain delay a server says unready, answers whoever still comes, and ends with 0 when it is over."""
    with running("--workers", "2", "--drain-delay-s", "60") as server:
        assert until(lambda: ready(server, 2), 60) < 60
        server.process.send_signal(signal.SIGTERM)
        until(lambda: {status(server.url) for _ in range(8)} == {503})
        assert {predict(server.url) for _ in range(20)} == {200}
        server.process.send_signal(signal.SIGTERM)  # ends the delay
        assert server.process.wait(30) == 0
    with running("--drain-delay-s", "0.5") as server:  # ends by itself
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_a_worker_that_hangs_is_replaced() -> None:
    """A worker whose event loop stands still is found by its silence, killed, and another serves."""
    with faulty({"hang": 13.0}, "--hang-s", "2") as server:
        old = workers(server)
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{server.url}{PATH}", content=ROW.replace(b"5.1", b"13.0"), timeout=30)
        assert until(lambda: not workers(server) & old and ready(server), 60) < 60
        assert predict(server.url) == 200
        assert "gave no sign of life" in server.output()
        assert 'serving_worker_restarts_total{reason="hang"} 1.0' in _text(f"{server.url}/metrics")


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
        assert "serving_predictions_total" in _text(f"{url}/metrics")


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
        assert until(lambda: gone.search(_text(f"{server.url}/metrics")), 30) < 30
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
            return re.findall(r"^serving_models_folder_gone (.*)", _text(f"{url}/metrics"), re.M)[0]

        assert until(lambda: (tmp_path / "log").read_text().count(" models, ") == 2, 30) < 30, "both have loaded"
        assert gone() == "0.0"
        inside("umount", str(volume))
        assert until(lambda: gone() == "1.0", 30) < 30
        assert "is its volume mounted?" in _text(f"{url}/v1/models")
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
        assert until(lambda: '"7"' in _text(f"{url}/v1/models/iris"), 30) < 30
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
        assert "serving_predictions_total" in _text(f"{url}/metrics")
        (worker,) = _children(process.pid)
        os.kill(worker, signal.SIGKILL)
        assert until(lambda: _children(process.pid) not in ([], [worker]) and status(url) == 200, 60) < 60
        assert predict(url) == 200
        process.terminate()
        assert process.wait(30) == 0


def test_workers_that_die_at_once_are_called_a_crash_loop() -> None:
    """The waits grow, the log says it, and SIGTERM still ends the server with 0."""
    server = Server(module="tests.drills.faulty", environment={"FAULTS": json.dumps({"crash_at_start": True})})
    try:
        assert until(lambda: "is in a crash loop" in server.output(), 60) < 60
        waits = [float(wait) for wait in re.findall(r"its replacement starts in (\S+) s", server.output())]
        assert waits == sorted(waits)
        assert waits[-1] > waits[0]
    finally:
        code = server.stop()
    assert code == 0


def test_the_guilty_one_is_told_from_those_that_ran_beside_it() -> None:
    """Two deaths condemn a version; where another ran as often beside it, it takes four."""
    a, b = ("a", "1"), ("b", "1")
    assert select_culprit(Counter({a: 1}), [a]) is None
    assert select_culprit(Counter({a: 2}), [a]) == a
    assert select_culprit(Counter({a: 2, b: 1}), [a, b]) == a
    assert select_culprit(Counter({a: 2, b: 2}), [a, b]) is None
    assert select_culprit(Counter({a: 4, b: 4}), [a, b]) in (a, b)
    assert select_culprit(Counter(), []) is None


def test_a_quarantine_ends_with_the_file_that_earned_it(folder: Path) -> None:
    """A version is held back across restarts, and let go when its file is replaced; a broken record holds nothing."""
    Quarantine(folder).add("iris", "2", "it ended two workers")
    assert [(case.name, case.version) for case in Quarantine(folder).cases()] == [("iris", "2")]
    shutil.copy(MODELS / "iris" / "1" / "model.onnx", folder / "iris" / "2" / "model.onnx")
    assert Quarantine(folder).cases() == []
    (state_folder(folder) / "quarantine.json").write_text("{")
    assert Quarantine(folder).cases() == []


def test_a_quarantined_version_is_a_problem_with_its_reason(folder: Path) -> None:
    """What is in quarantine at the start is not loaded, and asking for it says why."""
    Quarantine(folder).add("iris", "2", "it ended two workers")
    with running(models=folder) as server:
        assert default_version(server) == "1"
        answer = httpx.post(f"{server.url}/v1/models/iris/versions/2:predict", content=ROW)
        assert answer.status_code == 503
        assert "quarantined: it ended two workers" in answer.json()["error"]


def test_a_quarantine_is_followed_while_it_serves(folder: Path, eventually: Wait) -> None:
    """What is put in quarantine serves no more, promoted or alone, nor can it be promoted; taken out, it serves."""
    shutil.copytree(MODELS / "digits", folder / "digits")
    (folder / "iris" / "traffic.json").write_text('{"generation": 1, "stable": "2"}')
    with running(models=folder) as server:
        digits = f"{server.url}/v2/models/digits/ready"
        assert default_version(server) == "2"
        Quarantine(folder).add("iris", "2", "it ended two workers")
        Quarantine(folder).add("digits", "1", "it ended two workers")
        eventually(lambda: default_version(server) == "1")
        eventually(lambda: httpx.get(digits).status_code == 503)
        assert "quarantined: it ended two workers" in httpx.get(digits).json()["error"]
        assert httpx.get(f"{server.url}/v2/health/ready").json()["not_served"] == ["digits 1", "iris 2", "iris"]
        tried = CliRunner().invoke(app, ["promote", "iris", "2", "--models", str(folder)])
        assert tried.exit_code == 1
        assert "quarantined: it ended two workers" in tried.output
        assert default_version(server) == "1"
        (state_folder(folder) / "quarantine.json").unlink()
        eventually(lambda: default_version(server) == "2")
        eventually(lambda: httpx.get(digits).status_code == 200)
