"""Lines of requests, cut anywhere and interleaved over many connections: the fast path answers as plain ASGI does.

Both ways are driven in this process, over transports of memory, so that a packet is exactly what is fed at once.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random
from typing import Any, TypeAlias

from uvicorn import Config
from uvicorn.server import ServerState

from serving.http_api.app import create_app
from serving.http_api.fast_path.protocol import fast_path_for
from serving.http_api.fast_path.state import FastPathState
from serving.settings import Settings
from tests.conftest import MODELS
from tests.drills.drill import Report, drill
from tests.drills.wire import LENGTH, post

IRIS, OLDER, OTHER = "/v1/models/iris:predict", "/v1/models/iris/versions/1:predict", "/v1/models/penguins:predict"
LAST = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nx-request-id: the-last\r\n\r\n"
"""Follows every line of requests: once it is answered, or the connection has ended, nothing more comes."""
LAST_ANSWERED = b"x-request-id: the-last\r\n"

Feed: TypeAlias = list[tuple[int, bytes, int]]
"""Connection, packet, and turns of the loop before the next."""
Answered: TypeAlias = tuple[bytes, list[bytes], bytes]
"""Status, headers but for what differs each time, body."""


@drill(
    "heads", "any pipeline, cut anywhere, is answered by the fast path as by plain ASGI; no connection steers another"
)
def run(report: Report, *, rounds: int = 4000, every_cut: int = 60) -> None:
    """Interleave so many rounds of connections; cut so many pipelines at every byte."""
    asyncio.run(_run(report, rounds, every_cut))


async def _run(report: Report, rounds: int, every_cut: int) -> None:
    tally = Tally()
    async with both_ways() as (fast_path, plain):
        for number in range(rounds):
            random = Random(number)
            await tally.compare(
                fast_path, plain, interleaved([packets(random) for _ in range(random.randint(1, 5))], random)
            )
        cuts = 0
        for number in range(every_cut):
            whole = b"".join(packets(Random(-1 - number)))
            cuts += len(whole) - 1
            for at in range(1, len(whole)):
                await tally.compare(fast_path, plain, [(0, whole[:at], at % 3), (0, whole[at:], 0)])
        careless = Careless.of(fast_path)
        for bait in BAITS:
            await tally.compare(fast_path, plain, attack(bait))
            found = Tally(quiet=True)
            await found.compare(careless, plain, attack(bait))
            report.control("a head that is shared, and taken from the last packet, is found out", found.different == 1)
    report.at_least("answers", tally.answers, 3 * rounds)
    report.at_least("cuts", cuts, 50 * every_cut)
    report.exactly("rounds and cuts answered differently", tally.different, 0)


def body(*values: float) -> bytes:
    """Write a row of iris."""
    return json.dumps({"instances": [values]}).encode()


BAITS = [post(IRIS, body(5.1, 3.5, 1.4, 0.2)), post(IRIS, body(5.125, 3.5, 1.4, 0.2), accept="*/*")]
GOOD = [
    *BAITS,
    post(IRIS, body(6, 3, 5, 2)),
    post(OLDER, body(5.1, 3.5, 1.4, 0.2)),
    post(OTHER, body(5.1, 3.5, 1.4, 0.2)),
    post(IRIS, b"{}"),
    post(IRIS, b""),
    post(IRIS, body(5.1, 3.5, 1.4, 0.2), x_request_id="mine"),
    post(IRIS, body(5.1, 3.5, 1.4, 0.2), x_request_timeout="5"),
    post(IRIS, body(5.1, 3.5, 1.4, 0.2), connection="keep-alive"),
    post("/v1/models/none:predict", body(1)),
    post(IRIS, body(5.1, 3.5, 1.4, 0.2)).replace(b"content-length", b"Content-LENGTH"),
    post(IRIS, body(5.1, 3.5, 1.4, 0.2)).replace(b"length: ", b"length:\t"),
    post(IRIS, body(5.1, 3.5, 1.4, 0.2), expect="100-continue"),
    post(IRIS, body(5.1, 3.5, 1.4, 0.2), upgrade="h2c", connection="upgrade"),
    post("/v2/models/iris/infer", b'{"inputs":[{"name":"features","datatype":"FP32","shape":[1,4],"data":[1,2,3,4]}]}'),
    post(
        "/v2/models/iris/infer",
        b'{"inputs":[{"name":"features","datatype":"FP32","shape":[1,4],"parameters":{"binary_data_size":16}}]}'
        + bytes(16),
        **{LENGTH: 101},
    ),
    b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n22\r\n%b\r\n0\r\n\r\n"
    % (IRIS.encode(), body(5.1, 3.5, 1.4, 0.2)),
    b"GET /v2/models/iris HTTP/1.1\r\nhost: x\r\n\r\n",
    b"\r\n" + BAITS[0],
]


def poison(bait: bytes) -> list[bytes]:
    """Make the packets of whoever wants `bait` to be read as a request of theirs: its first byte ends their body."""
    length = len(bait) - bait.index(b"\r\n\r\n") - 4
    lines = bait.count(b"\r\n") - 4
    head = post(OTHER, b"", length=length, **{f"x{n}": "y" for n in range(lines)})
    return [head + b" " * (length - 1), bait]


def attack(bait: bytes) -> Feed:
    """Make one connection that poisons, and then one that sends the bait in earnest."""
    return [(0, packet, 3) for packet in poison(bait)] + [(1, packet, 3) for packet in (bait, bait, LAST)]


def hostile(request: bytes, random: Random) -> bytes:
    """Bend a request so that parsers may not agree on where it ends."""
    choice = random.randrange(12)
    if choice == 2:
        request = random.choice(BAITS)  # others may be answered without their body: at once, or a turn of the loop late
    head, _, rest = request.partition(b"\r\n\r\n")
    match choice:
        case 0:
            return head + b"\r\n folded: yes\r\n\r\n" + rest
        case 1:
            return head + b"\r\ncontent-length: %d\r\n\r\n" % random.randrange(60) + rest
        case 2:
            return head + b"\r\ntransfer-encoding: chunked\r\n\r\n" + rest
        case 3:
            return head.replace(b"length:", b"length :") + b"\r\n\r\n" + rest
        case 4:
            return head.replace(b"\r\n", b"\n", random.randint(1, 4)) + b"\r\n\r\n" + rest
        case 5:
            return head + random.choice([b"\n\n", b"\r\n\n", b"\n\r\n", b"\r\r\n\n"]) + rest
        case 6:
            return request[: -random.randint(1, 2)]
        case 7:
            return request + random.choice([b"\r\n", b"\n", b"\r", b" ", b"P", b"\r\n\r\n", b"\0"])
        case 8:
            return (
                re.sub(rb"(?i)(content-length: ?)(\d+)", rb"\g<1>" + random.choice([b"0", b"+", b" "]) + rb"\2", head)
                + b"\r\n\r\n"
                + rest
            )
        case 9:
            return random.choice([b"\r\n", b"\n", b"\r\n\r\n", b"X", b" "]) + request
        case 10:
            # A body that holds a head's end, behind a head that may end otherwise.
            return head + random.choice([b"\r\n\r\n", b"\n\n"]) + b"\r\n\r\n" + rest[4:]
    return request.replace(b"host: x", random.choice([b"host: y", b"host: x\r\nhost: x", b"host:", b"x: x"]))


def packets(random: Random) -> list[bytes]:
    """Make the packets of one connection: mostly whole requests, of which some repeat, then cut and joined."""
    favourite = random.choice(GOOD)
    line: list[bytes] = []
    for _ in range(random.randint(1, 6)):
        choice = random.random()
        if choice < 0.5:
            line.append(favourite)
        elif choice < 0.8:
            line.append(random.choice(GOOD))
        elif choice < 0.9:
            line.append(hostile(random.choice([favourite, *GOOD]), random))
        else:
            line += poison(random.choice(BAITS))
    made: list[bytes] = []
    for request in line:
        if made and random.random() < 0.15:
            made[-1] += request
        elif random.random() < 0.3:
            cuts = sorted({random.randrange(len(request)) for _ in range(random.choice([1, 1, 3]))} | {0})
            made += [request[a:b] for a, b in zip(cuts, [*cuts[1:], len(request)], strict=True)]
        else:
            made.append(request)
    return [*filter(None, made), LAST]


class Wire(asyncio.Transport):
    """The server's end of a connection, in memory."""

    def __init__(self, made: Any, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._protocol = made
        self._loop = loop
        self._paused = False
        self._waiting: deque[bytes] = deque()
        self._closing = False
        self.ended = False
        """Whether nothing more is written."""
        self.written = bytearray()
        made.connection_made(self)

    def feed(self, packet: bytes) -> None:
        """Have the server read a packet, once it reads."""
        self._waiting.append(packet)
        self._deliver()

    def _deliver(self) -> None:
        while self._waiting and not self._paused and not self._closing:
            self._protocol.data_received(self._waiting.popleft())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended
        self.written += data

    def is_closing(self) -> bool:
        return self._closing

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        if not self._closing:
            self._closing = self.ended = True
            self._loop.call_soon(self._protocol.connection_lost, None)

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        self._loop.call_soon(self._deliver)


class Way:
    """A way to answer: makes connections of a protocol class."""

    def __init__(self, app: Any, protocol: Any) -> None:
        self.app, self.protocol = app, protocol
        self._config = Config(app, http=protocol, ws="none", lifespan="off", log_config=None, server_header=False)
        self._config.load()
        self._state = ServerState()

    def connect(self) -> Wire:
        """Make a connection."""
        loop = asyncio.get_running_loop()
        made = self.protocol(config=self._config, server_state=self._state, app_state={}, _loop=loop)
        return Wire(made, loop)


class Careless:
    """The fast path, but for its care about whose request a head was, and where in a packet it began."""

    @staticmethod
    def of(way: Way) -> Way:
        """Make the fast path careless."""
        shared: list[Any] = [None]

        class Made(way.protocol):  # type: ignore[misc,name-defined]
            _known = property(lambda _: shared[-1], lambda _, known: shared.append(known or shared[-1]))

            def data_received(self, data: bytes) -> None:
                self.packet = data
                super().data_received(data)

            def on_message_complete(self) -> None:
                self._chunk = self.packet
                super().on_message_complete()

        return Way(way.app, Made)


@asynccontextmanager
async def both_ways() -> AsyncIterator[tuple[Way, Way]]:
    """Load the shipped models, and make both ways to their answers: fast path, and the same application without it."""
    app = create_app(Settings(models=MODELS, max_batch_rows=1))  # larger ones round otherwise
    async with app.router.lifespan_context(app):
        shared: FastPathState = app.state.serving.shared
        yield Way(app, fast_path_for(shared)), Way(app, fast_path_for(replace(shared, paths={})))


def interleaved(lines: list[list[bytes]], random: Random) -> Feed:
    """Put the packets of several connections into one order, with pauses."""
    order = [index for index, line in enumerate(lines) for _ in line]
    random.shuffle(order)
    rest = [iter(line) for line in lines]
    return [(index, next(rest[index]), random.choice([0, 0, 1, 5])) for index in order]


class Tally:
    """Compares, and counts. quiet: says nothing of what differs."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.answers = self.different = 0

    async def compare(self, fast_path: Way, plain: Way, feed: Feed) -> None:
        """Feed the same packets both ways, in one order."""
        due, got = await played(plain, feed), await played(fast_path, feed)
        self.answers += sum(map(len, due))
        if due != got:
            self.different += 1
            if not self._quiet and self.different < 4:
                which = next(index for index, pair in enumerate(zip(due, got, strict=True)) if pair[0] != pair[1])
                print([packet for index, packet, _ in feed if index == which], due[which], got[which], sep="\n")


async def settled(wires: list[Wire]) -> None:
    """Wait until each has answered the last request, or writes no more."""
    async with asyncio.timeout(5):
        for wire in wires:
            while not wire.ended and LAST_ANSWERED not in wire.written:  # noqa: ASYNC110  a turn at a time
                await asyncio.sleep(0)


async def played(way: Way, feed: Feed) -> list[list[Answered]]:
    """Feed packets to connections of their own, and return what each is answered in the end."""
    wires = [way.connect() for _ in range(1 + max(index for index, _, _ in feed))]
    for index, packet, pause in feed:
        wires[index].feed(packet)
        for _ in range(pause):
            await asyncio.sleep(0)
    await settled(wires)
    found = [answers(bytes(wire.written)) for wire in wires]
    for wire in wires:
        wire.close()
    return found


def answers(written: bytes) -> list[Answered]:
    """Read all answers."""
    found: list[Answered] = []
    while written:
        head, _, written = written.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        size = next((int(line[16:]) for line in lines if line.startswith(b"content-length: ")), 0)
        kept = [line for line in lines if not re.match(rb"date:|x-request-id: [0-9a-f]{16}-", line)]
        found.append((first, sorted(kept), written[:size]))
        written = written[size:]
    return found
