"""Ray Serve: this server's application on Ray's replicas, or a whole server of its own for each of them."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import time
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from serving.library import create_app
from serving.scale.upstreams import fetch
from serving.settings import Settings

try:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingContext
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Ray is not installed: pip install 'serving[ray]'", name="ray") from error

_START_S = 300.0
"""Seconds within which a server has to be ready: its gate may have to examine every version first."""
_ANSWER_S = 2.0
_QUEUED = re.compile(r"^serving_queued_rows\S* (\S+)$", re.MULTILINE)


def app(args: dict[str, Any]) -> serve.Application:
    """Make the application whose replicas serve a models folder behind Ray's proxies: for `serve deploy`, `serve run`.

    args: settings by name; others come from `SERVING_*`. Raises pydantic.ValidationError for what is no setting.
    """
    Settings(**args)

    def build() -> FastAPI:
        return create_app(**args)

    return serve.deployment(serve.ingress(build)(), name="Replica").bind()


def servers(args: dict[str, Any]) -> serve.Application:
    """Make the application whose replicas each run a server, which clients reach by its own address.

    args: as of `app`; `port`: the one that each listens on, where a node has but one; without it a free one. What Ray
    itself answers at `/` is where the servers are. Raises ValueError where they would not answer plain HTTP on a port.
    """
    settings = Settings(**args)
    if settings.uds or settings.tls_cert:
        raise ValueError("a server that Ray keeps listens on a port, without TLS: that is the load balancer's")
    return serve.deployment(Server, name="Server").bind(args)


class Server:
    """A replica that keeps a `serving run` beside it, and fails with it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        here = ray.util.get_node_ip_address()
        host = str(settings.get("host", here))
        port = int(settings.get("port", 0)) or _free_port(host)
        self._address = f"{here if host == '0.0.0.0' else host}:{port}"  # noqa: S104  an address that others can use
        given = {**settings, "host": host, "port": port}
        environment = {f"SERVING_{name.upper()}": str(value) for name, value in given.items()}
        # It ends with this process, however that ends, or it would keep the port and its memory for nobody.
        begin = (
            "import os; from serving.linux.sandbox import die_with; die_with(%d); from serving.cli import main; main()"
        )
        self._process = subprocess.Popen(  # noqa: S603  this project's own command
            [sys.executable, "-c", begin % os.getpid(), "run"], env={**os.environ, **environment}
        )
        until = time.monotonic() + _START_S
        while not self._get("/v2/health/ready"):
            self.check_health()
            if time.monotonic() > until:
                self._process.kill()
                raise RuntimeError(f"serving run is not ready after {_START_S:.0f} s")
            time.sleep(0.05)

    async def __call__(self, request: Request) -> JSONResponse:
        """Say where the servers are."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        said = await handle.broadcast("address").results_async(timeout_s=_ANSWER_S, return_exceptions=True)
        return JSONResponse({"servers": sorted(each for each in said if isinstance(each, str))})

    def address(self) -> str:
        """Return host:port."""
        return self._address

    def check_health(self) -> None:
        """Tell Ray whether the server lives; it replaces a replica that raises. Raises RuntimeError."""
        status = self._process.poll()
        if status is not None:
            raise RuntimeError(f"serving run ended with status {status}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray how many rows wait here."""
        return {"queued_rows": sum(map(float, _QUEUED.findall(self._get("/metrics") or "")))}

    def __del__(self) -> None:
        """End the server: it goes on for its drain delay, and finishes what it has accepted."""
        if hasattr(self, "_process"):
            self._process.terminate()
            self._process.wait()

    def _get(self, path: str) -> str | None:
        try:
            return fetch(f"http://{self._address}{path}", _ANSWER_S).decode()
        except OSError:
            return None


class QueuedRows:
    """Wants as many replicas as have no more than so many rows waiting at each, on average.

    A policy for Ray Serve's autoscaling, of servers that clients reach past Ray: it sees none of their requests.
    """

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return how many replicas there should be; Ray keeps to the bounds and delays of the configuration."""
        waiting = sum((context.aggregated_metrics or {}).get("queued_rows", {}).values())
        return math.ceil(waiting / self._target), {}


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as sock:
        return int(sock.getsockname()[1])
