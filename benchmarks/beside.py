"""What a client that sends the largest bodies costs one that sends single rows; a part of benchmarks.protocols."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer

from benchmarks.bodies import WIDTH, binary_body, json_body
from benchmarks.contestants import Contestant, running
from benchmarks.findings import Finding

EVERY_S = 0.004
"""Between two single rows: few, so that what they wait for is the other client and not each other."""
TIMES = 3.0
"""Most that the slowest hundredth of them may take of what it takes without company."""


IRIS = json.dumps({"instances": [[5.1, 3.5, 1.4, 0.2]]}).encode()


class Large(NamedTuple):
    """A request that is as large as may be."""

    what: str
    path: str
    body: bytes
    headers: dict[str, str]


def largest() -> list[Large]:
    """Make one request of each kind."""
    rng = np.random.default_rng(0)
    floats = json_body(rng.random((400, WIDTH)))
    words = [f"word {i} of a long text that somebody wrote" for i in range(100_000)]
    texts = {"inputs": [{"name": "words", "datatype": "BYTES", "shape": [4000, 25], "data": words}]}
    data = load_breast_cancer()
    rows = [dict(zip(data.feature_names, row, strict=True)) for row in np.resize(data.data, (4000, 30)).tolist()]
    bomb = gzip.compress(b'{"instances":[[5.1,3.5,1.4,0.2]' + b" " * (8 * 2**20 - 64) + b"]}")
    raw, head = binary_body(rng.random((4000, WIDTH)))
    v2 = "/v2/models/wide/infer"
    return [
        Large("JSON of floats", v2, floats, {}),
        Large("JSON of strings", "/v2/models/texts/infer", json.dumps(texts).encode(), {}),
        Large("V1 rows by name", "/v1/models/forest:predict", json.dumps({"instances": rows}).encode(), {}),
        Large("wrong JSON", v2, floats[:-50] + b"x" + floats[-50:], {}),
        Large("empty rows", "/v1/models/iris:predict", b'{"instances":[' + b"{}," * 2_700_000 + b"{}]}", {}),
        Large("gzip of 8 kB that inflates to 8 MB", "/v1/models/iris:predict", bomb, {"Content-Encoding": "gzip"}),
        Large("16 MB of binary", v2, raw, {"Inference-Header-Content-Length": str(head)}),
    ]


def beside(models: Path, folder: Path, rounds: int, seconds: float) -> list[Finding]:
    """Single rows on one connection beside two that send a large request again and again, kind by kind, in turns."""
    ours = (sys.executable, "-m", "serving.cli", "run", "--models", str(models), "--port", "{port}")
    loop = (sys.executable, "-m", "benchmarks.on_the_loop", str(models), "{port}")
    found: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(running(Contestant(name, command, {}, "/v2/health/ready"), folder, None))[0]
            for name, command in (("a process of its own", ours), ("on the event loop", loop))
        }
        for _ in range(rounds):
            for name, port in servers.items():
                found.setdefault((name, ""), []).append(p99(port, seconds))
                for large in largest():
                    with hammering(large, port, folder, seconds):
                        found.setdefault((name, large.what), []).append(p99(port, seconds))
    middle = {key: median(times) for key, times in found.items()}
    findings = []
    for name in servers:
        aim = TIMES if name == "a process of its own" else None
        quiet = middle[name, ""]
        findings.append(Finding(f"p99 of single rows alone, long bodies {name}", quiet * 1e3, "ms"))
        findings += [
            Finding(f"  the same beside {what}, by that alone", slow / quiet, "times", aim, most=True)
            for (server, what), slow in middle.items()
            if server == name and what
        ]
    return findings


def p99(port: int, seconds: float, path: str = "/v1/models/iris:predict", body: bytes = IRIS) -> float:
    """Send single rows for a while, one at a time; return the 99th percentile of their seconds."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    took = []
    sock = socket.create_connection(("127.0.0.1", port))
    until = time.monotonic() + seconds
    while (began := time.monotonic()) < until:
        try:
            sock.sendall(request)
            answer = sock.recv(65536)
        except ConnectionError:
            answer = b""
        took.append(time.monotonic() - began)
        if not answer:  # cut: the server thought that it was the client that took so long
            sock = socket.create_connection(("127.0.0.1", port))
        elif not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError("a single row was refused")
        time.sleep(max(0.0, began + EVERY_S - time.monotonic()))
    sock.close()
    return float(np.percentile(took, 99))


class hammering:
    """Two connections that send a large request all the time, by wrk."""

    def __init__(self, large: Large, port: int, folder: Path, seconds: float) -> None:
        (folder / "large").write_bytes(large.body)
        headers = "".join(f'wrk.headers["{name}"]="{value}"\n' for name, value in large.headers.items())
        (folder / "large.lua").write_text(
            f'wrk.method="POST"\nlocal f=io.open("{folder}/large","rb")\nwrk.body=f:read("*a")\nf:close()\n{headers}'
        )
        url = f"http://127.0.0.1:{port}{large.path}"
        self._command = ["wrk", "-t1", "-c2", f"-d{seconds + 60:.0f}s", "-s", str(folder / "large.lua"), url]

    def __enter__(self) -> None:
        self._wrk = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        time.sleep(1.5)  # the first of them start the process that reads the others

    def __exit__(self, *_: object) -> None:
        self._wrk.terminate()
        self._wrk.wait()
        time.sleep(0.5)
