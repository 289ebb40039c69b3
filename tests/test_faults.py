"""What happens when workers die, hang or are told to end, and when requests do harm: some of it drills in short."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.conftest import Server, faulty, running
from tests.drills.batches import departed
from tests.drills.canaries import canaries
from tests.drills.draining import draining
from tests.drills.drill import Report
from tests.drills.lent_sockets import lent_sockets
from tests.drills.poison import poison
from tests.drills.steady import PATH, ROW, Load, until
from tests.drills.workers import copied, killing_model, post, ready, workers

Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A models folder with the two versions of iris."""
    return copied(tmp_path)


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
    lent_sockets(report, clients=2, rounds=15)
    assert not report.broken()


def test_a_poisoned_batch_and_departed_clients() -> None:
    """Among strangers only the culprit fails; who leaves while waiting is not run."""
    report = Report()
    poison(report, rounds=0, requests=80)
    departed(report, clients=60)
    assert not report.broken()


def test_reload_takes_new_settings_without_a_failed_request(folder: Path) -> None:
    """SIGHUP reads the file again and replaces workers one by one; a broken file changes nothing, and is named.

    Nor does one with which no worker starts.
    """
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
        config.write_text("max_batch_rows = 16\napp = 'nothing_here:app'\n")
        server.process.send_signal(signal.SIGHUP)
        assert until(lambda: "the reload is given up" in server.output(), 60) < 60
        assert until(lambda: workers(server) == before) < 30
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


def test_a_reload_waits_where_the_system_gives_no_process(folder: Path) -> None:
    """The worker that serves stays until there is another, and what is tried again and again leaves nothing behind."""
    full = folder.with_name(f"{folder.name}-full")
    with faulty({"no_process": str(full)}, models=folder) as server:
        before = workers(server)
        full.touch()

        def refused(times: int) -> int:
            """Return how many files the parent has open when so many workers could not be started."""
            assert until(lambda: server.output().count("can't be started") >= times) < 30
            return len(os.listdir(f"/proc/{server.process.pid}/fd"))

        server.process.send_signal(signal.SIGHUP)
        open_files = refused(1)
        assert refused(6) < open_files + 5
        assert workers(server) == before
        assert predict(server.url) == 200
        full.unlink()
        assert until(lambda: "every worker is new" in server.output(), 60) < 60
        assert not workers(server) & before


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
            assert until(lambda: 'in_flight{method="POST",route="/v1/models/{model}:predict"} 1' in text(url)) < 30
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
        assert until(lambda: 'in_flight{method="POST",route="/v1/models/{model}:predict"} 5' in text(url)) < 30
        server.process.send_signal(signal.SIGTERM)
        assert until(lambda: status(server.url) == 0) < 30
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        for thread in asking:
            thread.join(10)
        assert outcomes == {503: 5}


def text(url: str) -> str:
    return httpx.get(url, timeout=30).text


def test_the_end_of_the_grace_time_refuses_what_is_left() -> None:
    """The same without a second signal, once the drain time is over."""
    with faulty({"slow": 60.0}, "--drain-s", "1") as server:
        outcomes: Counter[int] = Counter()
        asking = threading.Thread(target=lambda: outcomes.update([post(server, ROW)]))
        asking.start()
        url = f"{server.url}/metrics"
        assert until(lambda: 'in_flight{method="POST",route="/v1/models/{model}:predict"} 1' in text(url)) < 30
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        asking.join(10)
        assert outcomes == {503: 1}


def test_a_worker_that_is_deaf_is_noticed_and_replaced() -> None:
    """A worker that hears nothing of what is to be served shows in readiness and metrics, and is replaced."""
    with faulty({"deaf": 13.0}, "--hang-s", "4") as server:
        (old,) = workers(server)
        assert until(lambda: httpx.get(f"{server.url}/v2/health/ready").json()["lag_s"] == 0) < 30
        assert predict(server.url) == 200
        assert httpx.post(f"{server.url}{PATH}", content=ROW.replace(b"5.1", b"13.0"), timeout=30).status_code == 200
        assert until(lambda: httpx.get(f"{server.url}/v2/health/ready").json()["lag_s"] > 1) < 30
        lag = re.compile(r'serving_worker_lag_seconds\{worker="0"\} (\S+)')
        assert until(lambda: float(lag.findall(text(f"{server.url}/metrics"))[0]) > 1) < 30
        assert until(lambda: old not in workers(server) and ready(server), 60) < 60
        assert "worker 0 is deaf" in server.output()
        assert server.output().count("is deaf") == 1
        assert 'serving_worker_restarts_total{reason="hang"} 1.0' in text(f"{server.url}/metrics")


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
        assert 'serving_worker_restarts_total{reason="hang"} 1.0' in text(f"{server.url}/metrics")


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
