"""HTTP binary, JSON and gRPC beside each other: small rows, a megabyte, long JSON, and the event loop under it all.

.venv/bin/python -m benchmarks.protocols; a part of `make bench`. With PERF_ANALYZER naming NVIDIA's perf_analyzer (its
libraries on LD_LIBRARY_PATH) gRPC is also measured with that.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import timeit
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
from onnx import TensorProto, helper, save
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer

from benchmarks.contestants import Contestant, contestants, free_port, running
from benchmarks.decoding import forest_codec
from benchmarks.grpc_load import METHOD
from benchmarks.grpc_load import load as grpc_load

RESULTS = Path(__file__).parent / "results" / "protocols.json"
ROWS, WIDTH = 256, 1024
LOOP_S = 0.005
"""Longest that large bodies may hold the event loop at a time."""


@dataclass(frozen=True)
class Finding:
    """One measured figure; `aim` is a least, or where `most` a most; None where it stands for comparison."""

    what: str
    measured: float
    unit: str
    aim: float | None = None
    most: bool = False

    @property
    def verdict(self) -> str:
        """Say whether the aim was met."""
        if self.aim is None:
            return ""
        met = self.measured <= self.aim if self.most else self.measured >= self.aim
        return "met" if met else "MISSED"


def wide(folder: Path) -> None:
    """Write a cheap model that takes a megabyte: for each row its greatest element, and where it stands."""
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["features"], ["label"], axis=1, keepdims=0),
            helper.make_node("ReduceMax", ["features"], ["probabilities"], axes=[1], keepdims=1),
        ],
        "wide",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", WIDTH])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["rows"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 1]),
        ],
    )
    (folder / "wide" / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save(model, folder / "wide" / "1" / "model.onnx")


def echo(folder: Path) -> None:
    """Write a model that answers as much as it is given: each number, negated."""
    given, answered = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in ("features", "negated")
    )
    graph = helper.make_graph([helper.make_node("Neg", ["features"], ["negated"])], "echo", [given], [answered])
    (folder / "echo" / "1").mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save(model, folder / "echo" / "1" / "model.onnx")


def json_body(rows: np.ndarray) -> bytes:
    """Write rows as a v2 request with one flat tensor."""
    tensor = {"name": "features", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def binary_body(rows: np.ndarray) -> tuple[bytes, int]:
    """Write rows as a v2 request with a raw tensor that asks for raw outputs; return it and the bytes of its JSON."""
    raw = rows.astype(np.float32).tobytes()
    tensor = {
        "name": "features",
        "datatype": "FP32",
        "shape": list(rows.shape),
        "parameters": {"binary_data_size": len(raw)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}, separators=(",", ":")).encode()
    return head + raw, len(head)


@dataclass(frozen=True)
class Load:
    """What wrk measured; milliseconds. cpu: the worker's own microseconds a request, kernel included."""

    rate: float
    p50: float
    p99: float
    cpu: float


def wrk(  # noqa: PLR0917  one run is all of these
    url: str, body: bytes, json_bytes: int | None, connections: int, seconds: int, pid: int, folder: Path
) -> Load:
    """Send a body again and again, from the second core."""
    (folder / "body").write_bytes(body)
    header = f'wrk.headers["inference-header-content-length"]="{json_bytes}"\n' if json_bytes is not None else ""
    (folder / "send.lua").write_text(
        f'wrk.method="POST"\nlocal f=io.open("{folder}/body","rb")\nwrk.body=f:read("*a")\nf:close()\n{header}'
        'wrk.headers["content-type"]="application/json"\n'
    )
    before = cpu_seconds(pid)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(folder / "send.lua"), url]
    text = subprocess.run([*second_core(), *command], capture_output=True, text=True, check=True).stdout
    spent = cpu_seconds(pid) - before
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"requests failed:\n{text}")
    done = int(_found(r"(\d+) requests in", text)[1])
    return Load(
        float(_found(r"Requests/sec:\s+([\d.]+)", text)[1]),
        _milliseconds("50%", text),
        _milliseconds("99%", text),
        spent / done * 1e6,
    )


