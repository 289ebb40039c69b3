"""What a connection does, byte by byte, over fast path and plain ASGI: raw sockets, no client library between."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.conftest import Server, faulty, running
from tests.drills import heads
from tests.drills.drill import Report

Wait = Callable[[Callable[[], bool]], None]
ROW = [5.1, 3.5, 1.4, 0.2]
BODY = json.dumps({"instances": [ROW]}).encode()
PATH = "/v1/models/iris:predict"


def post(body: bytes = BODY, *, path: str = PATH, version: str = "1.1", headers: tuple[str, ...] = ()) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Connection:
    """A client that sends bytes and reads whole answers."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self._data = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_all(self, parts: Iterable[bytes]) -> None:
        for part in parts:
            self.send(part)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        while b"\r\n\r\n" not in self._data:
            self._more()
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", 0))
        while len(self._data) < length:
            self._more()
        body, self._data = self._data[:length], self._data[length:]
        return int(first.split()[1]), headers, body

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        self._data += data

    def is_closed(self) -> bool:
        try:
            return self._data == b"" and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@contextmanager
def connected(server: Server) -> Iterator[Connection]:
    connection = Connection(server)
    with connection.socket:
        yield connection


def labels(body: bytes) -> list[str]:
    return [p["label"] for p in json.loads(body)["predictions"]]


