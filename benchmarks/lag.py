"""One worker with a probe on its event loop: `python -m benchmarks.lag MODELS LOG PORT GRPC_PORT`.

When it ends it writes to LOG, a line for each turn of the probe, which is due each millisecond: when it came (seconds
of the monotonic clock), how late (seconds), and how much of that held the loop.

What held the loop is what the process itself did. Not counted is the time in which the loop's thread was ready and
another one had the core, as the kernel's scheduler tells, and time in which no thread of the process ran at all:
whoever measures on two cores shares them with the client.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from pathlib import Path

from serving.http_api.app import create_app
from serving.http_api.listener import Listener
from serving.settings import Settings
from serving.worker import grpc_beside, keep_the_loop_turning

EVERY_S = 0.001


class Probed(Listener):
    """The real listener, and how late its loop turns."""

    seen: list[tuple[float, float, float]]
    log: Path

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the probe once the models are loaded."""
        await super().startup(sockets)
        self.seen = []
        self.probing = asyncio.create_task(self._probe())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Write what the probe saw."""
        self.log.write_text("\n".join(f"{at:.6f} {late:.6f} {held:.6f}" for at, late, held in self.seen))
        await super().shutdown(sockets)

    async def _probe(self) -> None:
        scheduling = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
        waited = _waited(scheduling)
        while True:
            began, used = time.monotonic(), time.process_time()
            await asyncio.sleep(EVERY_S)
            now = time.monotonic()
            late = max(0.0, now - began - EVERY_S)
            before, waited = waited, _waited(scheduling)
            held = min(late - (waited - before), time.process_time() - used)
            self.seen.append((now, late, max(0.0, held)))


def _waited(scheduling: int) -> float:
    """Return for how many seconds a thread was ready to run and had no core."""
    return int(os.pread(scheduling, 100, 0).split()[1]) / 1e9


def main(models: str, log: str, port: str, grpc_port: str) -> None:
    """Serve until SIGTERM."""
    keep_the_loop_turning()
    sock = socket.create_server(("127.0.0.1", int(port)))
    settings = Settings(models=Path(models), log_level="error")
    app = create_app(settings, companion=grpc_beside(settings, f"127.0.0.1:{grpc_port}"))
    listener = Probed(app, drain_s=5, keep_alive_s=75)
    listener.log = Path(log)
    listener.listen(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