def _found(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"wrk printed no {pattern}:\n{text}")
    return found


def _milliseconds(percent: str, text: str) -> float:
    found = _found(rf"{percent}\s+([\d.]+)(us|ms|s)", text)
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its children so far."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += [int(child) for child in task.read_text().split()]
    ticks = 0
    for each in pids:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def second_core() -> list[str]:
    """Return what keeps a client off the server's core."""
    return ["taskset", "-c", "1"] if (os.cpu_count() or 1) > 1 else []


@contextmanager
def serving(models: Path, folder: Path, *flags: str, cores: str | None = "0") -> Iterator[tuple[int, int, int]]:
    """Run the server; give its ports for HTTP and gRPC, and its pid."""
    made = contestants(models, folder)["serving"]
    grpc_port = free_port()
    command = (*made.command, "--grpc-port", str(grpc_port), *flags)
    with running(Contestant("serving", command, {}, made.ready), folder, cores) as (port, pid, _):
        yield port, grpc_port, pid


def small_rows(models: Path, folder: Path, rounds: int, seconds: int) -> list[Finding]:
    """One row at 32 connections: JSON, binary and gRPC, taking turns."""
    row = load_breast_cancer().data[:1].astype(np.float32)
    text = json_body(load_breast_cancer().data[:1])
    raw, head = binary_body(row)
    found: dict[str, list[Load]] = {"JSON": [], "binary": [], "gRPC": []}
    analyzed: list[float] = []
    with serving(models, folder) as (port, grpc_port, pid):
        url = f"http://127.0.0.1:{port}/v2/models/forest/infer"
        wrk(url, text, None, 32, 1, pid, folder)
        for _ in range(rounds):
            found["JSON"].append(wrk(url, text, None, 32, seconds, pid, folder))
            found["binary"].append(wrk(url, raw, head, 32, seconds, pid, folder))
            before = cpu_seconds(pid)
            rate, p50, p99, done = grpc_load(f"127.0.0.1:{grpc_port}", row, 32, seconds, second_core())
            found["gRPC"].append(Load(rate, p50, p99, (cpu_seconds(pid) - before) / done * 1e6))
            analyzed += perf_analyzer(grpc_port, folder)
    rate = {name: median(load.rate for load in loads) for name, loads in found.items()}
    cpu = {name: median(load.cpu for load in loads) for name, loads in found.items()}
    p99 = {name: median(load.p99 for load in loads) for name, loads in found.items()}
    findings = [Finding("binary against JSON, 1 row, 32 connections", rate["binary"] / rate["JSON"], "times", 1.0)]
    for name in found:
        findings += [
            Finding(f"{name}, 1 row, 32 in flight: requests", rate[name], "/s"),
            Finding(f"{name}, 1 row, 32 in flight: p99", p99[name], "ms"),
            Finding(f"{name}, 1 row, 32 in flight: processor time of the server", cpu[name], "us a request"),
        ]
    if analyzed:
        findings.append(Finding("gRPC, 1 row, 32 in flight, perf_analyzer: requests", median(analyzed), "/s"))
    return findings


def perf_analyzer(grpc_port: int, folder: Path) -> list[float]:
    """Run NVIDIA's load generator where there is one."""
    program = os.environ.get("PERF_ANALYZER")
    if not program:
        return []
    report = folder / "perf.csv"
    flags = ["-i", "grpc", "--concurrency-range", "32", "-s", "90", "-p", "2000", "-r", "3", "-f", str(report)]
    command = [program, "-m", "forest", "-u", f"127.0.0.1:{grpc_port}", "--input-data", "random", *flags]
    report.unlink(missing_ok=True)
    subprocess.run([*second_core(), *command], capture_output=True, check=False)  # it fails where figures scatter
    return [float(line.split(",")[1]) for line in report.read_text().splitlines()[1:2]] if report.exists() else []