def test_a_connection_is_kept_for_many_requests(server: Server) -> None:
    """Requests of different paths, lengths and outcomes follow each other on one connection."""
    with connected(server) as connection:
        for _ in range(3):
            connection.send(post())
            assert labels(connection.answer()[2]) == ["setosa"]
            connection.send(post(b"{"))
            assert connection.answer()[0] == 400
            connection.send(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
            assert connection.answer()[0] == 200
            connection.send(post(json.dumps({"instances": [ROW] * 5}).encode()))
            assert len(labels(connection.answer()[2])) == 5


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    """Many requests sent before any answer is read come back in their order, whoever answers them."""
    with connected(server) as connection:
        wanted: list[tuple[int, int]] = []
        sent = b""
        for index in range(120):
            if index % 7 == 3:
                sent += b"GET /v2/models/iris HTTP/1.1\r\nHost: test\r\n\r\n"
                wanted.append((200, 0))
            elif index % 7 == 5:
                sent += post(b"[]")
                wanted.append((400, 0))
            elif index % 11 == 6:
                sent += post(path="/v1/models/nope:predict")
                wanted.append((404, 0))
            else:
                sent += post(json.dumps({"instances": [ROW] * (index + 1)}).encode())
                wanted.append((200, index + 1))
        connection.send(sent)
        for status, rows in wanted:
            got, _, body = connection.answer()
            assert got == status
            if rows:
                assert len(labels(body)) == rows


def test_a_request_may_come_byte_by_byte(server: Server) -> None:
    """Where the network cuts a request does not matter."""
    with connected(server) as connection:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for byte in post():
                connection.send(bytes([byte]))
            assert labels(connection.answer()[2]) == ["setosa"]


def test_two_requests_in_one_packet_and_a_half(server: Server) -> None:
    """The end of one request and the beginning of the next may share a packet."""
    with connected(server) as connection:
        one = post()
        connection.send(one)
        connection.answer()
        connection.send(one + one + one[:40])
        assert [labels(connection.answer()[2]) for _ in range(2)] == [["setosa"]] * 2
        connection.send(one[40:])
        assert labels(connection.answer()[2]) == ["setosa"]


@pytest.mark.parametrize(
    ("request_bytes", "closes"),
    [
        (post(version="1.0"), True),
        (post(headers=("Connection: close",)), True),
        (
            f"POST {PATH} HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
            False,
        ),
        (post(headers=("Content-Encoding: identity",)), False),
        (post(headers=("Upgrade: h2c",)), False),
        (post(path=PATH + "?x=1"), False),
        (post(path=PATH.replace("iris", "%69ris")), False),
    ],
    ids=["http-1.0", "connection-close", "chunked", "coding", "upgrade", "query", "quoted"],
)
def test_unusual_requests_are_answered_too(server: Server, request_bytes: bytes, closes: bool) -> None:
    """What the fast path does not take is answered by the ordinary path, on the same connection."""
    with connected(server) as connection:
        connection.send(post())
        plain = connection.answer()
        connection.send(request_bytes)
        status, headers, body = connection.answer()
        assert (status, body) == (200, plain[2])
        assert headers["content-type"] == plain[1]["content-type"]
        if closes:
            assert connection.is_closed()
        else:
            connection.send(post())
            assert connection.answer()[2] == plain[2]


def test_expect_100_continue_is_answered_before_the_body(server: Server) -> None:
    """A client that asks first is told to go on, and then answered."""
    with connected(server) as connection:
        head, _, body = post(headers=("Expect: 100-continue",)).partition(b"\r\n\r\n")
        connection.send(head + b"\r\n\r\n")
        assert connection.answer()[0] == 100
        connection.send(body)
        assert labels(connection.answer()[2]) == ["setosa"]


def test_http_1_0_is_answered_as_it_knows(server: Server) -> None:
    """HTTP/1.0 has neither chunks nor interim answers: what has no length ends with the connection."""
    rows = b'{"sepal_length":5.1,"sepal_width":3.5,"petal_length":1.4,"petal_width":0.2}\n'
    for kind, body, end in (
        ("application/json", BODY, b"}]}"),
        ("application/x-ndjson", rows, b'"good":1,"bad":0}}\n'),
    ):
        with connected(server) as connection:
            headers = (f"Content-Type: {kind}", "Expect: 100-continue", "Connection: keep-alive")
            connection.send(post(body, headers=headers, version="1.0"))
            with connection.socket.makefile("rb") as file:
                head, _, answer = file.read().partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            assert b"transfer-encoding" not in head
            assert answer.startswith(b"{")
            assert answer.endswith(end)


def test_broken_http_is_a_400_and_closes(server: Server) -> None:
    """What is no HTTP gets a 400, and others are not disturbed."""
    with connected(server) as connection:
        connection.send(b"PREDICT iris\r\n\r\n")
        assert connection.answer()[0] == 400
        assert connection.is_closed()
    with connected(server) as connection:
        connection.send(post())
        assert connection.answer()[0] == 200


def test_answers_without_a_head_of_their_own_differ_in_nothing(server: Server) -> None:
    """A head that was seen before is answered as at the first time, whatever id it carries."""
    with connected(server) as connection:
        bodies = set()
        for identity in ("a", "b", "a"):
            connection.send(post(headers=(f"X-Request-ID: {identity}",)))
            _, headers, body = connection.answer()
            assert headers["x-request-id"] == identity
            bodies.add(body)
        ids = set()
        for _ in range(3):
            connection.send(post())
            _, headers, body = connection.answer()
            ids.add(headers["x-request-id"])
            bodies.add(body)
        assert len(bodies) == 1
        assert len(ids) == 3


def test_the_limit_of_a_body_holds_behind_a_head_that_is_known() -> None:
    """A body above the limit is refused whatever came before it on its connection."""
    long = json.dumps({"instances": [ROW] * 200}).encode()
    with running("--max-json-bytes", "1024") as server, connected(server) as connection:
        for body, due in ((BODY, 200), (BODY, 200), (long, 413)):
            connection.send(post(body))
            assert connection.answer()[0] == due


def test_a_slow_reader_is_not_read_from(server: Server) -> None:
    """A client that reads no answers can't send for ever; when it reads, it gets them in order."""
    with connected(server) as connection:
        connection.socket.settimeout(1.5)
        bodies = [json.dumps({"instances": [ROW] * rows}).encode() for rows in range(10, 30)]
        endless = (post(bodies[i % 20]) for i in range(100_000))
        with pytest.raises(TimeoutError):  # the socket buffers on the way hold far less
            connection.send_all(endless)
        connection.socket.settimeout(20)
        for i in range(200):
            assert len(labels(connection.answer()[2])) == 10 + i % 20


def test_clients_that_leave_leave_nothing(server: Server, eventually: Wait) -> None:
    """Connections dropped before their answer leave no request in flight and no row in the queue."""
    for _ in range(100):
        with connected(server) as connection:
            connection.send(post(json.dumps({"instances": [ROW] * 50}).encode()) * 3)

    def quiet() -> bool:
        text = httpx.get(f"{server.url}/metrics").text
        lines = [
            line
            for line in text.splitlines()
            if line.startswith(("serving_queued_rows{", "serving_http_in_flight{")) and "/metrics" not in line
        ]
        return bool(lines) and all(line.endswith(" 0.0") for line in lines)

    eventually(quiet)


def has_read(server: Server, connection: Connection) -> bool:
    """Tell whether the server has read all that was sent: nothing waits at either end of the connection."""
    ports = {connection.socket.getsockname()[1], server.port}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, here, there, _, waiting, *_ = line.split()
        if {int(end.rpartition(":")[2], 16) for end in (here, there)} == ports and waiting != "00000000:00000000":
            return False
    return True


def accepts_none(server: Server) -> bool:
    """Tell whether the server has closed its listening socket: it drains."""
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("fast_path", ["--fast-path", "--no-fast-path"])
def test_a_request_that_is_half_sent_at_sigterm_is_answered(fast_path: str, eventually: Wait) -> None:
    """SIGTERM in the middle of a request: it is answered, the connection closed, the process ends with 0."""
    with running(fast_path) as server, connected(server) as connection:
        request = post()
        connection.send(post())
        connection.answer()
        connection.send(request[:-10])
        eventually(lambda: has_read(server, connection))
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: accepts_none(server))
        connection.send(request[-10:])
        status, headers, body = connection.answer()
        assert status == 200
        assert labels(body) == ["setosa"]
        assert headers.get("connection") == "close"
        assert connection.is_closed()
        assert server.process.wait(20) == 0


