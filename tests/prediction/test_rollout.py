"""Canary and shadow on the wire: who answers, for whom, and what is compared, over fast path, ASGI and gRPC alike."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton

from serving.deploy.shadow import Shadow
from serving.engine.session import OnnxSession
from serving.repository.traffic import choose
from serving.tensors import Tensors
from tests.conftest import MODELS, Server, running
from tests.drills import shadow as shadow_drill
from tests.drills.drill import Report

ROWS = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3], [5.9, 3.0, 4.2, 1.5]]

HEADER = {"version": "2", "percent": 30, "sticky": {"header": "x-user"}}
FEATURE = {"version": "2", "percent": 50, "sticky": {"feature": "sepal_length"}}
SHADOW = {"version": "2"}

Ask = Callable[..., str]
"""Predicts rows with a model, for a caller, and returns the version that answered."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve iris under several names: with canaries, with shadows (one a protocol), and with one of other features."""
    folder = tmp_path_factory.mktemp("models")
    trials: dict[str, dict[str, Any]] = {"header": {"canary": HEADER}, "feature": {"canary": FEATURE}}
    trials |= {name: {"shadow": SHADOW} for name in ("fast_path", "asgi", "grpc", "odd")}
    for name, trial in trials.items():
        shutil.copytree(MODELS / "iris", folder / name)
        (folder / name / "traffic.json").write_text(json.dumps({"stable": "1", **trial}))
    shutil.copy(MODELS / "diabetes" / "1" / "model.onnx", folder / "odd" / "2" / "model.onnx")
    (folder / "odd" / "2" / "manifest.json").unlink()
    with running("--grpc-port", "0", models=folder) as started:
        yield started


@contextmanager
def transport(server: Server, protocol: str) -> Iterator[Ask]:
    """Give what asks over one protocol."""
    if protocol == "grpc":
        found = re.search(r"gRPC: (\S+)", server.output())
        assert found
        with triton.InferenceServerClient(found[1]) as client:

            def call(model: str, rows: list[list[float]] = ROWS, caller: str = "") -> str:
                tensor = triton.InferInput("features", [len(rows), 4], "FP32")
                tensor.set_data_from_numpy(np.array(rows, np.float32))
                headers = {"x-user": caller} if caller else None
                return str(client.infer(model, [tensor], headers=headers).get_response().model_version)

            yield call
    else:
        with httpx.Client(base_url=server.url) as client:

            def post(model: str, rows: list[list[float]] = ROWS, caller: str = "") -> str:
                headers = {"X-User": caller} if caller else {}
                if protocol == "asgi":
                    headers["Origin"] = "https://example.org"  # not for the fast path
                answer = client.post(f"/v1/models/{model}:predict", json={"instances": rows}, headers=headers)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["model_version"])

            yield post


PROTOCOLS = ["fast_path", "asgi", "grpc"]


def test_live_answers_are_right_beside_shadows() -> None:
    """At little and full load no live answer fails beside a shadow, be it large, failing or slow; some are skipped."""
    report = Report()
    shadow_drill.run(report, spans=1, seconds=0.3, mebibytes=16, timed=False)
    assert report.kept, report.broken()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_canary_sticks_to_its_callers(server: Server, protocol: str) -> None:
    """With a header, each caller sees one version, the same over every protocol; without it, requests are shared."""
    callers = [f"user-{i}" for i in range(40)]
    due = {c: "2" if choose(b"header/2/" + c.encode(), 30) else "1" for c in callers}
    assert 3 < Counter(due.values())["2"] < 25
    with transport(server, protocol) as ask:
        assert {caller: ask("header", caller=caller) for caller in callers} == due
        assert {caller: ask("header", ROWS[:1], caller) for caller in callers} == due
        shared = Counter(ask("header") for _ in range(100))
        assert 27 <= shared["2"] <= 33


def test_who_names_a_version_gets_it(server: Server) -> None:
    """The canary has a share of the requests that name no version; versions and labels answer as named, counted."""
    with httpx.Client(base_url=server.url) as client:
        for path, version in (("versions/1", "1"), ("versions/2", "2"), ("labels/canary", "2"), ("labels/stable", "1")):
            for _ in range(5):
                answer = client.post(f"/v1/models/header/{path}:predict", json={"instances": ROWS})
                assert answer.json()["model_version"] == version
        assert (
            'serving_predictions_total{model="header",outcome="ok",protocol="v1",version="2"}'
            in client.get("/metrics").text
        )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_canary_sticks_to_a_feature(server: Server, protocol: str) -> None:
    """With a feature, its value in the first row decides, whatever the other rows and features are."""
    with transport(server, protocol) as ask:
        found = {}
        for tenths in range(40, 80):
            found[tenths] = ask("feature", [[tenths / 10, 3.5, 1.4, 0.2]])
            assert ask("feature", [[tenths / 10, 2.5, 4.4, 1.2], *ROWS], "someone") == found[tenths]
        assert ask("feature", [[4.0, 3.5, 1.4, 0.2]] * 4000) == found[40], "a body that is decoded on a thread"
        assert 8 < Counter(found.values())["2"] < 32


