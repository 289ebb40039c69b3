"""gRPC clients that trickle, stall, hold windows shut or only take up room: each ends in time, and the others go on."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from tests.conftest import Server, faulty, running
from tests.drills.drill import Report, drill
from tests.drills.hostile_grpc import GREETING, HEALTH, OPEN, STREAM, ending_of, grpc_port
from tests.grpc_api.wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Wire,
    call,
    frame,
    framed,
    headers,
    infer,
    number,
)

_HALF = b"\0" + (100_000).to_bytes(4, "big")
_SHUT = PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
_WIDE = PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31 - 1)) + frame(WINDOW_UPDATE, 0, 0, number(2**30))
_PING = frame(PING, 0, 0, b"all here")
_PONG = frame(PING, ACK, 0, b"all here")
ROWS = 4000
"""Of a call with a large answer."""

KINDS: dict[str, tuple[bytes, bytes]] = {
    # What is sent at once, and what comes after it again and again.
    "silent": (b"", b""),
    "a preface byte by byte": (PREFACE[:3], b""),
    "no settings": (PREFACE, b""),
    "idle": (GREETING, b""),
    "idle, with pings": (GREETING, frame(PING, 0, 0, bytes(8))),
    "half a frame": (GREETING + frame(HEADERS, END_HEADERS, 1, headers())[:30], b""),
    "headers without end": (GREETING + frame(HEADERS, 0, 1, headers()[:20]), frame(CONTINUATION, 0, 1, b"\0")),
    "no message": (GREETING + OPEN, b""),
    "half a prefix": (GREETING + OPEN + frame(DATA, 0, 1, b"\0\0"), b""),
    "a message byte by byte": (GREETING + OPEN + frame(DATA, 0, 1, _HALF), frame(DATA, 0, 1, b"\0")),
    "a frame byte by byte": (GREETING + OPEN + frame(DATA, 0, 1, _HALF + bytes(9000))[:100], b"\0"),
    "a stream's message": (
        GREETING + frame(HEADERS, END_HEADERS, 1, headers(STREAM)) + frame(DATA, 0, 1, framed(infer()) + _HALF),
        frame(DATA, 0, 1, b"\0"),
    ),
    "a window that stays shut": (
        _SHUT + OPEN + frame(DATA, END_STREAM, 1, framed(infer())),
        b"",
    ),
    "a window a byte at a time": (
        _SHUT + OPEN + frame(DATA, END_STREAM, 1, framed(infer())),
        frame(WINDOW_UPDATE, 0, 1, number(1)),
    ),
}
DEAF = "not reading"
"""Has all the room in its windows, and reads nothing."""


@drill("slow_clients_grpc", "gRPC clients that trickle, stall or take nothing end in time, and others go on")
def run(report: Report, *, sockets: int = 300, patience: float = 5.0, unread: int = 400, at_once: bool = False) -> None:
    """`patience`: seconds for each thing that is waited for. `unread`: large answers that nobody takes.

    at_once: all of it at the same time, for it is mostly waiting, and without the clock.
    """
    with ThreadPoolExecutor(4 if at_once else 1) as pool:
        parts = [
            pool.submit(_slow, report, sockets, patience, timed=not at_once),
            pool.submit(_endless, report, patience),
            pool.submit(_company, report),
            pool.submit(_unread, report, unread),
        ]
        for part in parts:
            part.result()


def _slow(report: Report, sockets: int, patience: float, *, timed: bool) -> None:
    limits = tuple(f for name in ("--head-s", "--write-s", "--keep-alive-s") for f in (name, str(patience)))
    # Who stalls behind much of a message has the time that so much may take: short here, to see the end of it.
    limits += ("--min-bytes-per-s", "100000")
    with running(
        "--grpc-port", "0", "--max-queued-rows", "1000000", "--max-held-bytes", "1000000000", *limits
    ) as server:
        left, latest = _trickle(grpc_port(server), sockets, 2 * patience + 4)
        report.exactly(f"slow clients not ended, of {sockets} {dict(left) or ''}".rstrip(), sum(left.values()), 0)
    if timed:
        # Who does not read may stall in the middle of a message, and be idle once that has ended.
        deaf = latest.pop(DEAF)
        report.at_most("the last was ended after", max(latest.values()), patience + 2.5, "s")
        report.at_most("the last of those that do not read was ended after", deaf, 2 * patience + 2.5, "s")


def _endless(report: Report, patience: float) -> None:
    waits = ("head-s", "body-s", "write-s", "keep-alive-s")
    never = [f for name in waits for f in (f"--{name}", "1000")] + ["--min-bytes-per-s", "1"]
    with running("--grpc-port", "0", "--max-queued-rows", "1000000", *never) as server:
        left, _ = _trickle(grpc_port(server), len(KINDS) + 1, patience + 1)
        with _many(grpc_port(server), 60, GREETING + _PING) as clients:
            together = _taken(clients)
    report.control("without patience's end slow clients stay, all kinds", len(left) == len(KINDS) + 1)
    report.control("with a larger cap all of 60 connections are taken", together == 60)


def _trickle(port: int, sockets: int, seconds: float) -> tuple[Counter[str], dict[str, float]]:
    """Be the slow clients; return those that were not ended, by kind, and when the last of each kind was."""
    names = [*KINDS, DEAF]
    open_: dict[socket.socket, tuple[str, bytearray]] = {}
    for index in range(sockets):
        kind = names[index % len(names)]
        client = socket.socket()
        if kind == DEAF:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            # A reset that does not fit its window is ignored: its kernel has to ask whether the server is still there.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        client.connect(("127.0.0.1", port))
        open_[client] = kind, bytearray()
        if kind == DEAF:
            _ask_for_much(client)
        else:
            client.sendall(KINDS[kind][0])
        client.setblocking(False)
    began = time.monotonic()
    latest = dict.fromkeys(names, 0.0)
    while open_ and time.monotonic() < began + seconds:
        for client, (kind, said) in list(open_.items()):
            if _is_dead(client) if kind == DEAF else _has_ended(client, said):
                del open_[client]
                client.close()
                latest[kind] = time.monotonic() - began
            elif kind != DEAF:
                with suppress(OSError):  # seen when it is read
                    client.send(KINDS[kind][1])
        time.sleep(0.1)
    left = Counter(kind for kind, _ in open_.values())
    for client in open_:
        client.close()
    return left, latest


def _ask_for_much(client: socket.socket) -> None:
    """Send calls until more is owed than the buffers on the way hold."""
    client.settimeout(0.5)
    with suppress(TimeoutError):
        client.sendall(_WIDE)
        for n in range(1, 241, 2):
            client.sendall(frame(HEADERS, END_HEADERS, n, headers()))
            body = framed(infer(ROWS))
            for place in range(0, len(body), 16384):
                last = place + 16384 >= len(body)
                client.sendall(frame(DATA, END_STREAM * last, n, body[place : place + 16384]))


def _is_dead(client: socket.socket) -> bool:
    """Tell whether a client that reads nothing has been reset."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x01"


