"""Clients that are programs or environments of their own: NVIDIA's perf_analyzer and KServe's Python client."""

from __future__ import annotations

import json
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.conformance.environments import environment, perf_analyzer
from tests.conformance.point import point
from tests.conformance.subject import BINARY_ONLY, NotAsked, Subject, same

PERF = "perf_analyzer"
REQUESTS = 3000
"""A count instead of windows of time: on a busy machine those never become stable."""
KSERVE = "KServe's client"


def _perf(name: str, *flags: str, strings: bool = False) -> None:
    @point(PERF, f"{name}: `{' '.join(flags)}`", seconds=300)
    def _(subject: Subject) -> str:
        model = subject.model(datatype="BYTES") if strings else subject.model(numbers=True)
        address = subject.grpc if "grpc" in flags else subject.address
        if address is None:
            raise NotAsked("no --grpc address was given")
        if "-b" in flags and not model.batched:
            raise NotAsked("the model has no batch")
        program, variables = perf_analyzer()
        line = [program, "-m", model.name, "-u", address, *flags, "--request-count", str(REQUESTS)]
        for tensor in model.inputs:
            dims = tensor.shape[1:] if model.batched else tensor.shape
            if -1 in dims:
                line += ["--shape", f"{tensor.name}:{','.join('1' if d == -1 else str(d) for d in dims)}"]
        done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=120, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == 0, " ".join(said.split())[-300:]
        assert "error" not in said.lower(), " ".join(said.split())[-300:]
        counts = [int(found) for found in re.findall(r"Request count: (\d+)", said)]
        rates = re.findall(r"throughput: ([\d.]+) infer/sec", said)
        assert counts, " ".join(said.split())[-300:]
        assert sum(counts) == REQUESTS, f"{sum(counts)} of {REQUESTS} requests were answered"
        return f"{sum(counts)} requests, {float(rates[-1]):,.0f} inferences/s, none failed"


_perf("HTTP, binary", "-i", "http", "--concurrency-range", "4")
_perf(
    "HTTP, JSON",
    "-i", "http", "--input-tensor-format", "json", "--output-tensor-format", "json", "--concurrency-range", "4",
)  # fmt: skip
_perf("gRPC", "-i", "grpc", "--concurrency-range", "4")
_perf("gRPC, a stream", "-i", "grpc", "--streaming", "--concurrency-range", "4")
_perf("HTTP, batches of 8, asynchronous", "-i", "http", "-b", "8", "-a", "--concurrency-range", "4")
_perf("gRPC, compressed", "-i", "grpc", "--grpc-compression-algorithm", "gzip", "--concurrency-range", "4")
_perf("HTTP, strings", "-i", "http", "--string-length", "20", "--concurrency-range", "2", strings=True)
_perf("HTTP, 32 connections", "-i", "http", "--concurrency-range", "32", "-s", "20")
_perf("gRPC, 32 connections", "-i", "grpc", "--concurrency-range", "32", "-s", "20")


@lru_cache(maxsize=4)
def _kserve(url: str, address: str, cases: str) -> dict[str, Any]:
    python = environment("kserve") / "bin" / "python"
    script = Path(__file__).with_name("kserve_client.py")
    done = subprocess.run(
        [str(python), "-W", "ignore", str(script), url, address],
        input=cases,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-300:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cases(subject: Subject) -> list[dict[str, Any]]:
    kinds = ("FP32", "FP64", "INT32", "INT64", "BYTES", "BOOL")
    models = [m for m in subject.models if all(t.datatype in kinds for t in m.inputs)]
    return [{"model": m.name, "inputs": m.json(2 if m.batched else 1)["inputs"]} for m in models]


def _said(subject: Subject, key: str) -> Any:
    if key.startswith("grpc") and subject.grpc is None:
        raise NotAsked("no --grpc address was given")
    found = _kserve(subject.url, subject.grpc or "", json.dumps(_cases(subject)))[key]
    assert "is" in found, found["error"]
    return found["is"]


def _same(subject: Subject, shared: str) -> None:
    for case in _cases(subject):
        found = _said(subject, f"{shared} {case['model']}")
        assert found["id"] == "a-1", f"its id is {found['id']}"
        due = subject.infer(next(m for m in subject.models if m.name == case["model"]), {"inputs": case["inputs"]})
        assert not {o["datatype"] for o in due["outputs"]}.intersection(BINARY_ONLY)
        same(found, due)


for _door, _client in (("rest", "InferenceRESTClient"), ("grpc", "InferenceGRPCClient")):

    @point(KSERVE, f"{_client}: live, ready, model ready", seconds=600)
    def _(subject: Subject, shared: str = _door) -> None:
        for what in ("live", "ready", "model"):
            assert _said(subject, f"{shared} {what}"), f"{what}: no"

    for _kind in ("json", "binary"):

        @point(
            KSERVE,
            f"{_client}: infer, {_kind if _door == 'rest' else {'json': 'typed', 'binary': 'raw'}[_kind]}",
            seconds=600,
        )
        def _(subject: Subject, shared: str = f"{_door} {_kind}") -> None:
            _same(subject, shared)

    @point(KSERVE, f"{_client}: an unknown model is an error that names it", seconds=600)
    def _(subject: Subject, shared: str = _door) -> None:
        try:
            _said(subject, f"{shared} unknown")
        except AssertionError as error:
            text = str(error)
            assert "no-such-model" in text or "404" in text or "NOT_FOUND" in text, text
        else:
            raise AssertionError("it is answered")
