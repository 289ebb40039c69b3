"""gRPC load from grpcio's own client, which nobody here wrote, in a process of its own.

.venv/bin/python -m benchmarks.grpc_load URL CALLS SECONDS < request: keeps CALLS in flight and prints what it saw.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import grpc
import numpy as np

METHOD = "/inference.GRPCInferenceService/ModelInfer"
CHANNELS = 4


def load(url: str, row: np.ndarray, calls: int, seconds: float, pinned: list[str]) -> tuple[float, float, float, int]:
    """Run the load; return requests/s, p50 and p99 in milliseconds, and requests."""
    command = [*pinned, sys.executable, "-m", "benchmarks.grpc_load", url, str(calls), str(seconds)]
    text = subprocess.run(command, input=request_of(row), capture_output=True, check=True).stdout
    found = json.loads(text)
    return found["rate"], found["p50"], found["p99"], found["done"]


def request_of(row: np.ndarray) -> bytes:
    """Return a ModelInferRequest."""
    from serving.protocols.messages import message  # noqa: PLC0415  the client's process needs none of it

    made: bytes = message("ModelInferRequest")(
        model_name="forest",
        inputs=[{"name": "features", "datatype": "FP32", "shape": list(row.shape)}],
        raw_input_contents=[row.tobytes()],
    ).SerializeToString()
    return made


def main(url: str, calls: int, seconds: float, request: bytes) -> dict[str, float]:
    """Keep `calls` in flight: each answer begins the next."""
    channels = [grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(CHANNELS)]
    asks = [channel.unary_unary(METHOD) for channel in channels]
    for ask in asks:
        ask(request)
    times: list[float] = []
    until = time.perf_counter() + seconds
    ended = threading.Semaphore(0)

    def one(index: int) -> None:
        began = time.perf_counter()
        future = asks[index % CHANNELS].future(request)

        def done(answered: grpc.Future) -> None:
            answered.result()
            now = time.perf_counter()
            times.append(now - began)
            if now < until:
                one(index)
            else:
                ended.release()

        future.add_done_callback(done)

    began = time.perf_counter()
    for index in range(calls):
        one(index)
    for _ in range(calls):
        ended.acquire()
    spent = time.perf_counter() - began
    p50, p99 = (float(value) * 1e3 for value in np.quantile(times, (0.5, 0.99)))
    return {"rate": len(times) / spent, "p50": p50, "p99": p99, "done": len(times) + CHANNELS}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.stdin.buffer.read())))
