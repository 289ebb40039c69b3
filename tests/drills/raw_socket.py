"""Random bytes at the fast path's sockets: broken HTTP in every way, in pieces, in line behind what is right."""

from __future__ import annotations

import json
import socket
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

from tests.conftest import running
from tests.drills import mutants
from tests.drills.direct import Direct, gathered
from tests.drills.drill import Report, drill
from tests.drills.mutation import stub
from tests.drills.wire import Connection, post, workers

ROW = [5.1, 3.5, 1.4, 0.2]
GOOD = post("/v1/models/iris:predict", json.dumps({"instances": [ROW]}).encode())
TOKENS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/9.9",
        b"GET",
        b"PUT",
        b"CONNECT",
    ),
    *(
        b"Content-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(b"Transfer-Encoding: xchunked\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"Connection: close\r\n"),
    *(
        b"Host: a\r\nHost: b\r\n",
        b"X: " + b"a" * 70_000 + b"\r\n",
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ),
    *(
        b"/../",
        b"%2e%2e/",
        b"%00",
        b"//",
        b"\\",
        b"http://x/",
        b"*",
        b"\xff\xfe",
        b"\x16\x03\x01\x02\x00",
        b"Content-Encoding: gzip\r\n",
    ),
    *(b"X-Request-Id: \x1b[31m\r\n", b"Origin: x\r\n", b"Range: bytes=0-\r\n"),
]


@drill("raw_socket", "no bytes at the fast path make a 5xx, a hang or a restart, or touch a neighbour's answer")
def run(report: Report, *, connections: int = 30_000) -> None:
    """Open so many connections, each with random bytes; a good request on another one now and then."""
    with tempfile.TemporaryDirectory() as folder:
        models = list(gathered(Path(folder)).values())
        with running(models=Path(folder)) as server:
            neighbour = Connection(server.port)
            due = neighbour.ask(GOOD).body
            before = workers(server)
            seen: Counter[str] = Counter()
            for number in range(connections):
                seen[attack(server.port, models, number)] += 1
                if number % 10 == 0:
                    seen["neighbour wronged"] += neighbour.ask(GOOD).body != due
            neighbour.close()
            restarts = float(before != workers(server) or not before)
            log = server.output()
    logged = log.count("Traceback")
    if logged:
        print(log[log.index("Traceback") - 200 :][:4000])
    report.at_least("connections", seen.total() - seen["neighbour wronged"], connections)
    report.at_least("with an answer of 200", seen["200"], connections / 50)
    report.at_least("refused with a 4xx", seen["400"], connections / 20)
    for what in ("5xx", "hang", "neighbour wronged"):
        report.exactly(what, seen[what], 0)
    report.exactly("restarts", restarts, 0)
    report.exactly("tracebacks in the log", logged, 0)
    with stub(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n") as port:
        report.control("a 500 is found out", {attack(port, models, n) for n in range(20)} == {"5xx"})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        found = {attack(port, models, n, patience=0.05) for n in range(3)}
        report.control("silence is found out", found == {"hang"})


def attack(port: int, models: list[Direct], number: int, *, patience: float = 10) -> str:
    """Send what this number stands for; return the worst that came back: hang, 5xx, 400 (any 4xx), 200, nothing."""
    random = Random(number)
    connection = Connection(port, patience=patience)
    statuses = []
    try:
        for piece in pieces(stream(models, random), random):
            connection.send(piece)
        connection.readable(random.choice([0, 0, 0.01]))  # who ends at once gets no answer: let some come
        connection.end()
        while status := connection.next().status:
            statuses.append(status)
    except TimeoutError:
        return "hang"
    finally:
        connection.close()
    worst = max((s for s in statuses if s >= 400), default=max(statuses, default=0))
    return "5xx" if worst >= 500 else "400" if worst >= 400 else "200" if worst == 200 else "nothing"


def stream(models: list[Direct], random: Random) -> bytes:
    """Make the bytes of one connection."""
    match random.choice(["noise", "bent", "bent", "bent", "mutant", "line", "chunked", "soup"]):
        case "noise":
            return random.randbytes(random.choice([1, 10, 100, 5000]))
        case "mutant":
            return mutants.over_http(models, random.getrandbits(30)).wire
        case "line":  # several in a row, one of them bent
            return GOOD * random.randint(0, 3) + _bent(GOOD, random) + GOOD * random.randint(0, 2)
        case "chunked":
            body = GOOD.partition(b"\r\n\r\n")[2]
            parts = [b"%x\r\n%b\r\n" % (len(body), body), b"0\r\n\r\n"]
            head = b"POST /v1/models/iris:predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            whole = head + b"".join(parts)
            return random.choice([whole, _bent(whole, random), whole[:-3], whole + GOOD])
        case "soup":
            return b"".join(random.choices(TOKENS, k=random.randint(1, 12)))
    return _bent(GOOD, random)


def _bent(request: bytes, random: Random) -> bytes:
    made = bytearray(request)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(made) + 1)
        match random.choice(["token", "flip", "cut", "insert"]):
            case "token":
                made[at : at + random.randrange(3)] = random.choice(TOKENS)
            case "flip" if at < len(made):
                made[at] ^= 1 << random.randrange(8)
            case "cut":
                del made[at : at + random.randint(1, 30)]
            case _:
                made[at:at] = random.randbytes(random.randint(1, 4))
    return bytes(made)


def pieces(data: bytes, random: Random) -> list[bytes]:
    """Cut into pieces as a network might; most often into none."""
    if random.random() < 0.6 or len(data) < 2:
        return [data]
    cuts = sorted({random.randrange(1, len(data)) for _ in range(random.choice([1, 2, 20]))})
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