def megabyte(models: Path, folder: Path, rounds: int, seconds: int) -> list[Finding]:
    """256 rows of 1,024 floats: the server's part of the time, and the typical service's rate with the same in JSON."""
    rows = np.random.default_rng(0).random((ROWS, WIDTH)).round(4)
    raw, head = binary_body(rows)
    text = json_body(rows)
    beside, whole, ours, json_ours, theirs = [], [], [], [], []
    typical = contestants(models, folder)["typical FastAPI"]
    typical = Contestant(
        typical.name, typical.command, typical.paths, "/ready", {"MODEL": str(models / "wide" / "1" / "model.onnx")}
    )
    for _ in range(rounds):
        with serving(models, folder) as (port, _, pid):
            url = f"http://127.0.0.1:{port}/v2/models/wide/infer"
            wrk(url, raw, head, 1, 1, pid, folder)
            before = totals(port)
            load = wrk(url, raw, head, 1, seconds, pid, folder)
            count, prediction, inference = (b - a for a, b in zip(before, totals(port), strict=True))
            beside.append((prediction - inference) / count * 1e3)
            whole.append(load.p50 - inference / count * 1e3)
            ours.append(wrk(url, raw, head, 4, seconds, pid, folder).rate)
            json_ours.append(wrk(url, text, None, 4, seconds, pid, folder).rate)
        with running(typical, folder, "0") as (port, pid, _):
            theirs.append(wrk(f"http://127.0.0.1:{port}/infer", text, None, 4, seconds, pid, folder).rate)
    return [
        Finding("1 MB binary: server's time beside the model's, mean", median(beside), "ms", 0.3, most=True),
        Finding("1 MB binary: client's p50 beside the model's, wire included", median(whole), "ms"),
        Finding("1 MB binary against the typical service's JSON", median(ours) / median(theirs), "times", 10.0),
        Finding("1 MB binary: requests", median(ours), "/s"),
        Finding("the same as JSON: requests", median(json_ours), "/s"),
        Finding("the same as JSON, typical FastAPI: requests", median(theirs), "/s"),
    ]


