"""The process that reads and writes streams: what kills it costs the streams that it had, and nobody else."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from serving.bulk.streams import StreamProcess
from serving.errors import NotReady
from tests.bulk.test_formats import IRIS, described, ndjson
from tests.bulk.test_streams import NDJSON, ask
from tests.conftest import Server, running

Wait = Callable[[Callable[[], bool]], None]
HEAD = b"POST /v1/models/iris:predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as made:
        yield made


def processes(server: Server) -> list[int]:
    """Return the pids of the worker's process for streams, and of those that it has forked, in this order."""
    return [pid for pid in descendants(server.process.pid) if b"stream_process" in command(pid)]


def descendants(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                found += [int(child) for child in task.read_text().split()]
    return found[1:]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def begun(server: Server) -> socket.socket:
    """Begin a stream that goes on."""
    sock = socket.create_connection(("127.0.0.1", server.port), 20)
    row = ndjson([IRIS])
    sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(row), row))
    got = b""
    while b"}}}\n" not in got:
        got += sock.recv(65536)
    return sock


def test_a_stream_whose_process_is_killed_is_cut_and_others_go_on(server: Server, eventually: Wait) -> None:
    """Its answer has no end, so nobody takes it for whole, and the log says why; another stream is answered."""
    with begun(server) as first, begun(server) as second:
        stream = processes(server)[1]
        os.kill(stream, signal.SIGKILL)
        rest = b""
        while some := first.recv(65536):
            rest += some
        assert not rest.endswith(b"0\r\n\r\n")
        second.sendall(b"0\r\n\r\n")
        assert b'"good":1' in second.recv(65536)
    eventually(lambda: "the process of a stream of rows has ended" in server.output())
    assert "Traceback" not in server.output()


def test_another_process_is_started_where_it_was_killed(server: Server, client: httpx.Client, eventually: Wait) -> None:
    """All who ask next find a new one, also at once; a stream that the old one had goes on."""
    with begun(server) as sock:
        old = processes(server)[0]
        os.kill(old, signal.SIGKILL)
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(ask, client, ndjson([IRIS]), NDJSON) for _ in range(6)]
            assert all(b'"good":1' in answer.result().content for answer in answers)
        assert processes(server)[0] != old
        sock.sendall(b"0\r\n\r\n")
        assert b'"good":1' in sock.recv(65536)
    eventually(lambda: len(processes(server)) == 1)  # those of ended streams have ended


def test_nothing_of_it_is_left_when_the_server_ends(eventually: Wait) -> None:
    """Also where the server is killed amid a stream."""
    with running() as server, begun(server):
        left = processes(server)
        assert len(left) == 2
        for pid in set(descendants(server.process.pid)) - set(left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(command, left)))


def test_it_ends_when_there_has_been_no_stream_for_long() -> None:
    """While a stream is open it stays."""
    ours, theirs = socket.socketpair()
    code = f"from serving.bulk import stream_process as p; p.IDLE_S = 0.3; p.main({theirs.fileno()})"
    with ours, theirs, subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()]) as process:
        assert ours.recv(1)
        pairs = [socket.socketpair() for _ in range(3)]
        socket.send_fds(ours, [b"\0"], [pair[1].fileno() for pair in pairs])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        for pair in pairs:
            for sock in pair:
                sock.close()
        assert process.wait(20) == 0


def test_threads_do_not_take_the_memory_of_a_stream() -> None:
    """Arrow has one thread, also where there are 64 processors: the stacks of so many would leave nothing for rows."""
    ours, theirs = socket.socketpair()
    code = f"from serving.bulk import stream_process as p; p.main({theirs.fileno()})"
    command = [sys.executable, "-c", f"{code}; print(p.pa.cpu_count())"]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE) as process:
        ours.shutdown(socket.SHUT_WR)
        assert process.communicate(timeout=20)[0] == b"1\n"


@pytest.mark.parametrize("fault", ["program", "descriptors"])
def test_a_process_that_does_not_start_is_told(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asks is told to come back, and the log has the reason: no such program, or no descriptors."""

    def no_descriptors() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    if fault == "program":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    else:
        monkeypatch.setattr(socket, "socketpair", no_descriptors)
    with pytest.raises(NotReady, match="come back later"):
        StreamProcess().open(described("iris"), "ndjson", "csv")
    assert "does not start" in caplog.text
    assert ("/nowhere/python" if fault == "program" else "Too many open files") in caplog.text
