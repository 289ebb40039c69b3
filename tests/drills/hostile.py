"""Input made to hurt: each piece is answered 4xx or cut, at once, says nothing of the insides, and leaves nothing."""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.conftest import Server, running
from tests.drills.drill import Report, drill
from tests.drills.wire import resident, workers

PATH = "/v1/models/iris:predict"
INFER = "/v2/models/iris/infer"
SECRETS = re.compile(
    rb'Traceback|File "|site-packages|\.py\b|/root/|/home/|/tmp/|/proc/|0x[0-9a-f]{6,}|\bpid\b', re.IGNORECASE
)
NAMES = (
    "..",
    "../..",
    "%2e%2e",
    "%2e%2e%2firis",
    "%252e%252e",
    "%00",
    "iris%00",
    "..%5c..",
    "a%0d%0aX: y",
    "%1b[31m",
    "é",
    "x" * 256,
)
LIMIT_S = 0.2
MEMORY_MIB = 32.0


def post(body: bytes, path: str = PATH, *headers: str, version: str = "1.1", host: str = "Host: t") -> bytes:
    lines = [f"POST {path} HTTP/{version}", host, f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(filter(None, lines)).encode() + b"\r\n\r\n" + body


def framed(*headers: str, body: bytes = b"", host: str = "Host: t") -> bytes:
    return "\r\n".join(filter(None, [f"POST {PATH} HTTP/1.1", host, *headers])).encode() + b"\r\n\r\n" + body


def smuggled() -> dict[str, bytes]:
    """Return requests that two parsers could read in two ways; none of them may be answered 2xx."""
    chunked = "Transfer-Encoding: chunked"
    end = b"0\r\n\r\n"
    get = b"GET /v2 HTTP/1.1\r\n"
    return {
        "CL and TE": framed("Content-Length: 5", chunked, body=end),
        "TE and CL": framed(chunked, "Content-Length: 5", body=end),
        "two CL": framed("Content-Length: 2", "Content-Length: 3", body=b"{}x"),
        "same CL twice": framed("Content-Length: 2", "Content-Length: 2", body=b"{}"),
        "CL list": framed("Content-Length: 2, 2", body=b"{}"),
        "negative CL": framed("Content-Length: -2", body=b"{}"),
        "plus CL": framed("Content-Length: +2", body=b"{}"),
        "hex CL": framed("Content-Length: 0x2", body=b"{}"),
        "CL beyond 64 bits": framed("Content-Length: 99999999999999999999999", body=b"{}"),
        "empty CL": framed("Content-Length:", body=b"{}"),
        "CL in two words": framed("Content-Length: 2 2", body=b"{}"),
        "obs-fold": framed("Content-Length: 2", "X: a\r\n b", body=b"{}"),
        "folded TE": framed("Transfer-Encoding:\r\n chunked", body=end),
        "bare LF": framed("Content-Length: 2", body=b"{}").replace(b"\r\n", b"\n"),
        "bare LF in a head": framed("X: a\nContent-Length: 2", body=b"{}"),
        "bare CR": framed("X: a\rY: b", "Content-Length: 2", body=b"{}"),
        "space before colon": framed("Content-Length : 2", body=b"{}"),
        "TE identity": framed("Transfer-Encoding: identity", "Content-Length: 2", body=b"{}"),
        "TE xchunked": framed("Transfer-Encoding: xchunked", body=end),
        "TE not last": framed("Transfer-Encoding: chunked, identity", body=end),
        "TE gzip": framed("Transfer-Encoding: gzip, chunked", body=b"2\r\n{}\r\n" + end),
        "TE twice": framed(chunked, chunked, body=end),
        "TE with a tab": framed("Transfer-Encoding:\x0bchunked", body=end),
        "TE over 1.0": framed(chunked, body=b"2\r\n{}\r\n" + end).replace(b"HTTP/1.1", b"HTTP/1.0"),
        "chunk extension": framed(chunked, body=b"2;a=b\r\n{}\r\n" + end),
        "LF in an extension": framed(chunked, body=b"2;a\nb\r\n{}\r\n" + end),
        "negative chunk": framed(chunked, body=b"-2\r\n{}\r\n" + end),
        "plus chunk": framed(chunked, body=b"+2\r\n{}\r\n" + end),
        "0x chunk": framed(chunked, body=b"0x2\r\n{}\r\n" + end),
        "chunk beyond 64 bits": framed(chunked, body=b"fffffffffffffffff\r\n{}\r\n" + end),
        "chunk too long": framed(chunked, body=b"2\r\n{}xx\r\n" + end),
        "LF chunks": framed(chunked, body=b"2\n{}\n0\n\n"),
        "space behind a size": framed(chunked, body=b"2 \r\n{}\r\n" + end),
        "trailer": framed(chunked, body=b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n"),
        "no Host": framed("Content-Length: 2", body=b"{}", host=""),
        "two Hosts": framed("Host: u", "Content-Length: 2", body=b"{}"),
        "Host list": framed("Content-Length: 2", body=b"{}", host="Host: a, b"),
        "no Host, GET": get + b"\r\n",
        "NUL in a header": get + b"Host: t\r\nX: a\x00b\r\n\r\n",
        "no name": get + b"Host: t\r\n: b\r\n\r\n",
        "space first": get + b" Host: t\r\nHost: t\r\n\r\n",
        "HTTP/0.9": b"GET /v2\r\n\r\n",
        "HTTP/9.9": b"GET /v2 HTTP/9.9\r\nHost: t\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        "CONNECT": b"CONNECT evil:443 HTTP/1.1\r\nHost: t\r\n\r\n",
        "TRACE": b"TRACE / HTTP/1.1\r\nHost: t\r\n\r\n",
    }


def _tensor(**changes: Any) -> bytes:
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4], **changes}
    return json.dumps({"inputs": [tensor]}).encode()


