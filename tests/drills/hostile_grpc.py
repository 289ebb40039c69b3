"""gRPC under attack, frame by frame: what floods, lies or is too large is refused or cut at once.

Each attack is made once more on a server with its defence switched off, and has to succeed there.
"""

from __future__ import annotations

import gzip
import random
import re
import socket
import struct
import time

from serving.protocols.messages import SERVICE
from tests.conftest import Server, faulty, running
from tests.drills.drill import Report, drill
from tests.drills.hostile import LIMIT_S, MEMORY_MIB, SECRETS, broken_lines, resident_mib
from tests.grpc_api.wire import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Wire,
    call,
    frame,
    framed,
    headers,
    infer,
    literal,
    number,
)

GREETING = PREFACE + frame(SETTINGS, 0, 0)
STREAM = f"/{SERVICE}/ModelStreamInfer".encode()
HEALTH = b"/grpc.health.v1.Health/Check"
OPEN = frame(HEADERS, END_HEADERS, 1, headers())
FLOOD = 20_000
_NOTHING = "nothing"


def _call(body: bytes, **more: bytes) -> bytes:
    return frame(HEADERS, END_HEADERS, 1, headers(**more)) + _data(body, more.get("grpc_encoding"))


def _data(body: bytes, encoding: bytes | None = None) -> bytes:
    whole = framed(body, int(encoding is not None))
    pieces = [whole[place : place + 16384] for place in range(0, len(whole), 16384)]
    last = len(pieces) - 1
    return b"".join(frame(DATA, END_STREAM * (i == last), 1, piece) for i, piece in enumerate(pieces))


def floods() -> dict[str, bytes]:
    """Return floods of frames that cost a client nothing; "calm" is what bounds them."""
    resets = b"".join(
        frame(HEADERS, END_HEADERS, n, headers()) + frame(RST_STREAM, 0, n, number(8)) for n in range(1, FLOOD, 2)
    )
    begun = frame(HEADERS, 0, 1, headers())
    return {
        "pings": frame(PING, 0, 0, bytes(8)) * FLOOD,
        "settings": frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * FLOOD,
        "settings that move windows": OPEN
        + (frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 9)) + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 8))) * FLOOD,
        "acknowledgements": frame(SETTINGS, 1, 0) * FLOOD,
        "empty data": OPEN + frame(DATA, 0, 1) * FLOOD,
        "data that is all padding": OPEN + frame(DATA, 8, 1, b"\x07" + bytes(7)) * FLOOD,
        "data byte by byte": OPEN + frame(DATA, 0, 1, framed(bytes(FLOOD))[:5]) + frame(DATA, 0, 1, b"\0") * FLOOD,
        "rapid reset": resets,
        "resets of nothing": OPEN + frame(RST_STREAM, 0, 1, number(8)) * FLOOD,
        "windows": frame(WINDOW_UPDATE, 0, 0, number(1)) * FLOOD,
        "windows of a stream": OPEN + frame(WINDOW_UPDATE, 0, 1, number(1)) * FLOOD,
        "priorities": frame(PRIORITY, 0, 1, bytes(5)) * FLOOD,
        "frames of no kind": frame(0xFA, 0, 0, b"?") * FLOOD,
        "empty continuations": begun + frame(CONTINUATION, 0, 1) * FLOOD,
        "more streams than there may be": b"".join(
            frame(HEADERS, END_HEADERS, n, headers()) for n in range(1, 8000, 2)
        ),
    }


def blocks() -> dict[str, bytes]:
    """Return headers that become large; "blocks" is what bounds them."""
    entry = b"\x40\x01a\x7f\xa1\x1e" + b"v" * 4000  # 4,000 bytes, kept in the table
    return {
        "endless continuations": frame(HEADERS, 0, 1, headers())
        + frame(CONTINUATION, 0, 1, literal(b"x", b"a" * 8000)) * 200
        + frame(CONTINUATION, END_HEADERS, 1)
        + _data(infer()),
        "a table read again and again": frame(HEADERS, END_HEADERS, 1, headers() + entry + b"\xbe" * 5000)
        + _data(infer()),
    }


