"""One worker with a probe on its event loop: `python -m benchmarks.lag MODELS LOG PORT`.

When it ends it writes to LOG how late the probe, due each millisecond, was each time: seconds, a line each. The
first line is the longest of its first second, when nothing is asked of it yet.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from pathlib import Path

from serving.http_api.app import create_app
from serving.http_api.listener import Listener
from serving.settings import Settings
from serving.worker import keep_the_loop_turning

EVERY_S = 0.001


class Probed(Listener):
    """The real listener, and how late its loop turns."""

    lags: list[float]
    log: Path

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the probe once the models are loaded, and let it see the quiet first."""
        await super().startup(sockets)
        self.lags = []
        probing = asyncio.create_task(self._probe())
        await asyncio.sleep(1)
        self.quiet, self.lags[:] = max(self.lags), []
        self.probing = probing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Write what the probe saw."""
        self.log.write_text("\n".join(f"{lag:.6f}" for lag in [self.quiet, *self.lags]))
        await super().shutdown(sockets)

    async def _probe(self) -> None:
        while True:
            began, used = time.perf_counter(), time.process_time()
            await asyncio.sleep(EVERY_S)
            late = time.perf_counter() - began - EVERY_S
            # Where other processes took the core, this one used no time of it: that is not what held the loop.
            self.lags.append(max(0.0, min(late, time.process_time() - used)))


def main(models: str, log: str, port: str) -> None:
    """Serve until SIGTERM."""
    keep_the_loop_turning()
    sock = socket.create_server(("127.0.0.1", int(port)))
    listener = Probed(create_app(Settings(models=Path(models), log_level="error")), drain_s=5, keep_alive_s=75)
    listener.log = Path(log)
    listener.listen(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