def heavy() -> dict[str, bytes]:
    """Return requests that cost a server much where it is not careful."""
    bomb = gzip.compress(bytes(100 * 2**20), 9)
    names = json.dumps({"inputs": [], "outputs": [{"name": f"o{i}"} for i in range(100_000)]}).encode()
    deep = b'{"instances":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    objects = b'{"instances":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001
    chunks = framed("Transfer-Encoding: chunked", body=b"1\r\n \r\n" * 1_000_000 + b"0\r\n\r\n")
    return {
        "a million chunks": chunks,
        "gzip bomb": post(bomb, PATH, "Content-Encoding: gzip"),
        "deflate bomb to v2": post(bomb, INFER, "Content-Encoding: gzip"),
        "100 MB announced": framed("Content-Length: 104857600", body=bytes(2**20)),
        "100 MB in chunks": framed("Transfer-Encoding: chunked", body=(b"100000\r\n" + bytes(2**20) + b"\r\n") * 20),
        "deep arrays": post(deep),
        "deep arrays to v2": post(deep, INFER),
        "deep objects": post(objects),
        "huge dims": post(_tensor(shape=[2**40, 2**40]), INFER),
        "negative dims": post(_tensor(shape=[-1, 4]), INFER),
        "many dims": post(_tensor(shape=[1] * 100_000), INFER),
        "huge number": post(b'{"instances": [[1' + b"0" * 100_000 + b"]]}"),
        "100,000 outputs": post(names, INFER),
        "long key": post(b'{"' + b"k" * 10**6 + b'": 1}'),
        "16 KiB of URL": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
        "endless header": b"GET / HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 2**21,
        "5,000 headers": b"GET / HTTP/1.1\r\nHost: t\r\n" + b"X: a\r\n" * 5_000 + b"\r\n",
        "endless trailer": framed("Transfer-Encoding: chunked", body=b"0\r\nX: " + b"a" * 2**21),
        "endless extension": framed("Transfer-Encoding: chunked", body=b"2;" + b"a" * 2**21),
    }


def paths() -> dict[str, bytes]:
    """Return requests whose names try to leave the folder of models, or the line of a log."""
    made = {}
    for name in NAMES:
        for path in (f"/v1/models/{name}:predict", f"/v2/models/{name}/infer", f"/v2/repository/models/{name}/load"):
            made[f"POST {name[:20]} {path[-10:]}"] = (
                f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            )
        made[f"GET {name[:40]}"] = f"GET /v2/models/{name} HTTP/1.1\r\nHost: t\r\n\r\n".encode()
    made["id"] = post(b"{}", PATH, "X-Request-ID: a\x1b[31mb")
    made["long id"] = post(b"{}", PATH, "X-Request-ID: " + "a" * 4000)
    return made


@drill("hostile", "input made to hurt is refused or cut at once, tells nothing, and leaves nothing")
def run(report: Report, *, repetitions: int = 100, warm: int = 25, junk: int = 100_000, timed: bool = True) -> None:
    """`repetitions`: of each piece, behind `warm` rounds in which Python's arenas for small objects find their size.

    `junk`: names and methods that do not exist. `timed`: judge by the clock too.
    """
    pieces = {**smuggled(), **heavy(), **paths()}
    for fast_path in ("--fast-path", "--no-fast-path"):
        with running(fast_path, "--log-format", "json", "--grpc-port", "0") as server:
            for _ in range(warm):
                answers = {name: ask(server, piece) for name, piece in pieces.items()}
            _ask_junk(server, 300)
            _series(server)
            before = resident_mib(server)
            _forget_peak(server)
            slow: dict[str, float] = dict.fromkeys(pieces, 99.0)
            for _ in range(repetitions):
                for name, piece in pieces.items():
                    answers[name] = answer = ask(server, piece)
                    slow[name] = min(slow[name], answer[1])
            worst = peak_mib(server)
            series = _series(server)  # a busy machine may cut a piece for another reason than the last time
            _ask_junk(server, junk)
            after = settled(server, before + MEMORY_MIB / 4)
            wrong = sorted(
                name
                for name, (status, _, _) in answers.items()
                if not (status == 0 or 400 <= status < 500 or (status == 503 and name.endswith("/load")))
            )
            told = sorted(name for name, (_, _, text) in answers.items() if SECRETS.search(text))
            report.exactly(
                f"{fast_path}: pieces not refused, of {len(pieces)} {' '.join(wrong)}".rstrip(), len(wrong), 0
            )
            report.exactly(f"{fast_path}: answers that tell of the insides {' '.join(told)}".rstrip(), len(told), 0)
            report.exactly(
                f"{fast_path}: series of metrics that {junk} junk names and methods made", _series(server) - series, 0
            )
            report.at_most(f"{fast_path}: memory above the baseline while it lasts", worst - before, MEMORY_MIB, "MiB")
            report.at_most(f"{fast_path}: memory kept", after - before, MEMORY_MIB / 4, "MiB")
            report.exactly(f"{fast_path}: lines of the log that are no JSON object", broken_lines(server), 0)
            report.exactly(
                f"{fast_path}: a good request is answered", ask(server, post(b'{"instances":[[1,2,3,4]]}'))[0], 200
            )
            if timed:
                name = max(slow, key=slow.__getitem__)
                report.at_most(f"{fast_path}: slowest refusal ({name})", slow[name], LIMIT_S, "s")
    with running("--max-head-bytes", str(2**24)) as server:
        status, _, _ = ask(server, heavy()["16 KiB of URL"])
    report.control("without the bound on heads a long one is read, and answered 404", status == 404)


def ask(server: Server, piece: bytes) -> tuple[int, float, bytes]:
    """Send bytes; return the status (0: cut without a word), seconds until the first answer or cut, and the text."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.setblocking(False)
        began = time.perf_counter()
        left = memoryview(piece)
        while True:
            try:
                answer = client.recv(65536)
                break
            except BlockingIOError:
                pass
            except OSError:
                return 0, time.perf_counter() - began, b""
            try:
                if left:
                    left = left[client.send(left) :]
                    continue
            except BlockingIOError:
                pass
            except OSError:
                left = memoryview(b"")
            if time.perf_counter() - began > 10:
                return 999, 10.0, b""
            time.sleep(0.0005)
        seconds = time.perf_counter() - began
        status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
        return status, seconds, re.sub(rb"date: [^\r]*|x-request-id: [^\r]*", b"", answer)


@contextmanager
def _connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        yield client


def _ask_junk(server: Server, number: int) -> None:
    """Ask for models and by methods that do not exist, many in a packet."""
    methods = ("GET", "POST", "PUT", "PROPFIND", "PURGE", "MKCOL", "REPORT")
    with _connected(server) as client:
        for start in range(0, number, 50):
            packet = b"".join(
                f"{methods[i % 7]} /v{1 + i % 2}/models/junk{i}{(':predict', '/infer')[i % 2]} HTTP/1.1\r\n"
                f"Host: t\r\nContent-Length: 0\r\n\r\n".encode()
                for i in range(start, start + 50)
            )
            client.sendall(packet)
            seen = 0
            tail = b""
            while seen < 50:
                data = tail + client.recv(1 << 18)
                seen += data.count(b"HTTP/1.1 ")
                tail = data[-8:] if b"HTTP/1.1 " not in data[-8:] else b""


def _series(server: Server) -> int:
    text = httpx.get(f"{server.url}/metrics", timeout=20).text
    return sum(not line.startswith("#") for line in text.splitlines())


def settled(server: Server, bound: float) -> float:
    """Return the resident memory once it is below `bound`; Python collects among 20 s of good requests at the most."""
    until = time.monotonic() + 20
    while (now := resident_mib(server)) > bound and time.monotonic() < until:
        for _ in range(50):
            ask(server, post(b'{"instances":[[1,2,3,4]]}'))
    return now


def resident_mib(server: Server) -> float:
    """Return the resident memory of the workers, in MiB."""
    return sum(map(resident, workers(server)))


def peak_mib(server: Server) -> float:
    """Return the most that the workers have held since `_forget_peak`, in MiB, however short the moment."""
    status = [Path(f"/proc/{pid}/status").read_text() for pid in workers(server)]
    return sum(int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) for text in status) / 1024


def _forget_peak(server: Server) -> None:
    for pid in workers(server):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def broken_lines(server: Server) -> int:
    """Count lines behind the announcement that are not one JSON object each."""
    lines = server.output().partition("docs: ")[2].splitlines()[1:]
    broken = 0
    for line in lines:
        try:
            broken += not isinstance(json.loads(line), dict)
        except ValueError:
            broken += 1
    return broken