def test_a_draining_server_says_that_it_is_not_ready(eventually: Wait) -> None:
    """From SIGTERM on readiness is 503, for whoever still has a connection."""
    with running() as server, connected(server) as connection:
        connection.send(post()[:-10])
        eventually(lambda: has_read(server, connection))
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: accepts_none(server))
        connection.send(post()[-10:] + b"GET /v2/health/ready HTTP/1.1\r\nHost: t\r\n\r\n")
        assert connection.answer()[0] == 200
        assert connection.answer()[0] == 503


def test_fast_path_and_asgi_answer_with_the_same_bytes() -> None:
    """For the same request both paths give the same status, body and headers, but for date and id."""
    requests = [
        post(),
        post(b""),
        post(b"{"),
        post(b'{"instances":[]}'),
        post(json.dumps({"instances": [ROW] * 1000}).encode()),
        post(json.dumps({"instances": [ROW] * 1000}).encode(), headers=("Accept-Encoding: gzip",)),
        post(json.dumps({"instances": [[1]]}).encode(), headers=("X-Request-ID: a",)),
        post(path="/v1/models/iris/versions/1:predict"),
        post(b'{"inputs":[]}', path="/v2/models/iris/infer"),
        post(b"{}", path="/v2/models/penguins/infer"),
        post(b"{}", path="/v1/models/none:predict"),
    ]

    def answers(*flags: str) -> list[tuple[int, dict[str, str], bytes]]:
        with running(*flags) as server, connected(server) as connection:
            got = []
            for request in requests:
                connection.send(request)
                status, headers, body = connection.answer()
                del headers["date"]
                if b"X-Request-ID" not in request:
                    del headers["x-request-id"]
                got.append((status, headers, body))
            return got

    assert answers("--fast-path") == answers("--no-fast-path")


