"""This project on a Ray cluster of several nodes on this machine: `python -m tests.conformance.ray_cluster [PART]`.

Parts: suite, death, servers, score, overhead; without one, all. Ray lives in an environment of its own. Prints a line
for each promise and each figure, keeps them in benchmarks/results/ray.json, and returns 1 where a promise is not kept.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from serving.client.client import Client
from serving.errors import ServingError
from tests.conformance.environments import environment
from tests.conformance.peers import _free_ports
from tests.conformance.point import ask
from tests.conformance.ray_running import ENVIRONMENT, cluster, nginx, repository, until
from tests.conformance.registry import LIGHT
from tests.conformance.subject import Subject
from tests.conftest import MODELS, running
from tests.drills.load import Answer, load
from tests.drills.promotions import PATH, ROW, impossible, order

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "ray.json"
FEATURES = ["sepal_length", "sepal_width", "petal_length", "petal_width"]


class Found:
    """What was seen, printed as it comes."""

    def __init__(self) -> None:
        self.kept = True

    def promise(self, what: str, kept: bool, seen: Any) -> None:
        self.kept &= kept
        print("yes" if kept else "NO ", end=" ")
        self.figure(what, seen)

    def figure(self, what: str, seen: Any) -> None:
        print(f"{what}: {seen}", flush=True)
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({"cores": os.cpu_count()} | before | {what: seen}, indent=1) + "\n")


def suite(found: Found, folder: Path) -> None:
    """Ask the whole conformance suite; then promote and roll back under load."""
    with (
        repository(folder, more=True) as (settings, key),
        cluster("serve.yaml", settings, folder, nodes=2, replicas=2) as ray,
    ):
        subject = Subject(ray.url, None, key=key)
        results = ask(subject, LIGHT)
        subject.close()
        for one in results:
            if one.verdict == "no":
                print(f"    no: {one.group}: {one.name}: {one.note}")
        count = Counter(one.verdict for one in results)
        found.figure("suite, behind Ray's proxies, two replicas", dict(count))
        changed(found, "behind Ray's proxies", ray.port, SimpleNamespace(port=ray.port), key)


def changed(found: Found, where: str, port: int, server: Any, key: str) -> None:
    """Promote ten times under load: no request fails, none has an answer that was not to be had."""
    order(server, key, "promote", {"version": "1"})
    with load() as askers:
        askers.http(port, PATH, ROW, askers=3)
        time.sleep(10)  # they are processes, which take a while to begin
        changes = [order(server, key, "promote", {"version": str(1 + each % 2)}) for each in range(1, 11)]
        answers = askers.stop()
    failed = [answer for answer in answers if answer.error]
    wrong = impossible([answer for answer in answers if not answer.error], changes, "1")
    seen = {"requests": len(answers), "failed": len(failed), "by a version that was not to answer": len(wrong)}
    found.promise(f"10 promotions under load, {where}", not failed and not wrong and len(answers) > 100, seen)


@contextmanager
def repeating(url: str) -> Iterator[dict[str, float]]:
    """Have two threads ask with the client, which repeats; what they met is complete once this is closed."""
    seen = {"requests": 0.0, "failed": 0.0, "slowest s": 0.0}
    stop = threading.Event()

    def ask_on() -> None:
        while not stop.is_set():
            began = time.monotonic()
            try:
                client.predict("iris", [ROW])
            except ServingError:
                seen["failed"] += 1
            seen["requests"] += 1
            seen["slowest s"] = max(seen["slowest s"], round(time.monotonic() - began, 2))

    with Client(url, retries=8, repeat=True) as client:
        threads = [threading.Thread(target=ask_on) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield seen
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def told(answers: list[Answer]) -> dict[str, Any]:
    """Say what came of plain requests."""
    failed = Counter(answer.error[:60] for answer in answers if answer.error)
    slowest = round(max(answer.came - answer.asked for answer in answers), 2)
    return {"requests": len(answers), "failed": failed.total(), "slowest s": slowest, "how": dict(failed)}


def death(found: Found, folder: Path) -> None:
    """Kill a node under load, behind Ray's proxies."""
    with (
        repository(folder) as (settings, _),
        cluster("serve.yaml", settings, folder, nodes=3, replicas=3) as ray,
        load() as askers,
    ):
        with repeating(ray.url) as seen:
            askers.http(ray.port, PATH, ROW, askers=2)
            time.sleep(8)
            whole = ray.healed("kill node")
            time.sleep(2)
        plain = told(askers.stop())
        found.promise("a node of three killed, behind Ray's proxies, client that repeats", not seen["failed"], seen)
        found.figure("a node of three killed, behind Ray's proxies, without repeating", plain)
        found.figure("seconds until three replicas run again", round(whole, 1))