def _has_ended(client: socket.socket, said: bytearray) -> bool:
    try:
        while more := client.recv(65536):
            said += more
            if ending_of(said, 0)[0]:
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _many(port: int, number_of: int, first: bytes) -> Iterator[list[socket.socket]]:
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(number_of)]
    try:
        for client in clients:
            with suppress(OSError):
                client.sendall(first)
        yield clients
    finally:
        for client in clients:
            client.close()


def _company(report: Report) -> None:
    """Take up all the connections that there are, with nothing, and with work that does not end."""
    held = GREETING + OPEN + frame(DATA, END_STREAM, 1, framed(infer())) + _PING
    with faulty({"slow": 2.0}, "--grpc-port", "0", "--max-connections", "8") as server:
        port = grpc_port(server)
        with _many(port, 30, GREETING):
            report.exactly("a newcomer among idle connections is answered", float(_answers(port)), 1)
        with _many(port, 30, GREETING + frame(HEADERS, END_HEADERS, 1, headers(STREAM))):
            report.exactly("a newcomer among streams that say nothing is answered", float(_answers(port)), 1)
        with _many(port, 20, held) as clients:
            _taken(clients)  # they are all at work now, and will be for seconds
            report.exactly("health among busy connections is answered", float(_answers(port, HEALTH)), 1)
            report.exactly("a call among busy connections is refused", float(not _answers(port)), 1)
        with _many(port, 60, held) as clients:
            report.at_most("connections of 60 beyond the cap of 8 and 32 spare ones", _taken(clients) - 40, 0)


