"""The server with long bodies read on its event loop: `python -m benchmarks.on_the_loop MODELS PORT`."""

from __future__ import annotations

import asyncio
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

from serving.bodies.codec_pool import CodecPool, Job
from serving.errors import ServingError
from serving.http_api.app import create_app
from serving.http_api.listener import Listener
from serving.protocols.codec import Blobs
from serving.settings import Settings
from serving.worker import keep_the_loop_turning


def here(pool: CodecPool, *job: Any, deadline: float | None = None) -> Job:
    """Do at once what would go to the codec process."""
    _, codec, work, given, done = job
    try:
        found = work(codec, *[memoryview(part) if isinstance(part, pickle.PickleBuffer) else part for part in given])
        if isinstance(found[0], Blobs):
            found = pickle.loads(pickle.dumps(found, 5))
    except ServingError as error:
        found = error.bare()
    asyncio.get_running_loop().call_soon(done, found)
    return Job(None, codec, work, (), None)


def main(models: str, port: str) -> None:
    """Serve until SIGTERM."""
    keep_the_loop_turning()
    CodecPool.submit = here  # type: ignore[assignment]
    sock = socket.create_server(("127.0.0.1", int(port)))
    app = create_app(Settings(models=Path(models), log_level="error"), threads=2)
    Listener(app, app.state.serving, drain_s=5).listen(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