def servers(found: Found, folder: Path) -> None:
    """Servers that Ray keeps, behind nginx: promotions, a server that is killed, a replica, a node."""
    with repository(folder) as (settings, key), cluster("servers.yaml", settings, folder, nodes=3, replicas=3) as ray:
        with nginx([ray.url], folder) as port:
            changed(found, "servers behind nginx", port, SimpleNamespace(port=port), key)
        for how in ("kill server", "kill replica", "kill node"):
            # One nginx follows Ray; the other has what was true before, so that what a reload does is seen apart.
            with (
                nginx([ray.url], folder) as follows,
                nginx([ray.url], folder, reload="true") as stays,
                load() as following,
                load() as staying,
            ):
                with repeating(f"http://127.0.0.1:{follows}") as seen:
                    following.http(follows, PATH, ROW, askers=2)
                    staying.http(stays, PATH, ROW, askers=2)
                    time.sleep(12)
                    whole = ray.healed(how)
                    time.sleep(3)
                plain = told(staying.stop())
                where = f"three servers behind nginx, {how}"
                found.promise(f"{where}: no client repeats, nginx is not reloaded", not plain["failed"], plain)
                found.promise(f"{where}: client that repeats, nginx follows", not seen["failed"], seen)
                found.figure(f"{where}: no client repeats, nginx follows", told(following.stop()))
                found.figure(f"{where}: seconds until three serve again", round(whole, 1))


def scaling(found: Found, folder: Path) -> None:
    """More load than one replica is to have makes a second one, in both arrangements."""
    policy = {"policy_function": "serving.scale.ray:QueuedRows", "policy_kwargs": {"target": 200}}
    own: dict[str, dict[str, Any]] = {"serve.yaml": {"target_ongoing_requests": 4}, "servers.yaml": {"policy": policy}}
    for file, where in (("servers.yaml", "servers"), ("serve.yaml", "behind Ray's proxies")):
        bounds = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1, **own[file]}
        with (
            repository(folder) as (settings, _),
            cluster(file, settings, folder, nodes=2, scaling=bounds) as ray,
        ):
            address = (
                json.loads(urllib.request.urlopen(ray.url).read())["servers"][0]
                if file == "servers.yaml"
                else f"127.0.0.1:{ray.port}"
            )
            began = time.monotonic()
            asking = threading.Thread(target=wrk, args=(f"http://{address}{PATH}", 100, 32, 60, folder))
            asking.start()
            seconds = until(lambda: ray.say("replicas").get("RUNNING") == 2, 90) - began
            found.promise(f"a second replica under load, {where}", True, f"after {seconds:.0f} s")
            asking.join()


