"""uvicorn's server with this project's habits: a coarse clock for the lane, and an end when the parent has gone."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from serving.fleet.fleet import Fleet
from serving.http_api.lane import Door, lane_for


class Listener(uvicorn.Server):
    """Serves one application from a socket that is bound already.

    parent: pid of the process that started this one; when it is no longer our parent, this server drains and ends.
    drain_s, keep_alive_s: seconds. announce: called once models
    are loaded and the socket answers.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain_s: float,
        keep_alive_s: float,
        parent: int | None = None,
        announce: Callable[[Fleet], None] | None = None,
    ) -> None:
        self._announce = announce
        self._app = app
        self._door: Door = app.state.door
        self._parent = parent
        super().__init__(
            uvicorn.Config(
                app,
                http=lane_for(self._door),
                loop="uvloop",
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=max(1, round(keep_alive_s)),
                timeout_graceful_shutdown=max(1, round(drain_s)),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models, take connections, and say so."""
        await super().startup(sockets)
        if self._announce is not None and self.started:
            self._announce(self._app.state.fleet)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain both servers at the same time; the lifespan then closes the fleet."""
        companion = self._app.state.companion
        stopping = asyncio.ensure_future(companion.stop()) if companion is not None else None
        sweeping = asyncio.ensure_future(self._sweep_on())  # or a slow client would hold the end up
        await super().shutdown(sockets)
        sweeping.cancel()
        if stopping is not None:
            await stopping

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._door.sweep(self.server_state.connections)

    async def on_tick(self, counter: int) -> bool:
        """Do the twice-a-second work; return whether to end."""
        if counter % 5 == 0:
            self._door.sweep(self.server_state.connections)
            if self._parent is not None and os.getppid() != self._parent:
                self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Say unready at once; uvicorn then closes the socket and waits for what was accepted."""
        self._app.state.fleet.draining = True
        super().handle_exit(sig, frame)

    def listen(self, sock: socket.socket) -> None:
        """Serve until told to end. Raises SystemExit where the application refused to start."""
        self.run(sockets=[sock])
