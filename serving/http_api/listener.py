"""uvicorn's server with this project's habits: signs of life, a polite end, and an end when the parent has gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from serving.deploy.fleet import Fleet
from serving.heartbeat import Heartbeat, Phase
from serving.http_api.fast_path.connection import Connection
from serving.http_api.fast_path.protocol import fast_path_for
from serving.http_api.services import Services
from serving.signals import DRAIN, UNREADY
from serving.tls import server_options

log = logging.getLogger("serving.listener")

LAST_WORDS_S = 1.0
"""Seconds that refusals get to reach their callers when the drain is cut short."""


class Listener(uvicorn.Server):
    """Serves one application, with its services, from a socket that is bound already.

    parent: pid of the process that started this one; when it is no longer our parent, this server drains and ends.
    drain_s: seconds. tls: what connections are accepted with, None for plain ones. heartbeat: where signs
    of life are left. announce: called once models are loaded and the socket answers.
    """

    def __init__(
        self,
        app: FastAPI,
        services: Services,
        *,
        drain_s: float,
        tls: ssl.SSLContext | None = None,
        parent: int | None = None,
        heartbeat: Heartbeat | None = None,
        announce: Callable[[Fleet], None] | None = None,
    ) -> None:
        self._announce = announce
        self._services = services
        self._shared = services.shared
        self._parent = parent
        self._heartbeat = heartbeat
        self._drain_s = drain_s
        timeouts = self._shared.timeouts
        self._tls = server_options(tls, handshake_s=timeouts.head_s, end_s=timeouts.write_s)
        self.cut_short = False
        """Whether the drain ended before every request had its own answer."""
        super().__init__(
            uvicorn.Config(
                app,
                http=fast_path_for(self._shared),
                loop="uvloop",
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,  # who is at the other end decides which proxy is believed
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models, take connections, and say so."""
        await super().startup([])  # uvicorn would take connections without a bound on their handshakes
        if not self._services.fleet.started:
            log.error("the application does not enter serving.lifespan when it starts, so that no model is loaded")
            await self.lifespan.shutdown()
            raise SystemExit(STARTUP_FAILURE)
        loop = asyncio.get_running_loop()
        for sock in sockets or []:
            self.servers.append(await loop.create_server(self._protocol, sock=sock, backlog=2048, **self._tls))
        # A full collection looks at every object, which took 50 ms of the loop's time: those of today are here to stay.
        gc.collect()
        gc.freeze()
        if self._heartbeat is not None and not self.should_exit:
            self._heartbeat.enter(Phase.READY)
        if self._announce is not None and self.started:
            self._announce(self._services.fleet)

    async def on_tick(self, counter: int) -> bool:
        """Do what is due ten times a second; return whether to end."""
        if self._heartbeat is not None:
            self._heartbeat.beat()
        if counter % 5 == 0:
            self._shared.sweep(self.server_state.connections)
            if self._parent is not None and os.getppid() != self._parent:
                self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the parent's orders too while this serves."""
        with super().capture_signals():
            for number in (DRAIN, UNREADY):
                signal.signal(number, self.handle_exit)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Say unready at once, and begin to drain; a second order cuts the drain short."""
        if sig not in (DRAIN, UNREADY) and os.getppid() == self._parent:
            return  # it went to the whole group, and the parent's order follows
        self._services.fleet.draining = True
        if sig != UNREADY:
            self.force_exit = self.should_exit
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, answer what was accepted, close; refuse what is left when the time is over."""
        if self._heartbeat is not None:
            self._heartbeat.enter(Phase.ENDING)
        self._services.fleet.draining = True
        self._take_the_last(sockets or [])
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        companion = self._services.companion
        stopping = asyncio.ensure_future(companion.stop()) if companion is not None else None
        sweeping = asyncio.ensure_future(self._sweep_on())  # or a slow client would hold the end up
        state = self.server_state
        told: set[object] = set()

        def busy() -> bool:
            # Again and again: a connection that was just accepted joins the set a turn of the loop later.
            for connection in state.connections - told:
                told.add(connection)
                connection.shutdown()
            return bool(state.connections or state.tasks or (stopping is not None and not stopping.done()))

        await self._while(busy, self._drain_s)
        if busy():
            self.cut_short = True
            log.error("the drain is cut short: what still waits or runs is refused")
            self._services.fleet.refuse()
            self._services.pool.refuse()
            if companion is not None:
                companion.cut_short()
            for connection in list(state.connections):
                if isinstance(connection, Connection) and connection.stream is not None:
                    connection.stream.refuse()
            self.force_exit = False
            await self._while(busy, LAST_WORDS_S)
            for connection in list(state.connections):
                connection.transport.abort()
        sweeping.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            # A model that never comes back must not hold the process.
            await asyncio.wait_for(self.lifespan.shutdown(), LAST_WORDS_S if self.cut_short else None)

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self._shared.sweep(self.server_state.connections)

    async def _while(self, busy: Callable[[], bool], seconds: float) -> None:
        """Wait as long as there is something to wait for, at most so long, and not beyond another signal."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while busy() and loop.time() < until and not self.force_exit:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.02)

    def _take_the_last(self, sockets: list[socket.socket]) -> None:
        """Accept what the kernel has accepted for us: closing the socket would reset those connections."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = sock.accept()
                    taking = loop.create_task(loop.connect_accepted_socket(self._protocol, connection, **self._tls))
                    self.server_state.tasks.add(taking)  # type: ignore[arg-type]
                    taking.add_done_callback(self.server_state.tasks.discard)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=asyncio.get_running_loop(),
        )

    def listen(self, sock: socket.socket) -> None:
        """Serve until told to end. Raises SystemExit where the application refused to start."""
        self.run(sockets=[sock])