def totals(port: int) -> tuple[float, float, float]:
    """Return predictions of the wide model so far, their seconds, and the model's own."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()

    def value(name: str) -> float:
        return float(_found(rf'(?m)^{name}{{model="wide",version="1"}} (\S+)$', text)[1]) if name in text else 0.0

    return (
        value("serving_prediction_seconds_count"),
        value("serving_prediction_seconds_sum"),
        value("serving_inference_seconds_sum"),
    )


def decoding(models: Path) -> list[Finding]:
    """1,000 rows of 30: the decoder beside Pydantic's strict list of lists, both up to the model's array."""
    codec = forest_codec(models)
    data = load_breast_cancer().data
    rows = np.concatenate([data, data])[:1000]
    body = json_body(rows)
    adapter = TypeAdapter(list[list[float]])
    lists = json.dumps(rows.tolist(), separators=(",", ":")).encode()

    def pydantic() -> Any:
        return np.array(adapter.validate_json(lists, strict=True), dtype=np.float32)

    assert np.array_equal(codec.decode([], body).inputs[0], pydantic())
    ours, theirs, bare = (
        best(call)
        for call in (
            lambda: codec.decode([], body),
            pydantic,
            lambda: adapter.validate_json(lists, strict=True),
        )
    )
    return [
        Finding("JSON of 1,000 x 30, decoded: Pydantic's time by ours, to the array", theirs / ours, "times", 2.5),
        Finding("the same, Pydantic stopping at the lists", bare / ours, "times"),
        Finding("JSON of 1,000 x 30: decoding", ours * 1e3, "ms"),
    ]


def best(call: Callable[[], Any]) -> float:
    """Return the least seconds of a call."""
    return min(timeit.repeat(call, number=10, repeat=15)) / 10


@dataclass(frozen=True)
class Long:
    """A request of many bytes, or whose answer has many; without a path it goes over gRPC."""

    what: str
    path: str
    body: bytes
    headers: dict[str, str]


def long_requests() -> list[Long]:
    """Make one of each form."""
    wide, forest, length = "/v2/models/wide/infer", "/v1/models/forest:predict", "inference-header-content-length"
    rows = np.random.default_rng(1).random((1400, WIDTH)).round(7)
    flat = json_body(rows)
    nested = {"name": "features", "datatype": "FP32", "shape": list(rows.shape), "data": rows.tolist()}
    raw, head = binary_body(np.zeros((3900, WIDTH)))
    numbers, numbers_head = binary_body(rows)
    as_json = numbers[:numbers_head].replace(b"true", b"false")
    data = load_breast_cancer()
    names = [str(name) for name in data.feature_names]
    cells = np.resize(data.data, (4000, 30)) * 1.000123
    by_name = {"instances": [dict(zip(names, row, strict=True)) for row in cells[:3900].tolist()]}
    columns = {"inputs": dict(zip(names, cells.T.tolist(), strict=True))}

    def made(what: str, path: str, body: Any, **headers: str) -> Long:
        whole = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Long(
            f"{what}, {len(whole) / 1e6:.0f} MB", path, whole, {k.replace("_", "-"): v for k, v in headers.items()}
        )

    return [
        made("v2 JSON", wide, flat),
        made("v2 JSON, nested", wide, {"inputs": [nested]}),
        made("v2 JSON, gzip", wide, gzip.compress(flat, 1), content_encoding="gzip"),
        made("v2 binary", wide, raw, **{length: str(head)}),
        made(
            "v2 binary, deflate",
            wide,
            zlib.compress(numbers, 1),
            content_encoding="deflate",
            **{length: str(numbers_head)},
        ),
        made("V1 by name", forest, by_name),
        made("V1 by position", forest, {"instances": cells.tolist()}),
        made("V1 columns", forest, columns),
        made(
            "v2 binary, answered in 15 MB of JSON",
            "/v2/models/echo/infer",
            as_json + numbers[numbers_head:],
            **{length: str(len(as_json))},
        ),
        made(
            "the same answer, gzip",
            "/v2/models/echo/infer",
            as_json + numbers[numbers_head:],
            accept_encoding="gzip",
            **{length: str(len(as_json))},
        ),
        made("v2 binary, answered in as much", "/v2/models/echo/infer", raw, **{length: str(head)}),
        made("V1 by position, answered in 15 MB", "/v1/models/echo:predict", {"instances": rows.tolist()}),
        *long_calls(rows),
    ]


def long_calls(rows: np.ndarray) -> list[Long]:
    """Make the forms of ModelInfer: raw and typed, read and answered."""
    floats = np.resize(rows, (3900, WIDTH)).astype(np.float32)

    def made(what: str, model: str, **contents: Any) -> Long:
        from serving.grpc_api.messages import message  # noqa: PLC0415  needed here alone

        tensor = {"name": "features", "datatype": "FP32", "shape": list(floats.shape)}
        if "typed" in contents:
            tensor["contents"] = {"fp32_contents": contents.pop("typed")}
        request = message("ModelInferRequest")(model_name=model, inputs=[tensor], **contents).SerializeToString()
        return Long(f"gRPC {what}, {len(request) / 1e6:.0f} MB", "", request, {})

    raw, typed = [floats.tobytes()], floats.ravel()
    return [
        made("raw", "wide", raw_input_contents=raw),
        made("typed", "wide", typed=typed),
        made("raw, answered in as much", "echo", raw_input_contents=raw),
        made("typed, answered in as much", "echo", typed=typed),
    ]


def held_loop(models: Path, folder: Path, rounds: int, seconds: float, only: str = ".") -> list[Finding]:
    """Large bodies one after the other on two connections, and meanwhile a probe on the worker's own event loop.

    All forms take turns. Two controls show the machine's own floor: no load at all, and one small row again and again.
    """
    log = folder / "lags"
    grpc_port = free_port()
    probe = (sys.executable, "-m", "benchmarks.lag", str(models), str(log), "{port}", str(grpc_port))
    row = json_body(np.zeros((1, WIDTH)))
    small = Long("the same client, single rows", "/v2/models/wide/infer", row, {})
    forms = [small, *(each for each in long_requests() if re.search(only, each.what))]
    spans: dict[str, list[tuple[float, float]]] = {each.what: [] for each in forms}
    spans["no load"] = []
    with running(Contestant("lag", probe, {}, "/v2/health/ready"), folder, None) as (port, _, _):
        for each in forms:
            hammer(each, port, grpc_port, 0.1)
        for _ in range(rounds):
            began = time.monotonic()
            time.sleep(seconds)
            spans["no load"].append((began, time.monotonic()))
            for each in forms:
                began = time.monotonic()
                hammer(each, port, grpc_port, seconds)
                spans[each.what].append((began, time.monotonic()))
    at, late, held = np.loadtxt(log, unpack=True)
    findings = []
    for what, times in spans.items():
        during = [(at >= began) & (at <= ended) for began, ended in times]
        longest = sorted(float(held[those].max()) * 1e3 for those in during)
        aim = None if what in {"no load", small.what} else LOOP_S * 1e3
        findings += [
            Finding(f"loop held, {what}: longest of a round, median", median(longest), "ms", aim, most=True),
            Finding(f"loop held, {what}: longest of all", longest[-1], "ms"),
            Finding(
                f"loop late, {what}: longest of all", max(float(late[those].max()) for those in during) * 1e3, "ms"
            ),
        ]
    return findings


def hammer(request: Long, port: int, grpc_port: int, seconds: float) -> int:
    """Send a request on two connections for a while; return how often."""
    until = time.monotonic() + seconds
    cores = sorted(os.sched_getaffinity(0))

    def send() -> int:
        # What a client computes must not take the core that the server's loop waits for.
        os.sched_setaffinity(0, cores[-1:])
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        sent = 0
        with asking(request, port, grpc_port) as ask:
            while time.monotonic() < until:
                ask()
                sent += 1
        return sent

    with ThreadPoolExecutor(2) as senders:
        return sum(sender.result() for sender in [senders.submit(send), senders.submit(send)])


@contextmanager
def asking(request: Long, port: int, grpc_port: int) -> Iterator[Callable[[], object]]:
    """Open a connection; give what sends the request on it once, and reads the answer."""
    if not request.path:
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options) as channel:
            call = channel.unary_unary(METHOD)
            yield lambda: call(request.body)
        return
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    room = bytearray(1 << 20)

    def ask() -> None:
        connection.request("POST", request.path, request.body, request.headers)
        answer = connection.getresponse()
        while answer.readinto(room):
            pass
        if answer.status != 200:
            raise RuntimeError(f"{request.what} was answered {answer.status}")

    yield ask
    connection.close()


def show(findings: list[Finding], console: Console) -> None:
    """Print the figures, and at the end what was aimed at."""
    table = Table("", "measured", "", "aim", "")
    for finding in findings:
        aim = "" if finding.aim is None else f"{'at most' if finding.most else 'at least'} {finding.aim:g}"
        table.add_row(finding.what, f"{finding.measured:,.2f}", finding.unit, aim, finding.verdict)
    console.print(table)
    missed = [f.what for f in findings if f.verdict == "MISSED"]
    console.print(f"{len(missed)} aims missed: {'; '.join(missed)}" if missed else "all aims met", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protocols", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument(
        "--only", default=".", help="regular expression of parts: small_rows megabyte decoding held_loop"
    )
    parser.add_argument("--keep", action="store_true", help="leave the results that are committed as they are")
    given = parser.parse_args(arguments)
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subprocess.run([sys.executable, "-W", "ignore", "-m", "training", "forest", "--to", str(models)], check=True)
        wide(models)
        echo(models)
        parts: dict[str, Callable[[], list[Finding]]] = {
            "small_rows": lambda: small_rows(models, folder, given.rounds, given.seconds),
            "megabyte": lambda: megabyte(models, folder, given.rounds, given.seconds),
            "decoding": lambda: decoding(models),
            "held_loop": lambda: held_loop(models, folder, given.rounds, given.seconds),
        }
        findings = [f for name, part in parts.items() if re.search(given.only, name) for f in part()]
    show(findings, Console(width=130))
    if not given.keep:
        facts = {
            "command": f"python -m benchmarks.protocols --rounds {given.rounds} --seconds {given.seconds}",
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "findings": [{**asdict(f), "verdict": f.verdict} for f in findings],
        }
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