@pytest.mark.parametrize("model", ["header", "feature"])
def test_a_canary_keeps_what_a_header_asks(server: Server, model: str) -> None:
    """The time that a request allows bounds it whichever of two versions answers, on fast path and ASGI."""
    with httpx.Client(base_url=server.url) as client:
        for origin in ({}, {"Origin": "https://example.org"}):
            for value in (4.0, *range(41, 80)):
                late = {"X-Request-Timeout": "0.0000001", "X-User": str(value), **origin}
                row = {"instances": [[value / 10, 3.5, 1.4, 0.2]]}
                assert client.post(f"/v1/models/{model}:predict", json=row, headers=late).status_code in {429, 504}


def test_a_sticky_feature_that_stable_lacks_is_named() -> None:
    """A rule that could never decide is refused with the features that there are."""
    from serving.deploy.canary_selection import key_of
    from serving.engine.session import OnnxSession
    from serving.errors import InvalidRequest

    signature = OnnxSession(MODELS / "iris" / "1" / "model.onnx").signature
    with pytest.raises(InvalidRequest, match="no feature 'age'; features: sepal_length"):
        key_of(signature, "age")


def test_a_sticky_feature_of_no_rows_decides_too() -> None:
    """A request without rows has no value to decide by, and gets an answer all the same."""
    from serving.deploy.canary_selection import key_of

    key = key_of(OnnxSession(MODELS / "iris" / "1" / "model.onnx").signature, "sepal_width")
    assert key((np.zeros((0, 4), np.float32),)) == b""
    assert key((np.array([[1, 2.5, 3, 4], [5, 6, 7, 8]], np.float32),)) == b"2.5"


def counted(server: Server, model: str) -> dict[str, float]:
    """Return what was counted of a model's shadow, by name and outcome."""
    found = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("serving_shadow_") and f'model="{model}"' in line and "_bucket" not in line:
            name, value = line.rsplit(" ", 1)
            outcome = re.search(r'outcome="(\w+)"', name)
            found[name.split("{")[0].removeprefix("serving_shadow_") + (f" {outcome[1]}" if outcome else "")] = float(
                value
            )
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_shadow_is_compared_and_never_answers(
    server: Server, protocol: str, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Stable answers all; the shadow's labels, scores and time are compared with it, and what it skips is counted."""
    with transport(server, protocol) as ask:
        for _ in range(50):
            assert ask(protocol) == "1"

    def seen() -> float:
        found = counted(server, protocol)
        return found.get("requests_total compared", 0) + found.get("requests_total busy", 0)

    eventually(lambda: seen() == 50)
    found = counted(server, protocol)
    compared = found["requests_total compared"]
    assert compared > 0
    assert found["rows_total"] == found["score_difference_count"] == 3 * compared
    assert found["seconds_count"] == compared
    assert 0 < found["agreement_ratio"] <= 1


def test_a_shadow_that_wants_other_features_harms_nobody(
    server: Server, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Inputs that the shadow can't take are counted as such, and every live answer is right."""
    with transport(server, "fast_path") as ask:
        assert [ask("odd") for _ in range(20)] == ["1"] * 20
    eventually(lambda: counted(server, "odd").get("requests_total incompatible") == 20)


@pytest.mark.parametrize(("seconds", "nice"), [(0.0, 0), (0.006, 19)])
def test_heavy_shadows_give_way(seconds: float, nice: int) -> None:
    """A shadow that computes for long gets the lowest priority; one that is mostly Python keeps the event loop's."""
    session = OnnxSession(MODELS / "iris" / "1" / "model.onnx")
    priorities: list[int] = []

    def run(inputs: Tensors) -> Tensors:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
        return session.run(inputs)

    signature, batcher = session.signature, SimpleNamespace(queued_rows=0)
    live: Any = SimpleNamespace(signature=signature, batcher=batcher)
    model: Any = SimpleNamespace(
        name="iris", version="2", signature=signature, session=SimpleNamespace(threads=1, run=run)
    )

    async def offer() -> None:
        shadow = Shadow(live, model, 100, None)
        inputs = (np.array(ROWS, np.float32),)
        for _ in range(2):  # behind a heavy one it rests for two hundred times as long
            shadow.offer(inputs, 3, session.run(inputs))
        while len(priorities) < 2:  # noqa: ASYNC110  the condition is another thread's
            await asyncio.sleep(0.01)
        shadow.close()

    asyncio.run(offer())
    assert priorities[-1] == max(nice, os.getpriority(os.PRIO_PROCESS, 0))