@pytest.mark.parametrize(
    "bad",
    [b"\x00\x01 nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 20_000)],
)
def test_what_cannot_be_read_costs_no_request_before_it(server: Server, bad: bytes) -> None:
    """A good request is answered though what comes behind it, even in one packet, is refused."""
    for good in (post(), post(path="/v2/models/iris/versions/1/infer"), b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"):
        with connected(server) as connection:
            connection.send(good + bad)
            first, second = connection.answer(), connection.answer()
            assert first[0] in (200, 400)
            assert "connection" not in first[1]
            assert second[0] in (400, 431)
            assert second[1]["connection"] == "close"
            assert connection.is_closed()


@pytest.mark.parametrize("fast_path", ["--fast-path", "--no-fast-path"])
def test_what_cannot_be_read_cuts_no_long_answer(fast_path: str) -> None:
    """An answer of megabytes that is being written comes whole, whatever the client sends meanwhile; then a 400."""
    rows = 60_000
    long = post(json.dumps({"instances": [ROW] * rows}).encode())
    chunked = f"POST {PATH} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with running(fast_path, "--max-queued-rows", str(rows)) as server:
        for bad in (b"\x00 nonsense\r\n\r\n", chunked + b"nonsense\r\n"):
            with connected(server) as connection:
                connection.send(long)
                while b"predictions" not in connection._data:
                    connection._more()
                connection.send(bad)
                time.sleep(0.1)  # unread, the answer fills the buffers on the way
                status, _, body = connection.answer()
                assert (status, len(labels(body))) == (200, rows)
                status, headers, _ = connection.answer()
                assert (status, headers["connection"]) == (400, "close")
                assert connection.is_closed()


def test_pipelines_are_answered_as_by_plain_asgi_wherever_they_are_cut() -> None:
    """However requests, some of them hostile, are cut and mixed over connections, none changes another's answer."""
    report = Report()
    heads.run(report, rounds=250, every_cut=1)
    assert report.kept, report.broken()


@pytest.mark.parametrize("requests", [post(), post() * 3, post(version="1.0"), b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_client_that_says_no_more_gets_its_answers(server: Server, requests: bytes) -> None:
    """Who shuts the sending half down behind its requests is answered each of them, and then the connection ends."""
    with connected(server) as connection:
        connection.send(requests)
        connection.socket.shutdown(socket.SHUT_WR)
        for _ in range(requests.count(b"HTTP/1.")):
            assert connection.answer()[0] == 200
        assert connection.is_closed()


def test_a_request_that_is_cut_short_is_not_answered_as_if_it_were_whole(server: Server) -> None:
    """Who ends in the middle of a request gets the answers to those before it, and none to the rest."""
    with connected(server) as connection:
        connection.send(post() + post()[:-3])
        connection.socket.shutdown(socket.SHUT_WR)
        assert connection.answer()[0] == 200
        with contextlib.suppress(EOFError):
            assert connection.answer()[0] == 400
        assert connection.is_closed()


def test_a_client_that_waits_long_and_says_no_more_is_answered() -> None:
    """While a slow answer is due, one that has only shut its half down is told to wait, and then answered."""
    for fast_path in ("--fast-path", "--no-fast-path"):
        with faulty({"slow": 0.5}, fast_path) as server, connected(server) as connection:
            connection.send(post())
            connection.socket.shutdown(socket.SHUT_WR)
            assert connection.answer()[0] == 100
            assert labels(connection.answer()[2]) == ["setosa"]
            assert connection.is_closed()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
@pytest.mark.parametrize(
    "path", [PATH, "/v1/models/iris/versions/1:predict", "/v2/models/iris/infer", "/v1/models/iris:feedback"]
)
def test_a_prediction_path_names_its_method(client: httpx.Client, method: str, path: str) -> None:
    """Other methods than POST are a 405 that allows POST, not a model of a strange name."""
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("target", "status"), [("http://test", 404), ("http://test?a=b", 404), ("http://test/v2", 200)]
)
def test_a_target_may_be_absolute(server: Server, target: str, status: int) -> None:
    """A request target with a host in it is legal (RFC 9112, 3.2.2), and so is one that has no path."""
    with connected(server) as connection:
        connection.send(f"GET {target} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        assert connection.answer()[0] == status
        connection.send(post(path="http://test" + PATH))
        assert labels(connection.answer()[2]) == ["setosa"]