def lies() -> dict[str, bytes]:
    """Return what is wrong in itself: nothing could be right about an answer other than a refusal."""
    bomb = gzip.compress(bytes(100 * 2**20), 9)
    noise = random.Random(0)
    packed = b"".join(  # Huffman strings that nobody has seen before
        frame(HEADERS, END_HEADERS, n, b"\0\x01a\xff\x91\x4e" + noise.randbytes(10_000)) for n in range(1, 9, 2)
    )
    return {
        "gzip bomb": _call(bomb, grpc_encoding=b"gzip"),
        "deflate that is none": _call(bytes(100_000), grpc_encoding=b"deflate"),
        "oversized": OPEN + frame(DATA, 0, 1, b"\0" + (2**31).to_bytes(4, "big")),
        "17 MB": _call(bytes(17 * 2**20)),
        "not a message": _call(b"\xff" * 100),
        "huge dims": _call(infer(1).replace(b"\x1a\x02\x01\x04", b"\x1a\x02\x7f\x7f")),
        "100,000 outputs": _call(infer(1, outputs=[{"name": f"o{i}"} for i in range(100_000)])),
        "path in a name": _call(infer(1).replace(b"iris", b"../e")),
        "path as method": _call(infer(), path=b"/../../etc/passwd"),
        "escape in a method": _call(infer(), path=b"/\x1b[31m\r\nX: y"),
        "a deadline that is none": _call(infer(), grpc_timeout=b"9" * 100),
        "settings without end": frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1) * 2700),
        "a window that grows by nothing": frame(WINDOW_UPDATE, 0, 0, number(0)),
        "a window beyond all": OPEN + frame(WINDOW_UPDATE, 0, 1, number(2**31 - 1)),
        "more than the window": OPEN + frame(DATA, 0, 1, b"\0\0\xff" + bytes(32000)) + b"\x10\0\0\0\0\0\0\0\x01",
        "data of no stream": frame(DATA, 0, 7, bytes(9)),
        "strings of no code": packed,
        "an index of nothing": frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\x0f"),
        "a push": frame(5, END_HEADERS, 1, headers()),
    }


def bare() -> dict[str, bytes]:
    """Return what is sent in place of a greeting."""
    return {
        "HTTP/1": b"GET / HTTP/1.1\r\nHost: t\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        "no settings": PREFACE + _call(infer()),
    }


