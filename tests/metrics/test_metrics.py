"""What a scrape shows: names, sums over workers, bounds, and what a broken file does."""

from __future__ import annotations

import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.heartbeat import Heartbeat
from serving.linux.files import write_whole
from serving.metrics import metrics as metrics_module
from serving.metrics.counts import Counts
from serving.metrics.metrics import MOST_SERIES, Metrics
from serving.metrics.store import MOST_SIZES
from serving.metrics.totals import read_totals, settle
from tests.conftest import Server

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
FIGURES = ("load_seconds", "row_seconds", "memory_bytes")
IRIS = {"instances": [[5.1, 3.5, 1.4, 0.2]]}


def parsed(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(metrics: Metrics) -> Samples:
    return parsed(metrics.render()[0].decode())


def of(samples: Samples, name: str, /, **labels: str) -> float:
    """Add up the samples of a name that carry these labels."""
    return sum(v for (n, ls), v in samples.items() if n == name and labels.items() <= dict(ls).items())


def test_every_metric_that_is_promised_is_there(client: httpx.Client, server: Server) -> None:
    """After a few requests each metric has a sample with the labels that dashboards use."""
    before = parsed(client.get("/metrics").text)
    for _ in range(3):
        client.post("/v1/models/iris:predict", json={"instances": IRIS["instances"] * 2})
    bad = {"instances": [{"sepal_length": 1, "sepal_width": 1, "petal_length": 1, "petal_width": "x"}]}
    client.post("/v1/models/iris:predict", json=bad)
    client.post("/v2/models/iris/infer", json={})
    after = parsed(client.get("/metrics").text)

    def grew(name: str, **labels: str) -> float:
        return of(after, name, **labels) - of(before, name, **labels)

    iris = {"model": "iris", "version": "2"}
    assert grew("serving_predictions_total", **iris, protocol="v1", outcome="ok") == 3
    assert grew("serving_predictions_total", **iris, protocol="v1", outcome="invalid") == 1
    assert grew("serving_predictions_total", **iris, protocol="v2", outcome="invalid") == 1
    assert grew("serving_rows_total", **iris) == 6
    assert grew("serving_batch_rows_sum", **iris) == 6
    assert grew("serving_invalid_features_total", **iris, feature="petal_width") == 1
    for name in ("queue", "inference"):
        assert grew(f"serving_{name}_seconds_count", **iris) == 3
        assert of(after, f"serving_{name}_seconds_bucket", **iris, le="0.00025") >= 0
    assert grew("serving_prediction_seconds_count", **iris) == 5
    route = "/v1/models/{model}:predict"
    assert grew("serving_http_requests_total", route=route, method="POST", status="2xx") == 3
    assert grew("serving_http_requests_total", route=route, method="POST", status="4xx") == 1
    assert grew("serving_http_request_seconds_count", route=route, method="POST") == 4
    assert of(after, "serving_model_ready", **iris) == 1
    assert of(after, "serving_model_info", **iris, task="classification") == 1
    assert of(after, "serving_queued_rows", **iris) == 0


def test_unknown_models_and_paths_add_no_series(client: httpx.Client) -> None:
    """Junk names, paths and methods collapse into one series each."""
    client.get("/junk")
    client.post("/v1/models/junk:predict", json=IRIS)
    before = len(client.get("/metrics").text.splitlines())
    for i in range(50):
        client.get(f"/junk/{i}")
        client.post(f"/v1/models/junk{i}:predict", json=IRIS)
        client.request(f"JUNK{i}" if i < 3 else "PROPFIND", "/v1/models")
    text = client.get("/metrics").text
    assert "junk" not in text.lower()
    assert len(text.splitlines()) - before <= 60


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed")
def test_promtool_finds_nothing_to_say(client: httpx.Client) -> None:
    """The exposition passes Prometheus's own linter."""
    client.post("/v1/models/iris:predict", json=IRIS)
    text = client.get("/metrics").content
    ended = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stderr == b""


def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    """With metrics off there is no /metrics, and predictions are answered as before."""
    from fastapi.testclient import TestClient

    from serving.http_api.app import create_app
    from serving.settings import Settings
    from tests.conftest import MODELS

    with TestClient(create_app(Settings(models=MODELS, metrics=False))) as client:
        assert client.post("/v1/models/iris:predict", json=IRIS).status_code == 200
        answer = client.get("/metrics")
        assert (answer.status_code, "--no-metrics" in answer.json()["error"]) == (404, True)


def test_the_sum_is_of_all_workers_and_survives_a_restart(tmp_path: Path) -> None:
    """Counters of all slots add up; a slot's next worker goes on from where the last one stopped."""
    counts = Counts.shared()
    one, two = Metrics(directory=tmp_path, slot=0, counts=counts), Metrics(directory=tmp_path, slot=1)
    for worker in (one, two):
        worker.model("m", "1").answered("v1", 5, 0.001)
        worker.model("m", "1").queued(3)
        worker.flush()
    assert of(scraped(one), "serving_rows_total", model="m") == 10
    assert of(scraped(two), "serving_queued_rows", model="m") == 6
    settle(tmp_path, 0, counts)
    assert of(scraped(two), "serving_queued_rows", model="m") == 3
    again = Metrics(directory=tmp_path, slot=0)
    assert of(scraped(again), "serving_rows_total", model="m") == 10
    again.model("m", "1").answered("v1", 1, 0.001)
    assert of(scraped(again), "serving_rows_total", model="m") == 11
    assert read_totals(tmp_path, [("m", "1")])["m", "1"].ok == 3, "what versions that are tried are judged by"
    assert len(list(tmp_path.iterdir())) == 2


def test_no_counter_goes_back_where_another_worker_is_scraped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that end while a scrape is made are not in it, since the next one, by another worker, has none yet."""
    one, two = Metrics(directory=tmp_path, slot=0), Metrics(directory=tmp_path, slot=1)

    def busy(path: Path, content: bytes) -> None:
        write_whole(path, content)
        one.model("m", "1").answered("v1", 1, 0.001)

    monkeypatch.setattr(metrics_module, "write_whole", busy)
    one.model("m", "1").answered("v1", 1, 0.001)
    seen = [of(scraped(worker), "serving_rows_total") for worker in (one, two, two, one, two)]
    assert seen == sorted(seen)


def test_a_worker_that_is_killed_loses_no_counter(tmp_path: Path) -> None:
    """What it counted since its last snapshot, or before its first, is added when it has ended; once."""
    due = 0
    for life in range(4):
        counts = Counts.shared()
        worker = Metrics(directory=tmp_path, slot=0, counts=counts)
        worker.model("m", "1").answered("v1", 5, 0.001)
        worker.model("m", "1").failed("grpc", "failed", 0.5)
        worker.route("/r", "GET").finished(200, 0.001)
        if life % 2:
            worker.flush()
            worker.flush()
        worker.model("m", "1").answered("v1", 2, 0.001)
        worker.model("n" * 300, "1").answered("v1", 1, 0.001)  # too long for a cell
        if life % 2:
            worker.flush()
        due += 8 if life % 2 else 7
        settle(tmp_path, 0, counts)
    samples = scraped(Metrics(directory=tmp_path, slot=1))
    assert of(samples, "serving_rows_total") == due == 30
    assert of(samples, "serving_predictions_total", model="m", outcome="ok") == 8
    assert of(samples, "serving_predictions_total", protocol="grpc", outcome="failed") == 4
    assert of(samples, "serving_failed_prediction_seconds_total") == 2.0
    assert of(samples, "serving_http_requests_total") == 4


@pytest.mark.parametrize(
    ("at", "garbage"), [(256, b"\xff" * 40), (256, struct.pack("d", 5) + b"\xff" * 32), (0, b"\xff" * 8)]
)
def test_what_a_crash_wrote_over_the_counters_is_left_out(tmp_path: Path, at: int, garbage: bytes) -> None:
    """Memory that a model's code has written over costs the counters there, and not the parent that reads them."""
    counts = Counts.shared()
    worker = Metrics(directory=tmp_path, slot=0, counts=counts)
    for version in ("1", "2", "3"):
        worker.model("m", version).answered("v1", 5, 0.001)
    counts._memory[at : at + len(garbage)] = garbage
    settle(tmp_path, 0, counts)
    assert of(scraped(Metrics(directory=tmp_path, slot=1)), "serving_rows_total", model="m", version="3") == 5


def test_what_a_crash_wrote_over_the_notes_does_not_end_their_reader() -> None:
    """What ran is told, whatever stands where its thread did."""
    heartbeat = Heartbeat()
    record = heartbeat.open("m", "1")
    record.since[0] = 1.0
    heartbeat._cells[4] = math.nan
    assert [(r.name, r.version) for r in heartbeat.running()] == [("m", "1")]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[[],[],[],[]", b'[[["x"]],[],[],[]]', b'[[],[],[],[["x",1]]]', b"[1,2,3]", b"\xff" * 100]
)
def test_a_corrupt_snapshot_is_left_out(tmp_path: Path, content: bytes) -> None:
    """A file that can't be read costs that worker's figures, and nobody the scrape."""
    metrics = Metrics(directory=tmp_path, slot=0)
    metrics.model("m", "1").answered("v1", 5, 0.001)
    (tmp_path / "worker-1.json").write_bytes(content)
    assert of(scraped(metrics), "serving_rows_total", model="m") == 5


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """Without the folder a worker still shows its own figures."""
    metrics = Metrics(directory=tmp_path / "gone", slot=0)
    metrics.model("m", "1").answered("v1", 5, 0.001)
    assert of(scraped(metrics), "serving_rows_total", model="m") == 5


class Loaded:
    """Stands for a loaded version, as long as it is referred to."""

    def __init__(self, metrics: Metrics, name: str, version: str) -> None:
        self.counts = metrics.model(name, version)
        self.counts.used_by(self)
        self.counts.ready(True)
        self.counts.answered("v1", 1, 0.001)


def test_a_new_version_every_day_has_series_of_its_own(tmp_path: Path) -> None:
    """However many versions came before, what serves is counted by name; who has gone longest makes room.

    The next worker in the slot goes on so. What was loaded all the time never goes back.
    """
    metrics = Metrics(directory=tmp_path)
    steady = Loaded(metrics, "steady", "1")
    for day in range(1, 2 * MOST_SERIES):
        latest = Loaded(metrics, "iris", str(day))
        if day % 100 == 0:
            metrics.flush()
    samples = scraped(metrics)
    seen = [int(dict(labels)["version"]) for name, labels in samples if name == "serving_rows_total"]
    assert len(seen) == MOST_SERIES
    assert min(day for day in seen if day > 1) == MOST_SERIES + 1
    assert of(samples, "serving_rows_total", model="steady") == 1
    assert of(samples, "serving_model_ready", model="iris", version=str(day)) == 1
    assert of(samples, "serving_rows_total", model="other") == 0
    del steady, latest
    again = Metrics(directory=tmp_path)
    live = [Loaded(again, "iris", str(2 * MOST_SERIES + day)) for day in range(3)] + [Loaded(again, "steady", "1")]
    samples = scraped(again)
    del live
    assert of(samples, "serving_rows_total", model="steady") == 2
    assert of(samples, "serving_rows_total", model="iris", version=str(2 * MOST_SERIES + 2)) == 1
    assert sum(1 for name, _ in samples if name == "serving_rows_total") == MOST_SERIES


def test_what_the_gate_said_of_who_serves_is_shown() -> None:
    """GateResults and figures are bounded too, and of those that are shown are the loaded versions and the newest."""
    metrics = Metrics()
    steady = Loaded(metrics, "steady", "1")
    versions = [("steady", "1"), *(("iris", str(day)) for day in range(1, 2 * MOST_SERIES))]
    metrics.status(
        asked={},
        folder_gone=False,
        passed=[(*version, True) for version in versions],
        figures=[(*version, "this", what, 1.0) for version in versions for what in FIGURES for _ in range(2)],
        errors=0,
    )
    samples = scraped(metrics)
    for name in ("serving_gate_passed", *(f"serving_gate_{what}" for what in FIGURES)):
        assert of(samples, name, model="steady") == of(samples, name, version=str(2 * MOST_SERIES - 1)) == 1
        assert of(samples, name) == MOST_SERIES
    del steady


def test_series_are_bounded() -> None:
    """Beyond a bound further models that are loaded, and routes, share the label value `other`."""
    metrics = Metrics()
    loaded = []
    for i in range(MOST_SERIES + 100):
        loaded.append(Loaded(metrics, f"m{i}", "1"))
        metrics.route(f"/r{i}", "GET").finished(200, 0.001)
    samples = scraped(metrics)
    assert of(samples, "serving_rows_total") == MOST_SERIES + 100
    assert of(samples, "serving_rows_total", model="other") == 100
    assert sum(1 for name, _ in samples if name == "serving_http_requests_total") == MOST_SERIES + 1


def test_tritons_clients_see_what_batches_of_each_size_did(
    two_workers: Server, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Over HTTP and gRPC `batch_stats` lists each size once, over all workers; the counts are those of the batches."""
    import tritonclient.grpc
    import tritonclient.http

    for rows in (1, 3, 3, 7):
        for _ in range(4):
            body = {"instances": IRIS["instances"] * rows}
            assert httpx.post(f"{two_workers.url}/v1/models/iris:predict", json=body).status_code == 200
    found = re.search(r"gRPC: (\S+)", two_workers.output())
    assert found
    http = tritonclient.http.InferenceServerClient(two_workers.url.removeprefix("http://"))
    with tritonclient.grpc.InferenceServerClient(found[1]) as grpc:

        def stats() -> list[dict[str, Any]]:
            told = (http.get_inference_statistics("iris"), grpc.get_inference_statistics("iris", as_json=True))
            return [next(m for m in one["model_stats"] if m["version"] == "2") for one in told]

        eventually(lambda: all(int(one.get("execution_count", 0)) == 16 for one in stats()))
        for one in stats():
            sizes = {int(b["batch_size"]): b["compute_infer"] for b in one["batch_stats"]}
            assert {size: int(did["count"]) for size, did in sizes.items()} == {1: 4, 3: 8, 7: 4}
            assert all(int(did["ns"]) > 0 for did in sizes.values())
            assert int(one["inference_count"]) == sum(size * int(did["count"]) for size, did in sizes.items())
    http.close()


def test_sizes_of_batches_are_bounded(tmp_path: Path) -> None:
    """However many sizes there are, a snapshot keeps so many of a version, and goes on with those."""
    for _ in range(2):
        metrics = Metrics(directory=tmp_path)
        counts = metrics.model("m", "1")
        for rows in range(1, 2 * MOST_SIZES):
            counts.ran(rows, [0.0], 0.25)
        ((total, sizes),) = metrics.statistics([("m", "1")]).values()
    assert sizes == dict.fromkeys(range(1, MOST_SIZES + 1), (2.0, 0.5))
    assert total.batches == 2 * (2 * MOST_SIZES - 1)