def score(found: Found, folder: Path) -> None:
    """The same bytes as without Ray; an interrupt; one and two actors."""
    bin_ = environment("ray") / "bin"
    gcs, agents = _free_ports(2)
    made = Path(tempfile.mkdtemp(dir=folder))
    rows = pd.DataFrame(np.random.default_rng(3).uniform(0.1, 8, (100_000, 4)).round(2), columns=FEATURES)
    for part in range(4):
        rows.to_csv(made / f"{part}.csv", index=False)
        rows.to_parquet(made / f"{part}.parquet", row_group_size=17_000)
        (made / f"{part}.ndjson").write_text(rows.to_json(orient="records", lines=True))
    text = (made / "1.csv").read_text().split("\n")
    text[777] = "1,2,bad,4"
    (made / "1.csv").write_text("\n".join(text))
    env = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    head = ["--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(gcs), "--num-cpus", "2"]
    more = [
        "--object-store-memory",
        "200000000",
        "--include-dashboard",
        "false",
        "--dashboard-agent-listen-port",
        str(agents),
    ]
    with (made / "log").open("w") as log:
        ray = subprocess.Popen([str(bin_ / "ray"), "start", *head, *more], env=env, stdout=log, stderr=log)

    def command(names: str, out: Path, *flags: str) -> list[str]:
        task = ["score", *sorted(map(str, made.glob(names))), "-m", "iris", "--version", "1", "--models", str(MODELS)]
        return [str(bin_ / "serving"), *task, "--out", str(out), *flags]

    def timed(names: str, out: Path, *flags: str) -> float:
        began = time.monotonic()
        ended = subprocess.run(command(names, out, *flags), env=env, capture_output=True, text=True, check=False)
        assert ended.returncode in (0, 3), ended.stderr
        return time.monotonic() - began

    try:
        until(lambda: "runtime started" in (made / "log").read_text(), 60)
        for given, wanted in (("csv", "csv"), ("ndjson", "ndjson"), ("parquet", "parquet"), ("csv", "parquet")):
            ours, theirs = made / f"local.out.{wanted}", made / f"ray.out.{wanted}"
            timed(f"?.{given}", ours, "--errors", f"{made}/local.bad")
            timed(f"?.{given}", theirs, "--engine", "ray", "--errors", f"{made}/ray.bad")
            same = (
                ours.read_bytes() == theirs.read_bytes()
                and (made / "local.bad").read_text() == (made / "ray.bad").read_text()
            )
            found.promise(
                f"{given} to {wanted} by Ray's actors, the same bytes", same, f"{ours.stat().st_size:,} bytes"
            )
        ours, theirs = made / "local.csv.csv", made / "again.csv.csv"
        timed("?.csv", ours)
        begun = subprocess.Popen(
            command("?.csv", theirs, "--engine", "ray"), env=env, stderr=subprocess.PIPE, text=True
        )
        until((made / f".{theirs.name}.progress").exists, 60)
        begun.send_signal(signal.SIGINT)
        _, said = begun.communicate(timeout=60)
        interrupted = begun.returncode == 130 and not theirs.exists()
        timed("?.csv", theirs, "--engine", "ray")
        seen = next((line for line in said.splitlines() if "interrupted" in line), said[-200:])
        found.promise(
            "interrupted and run again, the same bytes", interrupted and ours.read_bytes() == theirs.read_bytes(), seen
        )
        for times in (2, 20):
            pd.concat([rows] * times).to_csv(made / f"speed-{times}.csv", index=False)
        for engine in ("local", "ray"):
            rates = {}
            for workers in ("1", "2"):
                flags = ("--engine", engine, "--workers", workers)
                took = [timed(f"speed-{times}.csv", made / "speed.csv.csv", *flags) for times in (2, 20)]
                rates[workers] = round(18 * len(rows) / (took[1] - took[0]))
            rates["times"] = round(rates["2"] / rates["1"], 2)
            found.figure(f"rows/s of iris from one file of CSV, {engine}, by workers, start not counted", rates)
    finally:
        ray.terminate()
        ray.wait(90)


def overhead(found: Found, folder: Path) -> None:
    """One replica of each arrangement and `serving run`, taking turns."""
    with ExitStack() as stack:
        (settings, _) = stack.enter_context(repository(folder))
        ports = {"serving run": stack.enter_context(running(models=Path(settings["models"]))).port}
        first = stack.enter_context(cluster("serve.yaml", settings, folder, nodes=1, replicas=1))
        ports["Ray Serve, its proxy"] = first.port
        fast = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
        second = stack.enter_context(cluster("serve.yaml", settings, folder, nodes=1, replicas=1, **fast))
        ports["Ray Serve, HAProxy"] = second.port
        third = stack.enter_context(cluster("servers.yaml", settings, folder, nodes=1, replicas=1))
        ports["server that Ray keeps, behind nginx"] = stack.enter_context(nginx([third.url], folder))
        for connections in (1, 32):
            rates: dict[str, list[float]] = {}
            halves: dict[str, list[float]] = {}
            for _ in range(5):
                for name, port in ports.items():
                    rate, half = wrk(f"http://127.0.0.1:{port}{PATH}", 1, connections, 2, folder)
                    rates.setdefault(name, []).append(rate)
                    halves.setdefault(name, []).append(half)
            for name, seen in rates.items():
                figures = {"requests/s": round(median(seen)), "p50 ms": round(median(halves[name]), 2)}
                figures["of serving run"] = round(median(seen) / median(rates["serving run"]), 3)
                found.figure(f"1 row, {connections} connections: {name}", figures)


def wrk(url: str, rows: int, connections: int, seconds: int, folder: Path) -> tuple[float, float]:
    """Give requests/s and the median in milliseconds; 0 requests where one failed."""
    (folder / "send.lua").write_text(
        f'wrk.method="POST"\nwrk.headers["content-type"]="application/json"\n'
        f"wrk.body='{json.dumps({'instances': [ROW] * rows})}'\n"
    )
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(folder / "send.lua"), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    half = re.search(r"50%\s+([\d.]+)(us|ms|s)", text)
    if "Non-2xx" in text or "Socket errors" in text or rate is None or half is None:
        return 0.0, math.inf
    return float(rate[1]), float(half[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[half[2]]


PARTS = {part.__name__: part for part in (suite, death, servers, scaling, score, overhead)}


def main(names: list[str]) -> int:
    """Do some parts, or all."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        for name in names or PARTS:
            PARTS[name](found, Path(folder))
    return 0 if found.kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