def ask(port: int, piece: bytes, patience: float = 2.0) -> tuple[str, float, bytes]:
    """Send bytes; return how it ended (`nothing`: it did not), seconds until then, and all that was said."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.setblocking(False)
        began = time.perf_counter()
        left, said, place = memoryview(piece), bytearray(), 0
        while (seconds := time.perf_counter() - began) < patience:
            moved = False
            try:
                more = client.recv(1 << 18)
                if not more:
                    return "closed", seconds, bytes(said)
                said += more
                moved = True
            except BlockingIOError:
                pass
            except OSError:
                return "closed", seconds, bytes(said)
            ended, place = ending_of(said, place)
            if ended:
                return ended, time.perf_counter() - began, bytes(said)
            try:
                if left:
                    left = left[client.send(left[: 1 << 18]) :]
                    moved = True
            except BlockingIOError:
                pass
            except OSError:
                left = memoryview(b"")
            if not moved:
                time.sleep(0.0005)
        return _NOTHING, patience, bytes(said)


def ending_of(said: bytes | bytearray, place: int) -> tuple[str, int]:
    """Return what ends a call or the connection in frames from `place` on, and the place of the first that is cut."""
    while len(said) - place >= 9:
        size, kind, flags = int.from_bytes(said[place : place + 3], "big"), said[place + 3], said[place + 4]
        payload = bytes(said[place + 9 : place + 9 + size])
        if len(payload) < size:
            break
        if kind == GOAWAY:
            return f"goaway {int.from_bytes(payload[4:8], 'big')}", place
        if kind == RST_STREAM and payload != number(7):  # 7: a stream too many, and the flood goes on
            return f"reset {int.from_bytes(payload, 'big')}", place
        if kind == HEADERS and flags & END_STREAM:
            found = re.search(rb"grpc-status.(\d+)", payload)
            return f"status {found[1].decode() if found else '?'}", place
        place += 9 + size
    return "", place


def _pieces() -> dict[str, bytes]:
    made = {name: GREETING + piece for group in (floods(), blocks(), lies()) for name, piece in group.items()}
    return {**made, **bare()}


@drill("hostile_grpc", "frames made to hurt are refused or cut at once, tell nothing, and leave nothing")
def run(report: Report, *, repetitions: int = 100, timed: bool = True) -> None:
    """`repetitions`: of each piece. `timed`: judge by the clock and by memory while it lasts, too."""
    pieces = _pieces()
    with running("--grpc-port", "0", "--log-format", "json") as server:
        port = grpc_port(server)
        answers = {name: ask(port, piece) for name, piece in pieces.items()}
        assert _good(port)
        before = worst = resident_mib(server)
        slow = dict.fromkeys(pieces, 99.0)
        for _ in range(repetitions):
            for name, piece in pieces.items():
                answers[name] = answer = ask(port, piece)
                slow[name] = min(slow[name], answer[1])
                worst = max(worst, resident_mib(server))
        wrong = sorted(f"{name}: {ended}" for name, (ended, _, _) in answers.items() if _is_taken(ended))
        told = sorted(name for name, (_, _, text) in answers.items() if SECRETS.search(text))
        report.exactly(f"pieces not refused, of {len(pieces)} {'; '.join(wrong)}".rstrip(), len(wrong), 0)
        report.exactly(f"answers that tell of the insides {' '.join(told)}".rstrip(), len(told), 0)
        report.exactly("a good call is answered", float(_good(port)), 1)
        report.at_most("memory kept", _least(server, before + MEMORY_MIB / 4) - before, MEMORY_MIB / 4, "MiB")
        report.exactly("lines of the log that are no JSON object", broken_lines(server), 0)
        if timed:
            report.at_most("memory above the baseline while it lasts", worst - before, MEMORY_MIB, "MiB")
            name = max(slow, key=slow.__getitem__)
            report.at_most(f"slowest refusal ({name})", slow[name], LIMIT_S, "s")
    with faulty({"off": ["calm", "blocks"]}, "--grpc-port", "0") as server:
        port, wait = grpc_port(server), 1.0 if timed else 0.2
        for name, piece in {**floods(), **blocks()}.items():
            report.control(f"{name}: nobody says stop", _is_taken(ask(port, GREETING + piece, wait)[0]))


def _is_taken(ended: str) -> bool:
    return ended in (_NOTHING, "status 0")


def grpc_port(server: Server) -> int:
    """Return where a server that runs with `--grpc-port 0` answers gRPC."""
    until = time.monotonic() + 10
    while not (found := re.search(r"gRPC: \S+:(\d+)", server.output())):  # stands in the last line of its greeting
        assert time.monotonic() < until, server.output()
        time.sleep(0.02)
    return int(found[1])


def _good(port: int) -> bool:
    with Wire(port) as wire:
        return call(wire, 1, infer())[0][b"grpc-status"] == b"0"


def _least(server: Server, bound: float) -> float:
    """Return the resident memory once it is below `bound`; Python collects among good calls."""
    until = time.monotonic() + 20
    while (now := resident_mib(server)) > bound and time.monotonic() < until:
        for _ in range(50):
            _good(grpc_port(server))
    return now
