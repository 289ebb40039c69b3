"""An open-loop load: requests are sent when they are due, whatever became of those before, over as many connections as
that takes; latency counts from when a request was due."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Sample:
    """One request: when it was due and answered (monotonic seconds), and its status; 0 where there was no answer."""

    due: float
    took: float
    status: int
    retry_after: int = 0


class _Client(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._data = b""
        self.due = 0.0
        self.busy = False
        self.answered: asyncio.Event | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def ask(self, due: float) -> None:
        assert self.transport is not None
        self.due, self.busy = due, True
        self.transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, mark, body = self._data.partition(b"\r\n\r\n")
        if not mark:
            return
        lines = head.lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines[1:])
        if len(body) < int(headers[b"content-length"]):
            return
        self._data = b""
        self.busy = False
        now = time.monotonic()
        again = int(headers.get(b"retry-after", b"0"))
        self._load.samples.append(Sample(self.due, now - self.due, int(lines[0].split()[1]), again))
        self._load.free.append(self)
        if self.answered is not None:
            self.answered.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self._load.samples.append(Sample(self.due, time.monotonic() - self.due, 0))
        self._load.lost.add(self)
        self.busy = False
        if self.answered is not None:
            self.answered.set()


@dataclass(slots=True)
class Load:
    """Sends one and the same request; `samples` fills as answers come."""

    port: int
    request: bytes
    samples: list[Sample] = field(default_factory=list)
    free: deque[_Client] = field(default_factory=deque)
    lost: set[_Client] = field(default_factory=set)
    clients: list[_Client] = field(default_factory=list)

    async def offer(self, rate: float, seconds: float) -> None:
        """Send `rate` requests a second, evenly."""
        begin = time.monotonic()
        for index in range(int(rate * seconds)):
            due = begin + index / rate
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            elif index % 50 == 0:
                await asyncio.sleep(0)
            client = await self._client()
            client.ask(due)

    async def closed(self, clients: int, seconds: float) -> float:
        """Keep `clients` requests in progress; return answers of 200 a second."""
        until = (begin := time.monotonic()) + seconds
        before = len(self.samples)

        async def one() -> None:
            client = await self._connected()
            client.answered = answered = asyncio.Event()
            while time.monotonic() < until and client not in self.lost:
                answered.clear()
                client.ask(time.monotonic())
                await answered.wait()
                if client not in self.lost:
                    self.free.remove(client)
            client.answered = None
            self.free.append(client)

        await asyncio.gather(*(one() for _ in range(clients)))
        good = sum(s.status == 200 for s in self.samples[before:])
        return good / (time.monotonic() - begin)

    async def finish(self, seconds: float) -> None:
        """Wait for what is still in progress; what has no answer by then counts as 0."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(c.busy for c in self.clients if c not in self.lost):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for client in self.clients:
            if client.transport is not None:
                client.transport.abort()
        await asyncio.sleep(0.05)

    async def _client(self) -> _Client:
        while self.free:
            client = self.free.popleft()
            if client not in self.lost:
                return client
        return await self._connected()

    async def _connected(self) -> _Client:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: _Client(self), "127.0.0.1", self.port)
        self.clients.append(client)
        return client