def _taken(clients: list[socket.socket]) -> int:
    """Wait until the server has seen what each has sent, a ping at its end, or told it to go; count who may stay."""
    said = [(client, bytearray()) for client in clients]
    for client, heard in said:
        client.settimeout(20)
        with suppress(ConnectionError):
            while _PONG not in heard and not _is_sent_away(heard) and (more := client.recv(65536)):
                heard.extend(more)
    for client, heard in said:
        client.setblocking(False)  # who came later may have had earlier ones sent away
        with suppress(ConnectionError, BlockingIOError):
            heard.extend(client.recv(65536))
    return sum(_PONG in heard and not _is_sent_away(heard) for _, heard in said)


def _is_sent_away(said: bytearray) -> bool:
    place = 0
    while len(said) - place >= 9 and said[place + 3] != GOAWAY:
        place += 9 + int.from_bytes(said[place : place + 3], "big")
    return len(said) - place >= 9


def _answers(port: int, path: bytes | None = None) -> bool:
    body = b"" if path is not None else infer()
    with Wire(port) as wire, contextlib.suppress(ConnectionError):
        return call(wire, 1, body, **({"path": path} if path is not None else {}))[0][b"grpc-status"] == b"0"
    return False


def _unread(report: Report, calls: int) -> None:
    """Ask for large answers with the window shut: what waits is bounded in bytes."""
    bound = 2**21
    flags = ("--grpc-port", "0", "--max-held-bytes", str(bound), "--max-queued-rows", "1000000", "--deadline-s", "100")
    with running(*flags) as server:
        waiting, size, refused = _wait(server, calls)
    report.at_most("answers that wait for a shut window", waiting * size, bound + size, "bytes")
    report.at_least("calls refused for it", refused, 1)
    with faulty({"off": ["counted"]}, *flags) as server:
        waiting, size, _ = _wait(server, calls)
    report.control("without the count all answers wait", waiting == calls and waiting * size > bound)


def _wait(server: Server, calls: int) -> tuple[int, int, int]:
    """Return how many calls have an answer that waits, the bytes of one, and how many were refused."""
    port = grpc_port(server)
    body = framed(infer(ROWS))
    with Wire(port, greet=False) as wire:
        wire.send(_WIDE, frame(HEADERS, END_HEADERS, 1, headers()))
        _send(wire, 1, body)
        size = len(wire.answer(1)[1])
    with Wire(port, greet=False) as wire:
        wire.send(_SHUT)
        refused = waiting = 0
        for n in range(1, 2 * calls, 2):
            wire.send(frame(HEADERS, END_HEADERS, n, headers()))
            _send(wire, n, body)
            while True:  # one after the other: what is held is answers then, not requests
                kind, flags, stream, _ = wire.next()
                if kind == HEADERS and stream == n:
                    refused += bool(flags & END_STREAM)
                    waiting += not flags & END_STREAM
                    break
                assert kind != RST_STREAM
    return waiting, size, refused


def _send(wire: Wire, stream: int, body: bytes) -> None:
    pieces = [body[place : place + 16384] for place in range(0, len(body), 16384)]
    wire.send(*(frame(DATA, END_STREAM * (piece is pieces[-1]), stream, piece) for piece in pieces))
