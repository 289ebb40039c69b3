"""Python's other gRPC servers over this project's models: what the transport costs, and nothing else.

`python -m benchmarks.grpc_servers NAME MODELS PORT GRPC_PORT` serves one of them beside the same application; `compare`
runs them in turns. All share the codec, the batcher and the model; only what turns HTTP/2 into a call differs.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import grpc
import grpclib.const
import grpclib.server
import numpy as np
import uvicorn

from benchmarks.contestants import Contestant, free_port, running
from benchmarks.findings import Finding
from benchmarks.grpc_load import METHOD, request_of
from benchmarks.grpc_load import load as python_load
from serving.grpc_api.prediction import CODECS, ROUTES, Predictor, StreamPrediction
from serving.grpc_api.server import GrpcServer
from serving.http_api.app import create_app
from serving.http_api.services import Services
from serving.prediction.endpoints import EndpointTable
from serving.protocols.messages import SERVICE
from serving.settings import Settings

CALLS = 32


class _Predicting:
    """ModelInfer from bytes to bytes, as a coroutine."""

    def __init__(self, fleet: Any, metrics: Any, pool: Any, port: int) -> None:
        endpoints = EndpointTable(
            ROUTES,
            CODECS,
            metrics=metrics,
            access=None,
            pool=pool,
            max_text_bytes=1 << 20,
            max_body_bytes=1 << 20,
        )
        endpoints.follow(fleet)
        self._predictor = Predictor(endpoints, pool)
        self._port = port
        self._call: Any = SimpleNamespace(
            connection=self, head=SimpleNamespace(headers=[]), time_remaining=lambda: None
        )

    async def infer(self, request: bytes) -> bytes:
        answer = asyncio.get_running_loop().create_future()
        self._predictor.start(request, StreamPrediction(self._call, answer.set_result))
        made = await answer
        if not isinstance(made, bytes):
            raise RuntimeError(made)
        return made


class GrpcAio(_Predicting):
    """grpcio's asyncio server."""

    async def start(self) -> None:
        """Listen."""
        self._server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(self._answer)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
        self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()

    async def stop(self) -> None:
        """Stop."""
        await self._server.stop(None)

    async def _answer(self, request: bytes, _: Any) -> bytes:
        return await self.infer(request)


class Grpclib(_Predicting):
    """grpclib, which stands on h2."""

    def __mapping__(self) -> dict[str, grpclib.const.Handler]:
        unary = grpclib.const.Cardinality.UNARY_UNARY
        return {METHOD: grpclib.const.Handler(self._answer, unary, bytes, bytes)}

    async def _answer(self, stream: Any) -> None:
        await stream.send_message(await self.infer(await stream.recv_message()))

    async def start(self) -> None:
        """Listen."""
        bare = SimpleNamespace(
            __content_subtype__="proto", encode=lambda message, _: message, decode=lambda data, _: data
        )
        self._server = grpclib.server.Server([self], codec=bare)
        await self._server.start("127.0.0.1", self._port)

    async def stop(self) -> None:
        """Stop."""
        self._server.close()
        await self._server.wait_closed()


def _ours(its: Services, port: int) -> GrpcServer:
    shared = {"access": its.access, "bodies": its.bodies, "pool": its.pool, "address": f"127.0.0.1:{port}"}
    return GrpcServer(its.fleet, its.metrics, **shared, grace=1, max_bytes=1 << 24)


SERVERS: dict[str, Any] = {
    "serving": _ours,
    "grpc.aio": lambda its, port: GrpcAio(its.fleet, its.metrics, its.pool, port),
    "grpclib on h2": lambda its, port: Grpclib(its.fleet, its.metrics, its.pool, port),
}


def h2load(port: int, row: np.ndarray, seconds: float, pinned: list[str], folder: Path) -> float:
    """Return the requests/s that nghttp2's load generator, written in C, gets answered."""
    request = request_of(row)
    (folder / "call").write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)
    headers = ["-Hcontent-type: application/grpc", "-Hte: trailers"]
    command = ["h2load", "-c4", f"-m{CALLS // 4}", f"-D{seconds}", f"-d{folder / 'call'}", *headers]
    url = f"http://127.0.0.1:{port}{METHOD}"
    text = subprocess.run([*pinned, *command, url], capture_output=True, text=True, check=True).stdout
    found = re.search(r"finished in .*, ([\d.]+) req/s", text)
    if found is None or " 0 failed, 0 errored" not in text:
        raise RuntimeError(f"calls failed:\n{text}")
    return float(found[1])


def compare(  # noqa: PLR0917  one comparison is all of these
    models: Path, folder: Path, row: np.ndarray, rounds: int, seconds: int, pinned: list[str]
) -> list[Finding]:
    """One row, 32 calls in flight over 4 connections, one core for the server: the servers in turns, medians."""
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name in SERVERS:
            port = free_port()
            command = (sys.executable, "-m", "benchmarks.grpc_servers", name, str(models), "{port}", str(port))
            with running(Contestant(name, command, {}, "/v2/health/ready"), folder, "0"):
                # grpcio's own client first: it says what was wrong with an answer.
                rate, *_ = python_load(f"127.0.0.1:{port}", row, CALLS, seconds, pinned)
                rates.setdefault((name, "grpcio's client"), []).append(rate)
                if shutil.which("h2load"):
                    rates.setdefault((name, "h2load"), []).append(h2load(port, row, seconds, pinned, folder))
    findings = []
    for (name, client), found in rates.items():
        findings.append(Finding(f"gRPC, {name}, 1 row, 32 in flight, {client}: requests", median(found), "/s"))
        if name != "serving":
            ours = median(rates["serving", client])
            due = 3.0 if (name, client) == ("grpc.aio", "h2load") else None
            findings.append(Finding(f"gRPC, serving against {name}, {client}", ours / median(found), "times", due))
    return findings


def main(name: str, models: str, port: int, grpc_port: int) -> None:
    """Serve."""
    app = create_app(
        Settings(models=Path(models)),
        companion=lambda services: SERVERS[name](services, grpc_port),
    )
    uvicorn.run(app, port=port, loop="uvloop", log_level="error", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
