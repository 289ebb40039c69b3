"""How much a caller may ask for, in one worker and over all of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from serving.access import rate_limits
from serving.access.access import Access
from serving.access.key_store import KeyStore
from serving.access.rate_limits import Buckets, RateLimit, Rates
from serving.errors import RateLimited
from tests.access import issuer
from tests.conftest import MODELS, running

ROW = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


class Clock:
    """Stands for the clock of the limits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rate_limits, "time", made)
    return made


def granted(limit: RateLimit, tries: int, rows: int | None = None) -> int:
    got = 0
    for _ in range(tries):
        try:
            limit.take_request() if rows is None else limit.take_rows(rows)
            got += 1
        except RateLimited:
            pass
    return got


def test_a_second_s_worth_at_once_and_then_the_rate(clock: Clock) -> None:
    """In one worker a rate is exact: a second's worth at once, then as it comes in, and no more for having waited."""
    limit = RateLimit(Buckets(), b"app", Rates(requests_per_s=10))
    assert granted(limit, 25) == 10
    got = 0
    for _ in range(2000):
        clock.now += 0.01
        got += granted(limit, 3)
    assert got == 200
    clock.now += 3600
    assert granted(limit, 25) == 10


def test_a_request_of_more_rows_than_a_second_s_is_paid_for_afterwards(clock: Clock) -> None:
    """It is answered where nothing else was asked for, and what it cost has to come in before the next one is."""
    limit = RateLimit(Buckets(), b"app", Rates(rows_per_s=100))
    assert granted(limit, 3, rows=1000) == 1
    clock.now += 9
    with pytest.raises(RateLimited) as refused:
        limit.take_rows(100)
    assert refused.value.retry_after == 1
    clock.now += 1
    assert granted(limit, 3, rows=100) == 1


def test_callers_do_not_share_and_more_than_there_is_room_for_forget_no_debt(clock: Clock) -> None:
    """Each caller has its own rate; of thousands those are forgotten that have asked for nothing lately."""
    buckets = Buckets()
    names = [7 + k * (rate_limits._ROWS - rate_limits._WAYS) for k in range(1, 60)]  # all in the same few rows
    assert buckets.take(names[0], 0, 1.0) == 0
    for name in names[1:]:
        clock.now += 0.001
        assert buckets.take(name, 0, 0.0005) == 0
    assert buckets.take(names[0], 0, 1.0) > 0


_HAMMER = """
import sys, time
from serving.access.rate_limits import Buckets
buckets, got, until = Buckets(int(sys.argv[1])), 0, float(sys.argv[2])
while time.monotonic() < until:
    got += not buckets.take(42, 0, 1 / 2000)
    time.sleep(float(sys.argv[3]))
print(got)
"""


def test_processes_share_a_rate_fairly() -> None:
    """However unevenly requests meet the workers, together they are given the rate within a tenth."""
    buckets = Buckets.shared()
    descriptor = buckets._descriptor
    begin, seconds = time.monotonic(), 2.0
    hammers = [
        subprocess.Popen(
            [sys.executable, "-c", _HAMMER, str(descriptor), str(begin + seconds), pause],
            pass_fds=[descriptor],
            stdout=subprocess.PIPE,
            text=True,
        )
        for pause in ("0", "0", "0.002", "0.02")
    ]
    first: float | None = None
    while first is None and time.monotonic() < begin + seconds:
        paid_at = buckets._paid_at[buckets._row(42)]
        first = time.monotonic() if paid_at else None
        time.sleep(0.001)
    got = sum(int(hammer.communicate()[0]) for hammer in hammers)
    assert first is not None
    due = 2000 * (begin + seconds - first + rate_limits.BURST_S)
    assert got == pytest.approx(due, rel=0.1)


def test_every_transport_keeps_to_the_rate_of_a_key(
    tmp_path: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """By fast path, ASGI and gRPC a key gets its requests and rows; then 429, with when to come back, and counted."""
    shutil.copytree(MODELS / "iris", tmp_path / "models" / "iris")
    store = KeyStore(tmp_path / "serving.keys")
    slow = {"requests": Rates(requests_per_s=0.01), "rows": Rates(rows_per_s=0.01)}
    keys = {
        (transport, what): store.create(f"{transport}-{what}", frozenset({"predict"}), rates=rates)
        for transport in ("fast_path", "asgi", "grpc")
        for what, rates in slow.items()
    }
    free = store.create("free", frozenset({"predict"}))
    flags = ("--keys", str(tmp_path / "serving.keys"), "--grpc-port", "0", "--workers", "2")
    with running(*flags, models=tmp_path / "models") as server:
        address = re.search(r"gRPC: (127\.0\.0\.1:\d+)", server.output())
        assert address is not None
        for (transport, what), key in keys.items():
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            said = rf"may ask for 0\.01 {what} a second"
            if transport == "grpc":
                tensor = triton_grpc.InferInput("features", [1, 4], "FP32")
                tensor.set_data_from_numpy(np.array([list(ROW.values())], np.float32))
                with triton_grpc.InferenceServerClient(address[1]) as client:
                    bearer = {"authorization": headers["authorization"]}
                    client.infer("iris", [tensor], headers=bearer)
                    with pytest.raises(triton_grpc.InferenceServerException, match=said) as refused:
                        client.infer("iris", [tensor], headers=bearer)
                    assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
                continue
            body = json.dumps({"instances": [ROW]}).encode()
            answers = [
                # Each on a connection of its own, which either worker takes; a body without a length is for ASGI.
                httpx.post(
                    f"{server.url}/v1/models/iris:predict",
                    content=body if transport == "fast_path" else iter([body]),
                    headers=headers,
                )
                for _ in range(3)
            ]
            assert [answer.status_code for answer in answers] == [200, 429, 429]
            assert re.search(said, answers[1].json()["error"])
            assert 90 <= int(answers[1].headers["retry-after"]) <= 100
        bearer = {"authorization": f"Bearer {free}"}
        for _ in range(5):
            answer = httpx.post(f"{server.url}/v1/models/iris:predict", json={"instances": [ROW]}, headers=bearer)
            assert answer.status_code == 200
        counted = re.compile(r'serving_rejected_total\{model="iris",reason="rate_limited",version="\d"\} 10\.0')
        eventually(lambda: counted.search(httpx.get(f"{server.url}/metrics").text) is not None)


def test_tokens_of_one_subject_share_the_rate_that_is_set_for_tokens(tmp_path: Path) -> None:
    """A token made anew does not start anew; another subject has its own."""
    jwks = tmp_path / "jwks.json"
    jwks.write_text(issuer.jwks())
    access = Access(jwks=jwks, audience=issuer.AUDIENCE, issuer=issuer.ISSUER, token_rates=Rates(requests_per_s=1))
    for subject, expected in (("ada", 1), ("ada", 0), ("bob", 1)):
        token = issuer.token(sub=subject, scope="predict", nonce=str(time.monotonic()))
        limit = access.decide(f"Bearer {token}", "predict").limit
        assert limit is not None
        assert granted(limit, 1) == expected
