"""The formats of a scrape: Prometheus' text, OpenMetrics with exemplars, the names of Triton; and how long it gets."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable
from typing import Any

import httpx2 as httpx
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from docs import generated
from serving.metrics.definitions import COUNTERS, GAUGES, HISTOGRAMS
from serving.metrics.metrics import Metrics
from tests.conftest import MODELS, Server
from tests.metrics.test_metrics import IRIS, of, parsed

OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"}
TRACE = "0af7651916cd43dd8448eb211c80319c"


def traced(client: httpx.Client, trace: str, flags: str) -> None:
    header = {"traceparent": f"00-{trace}-b7ad6b7169203331-{flags}"}
    assert client.post("/v1/models/iris:predict", json=IRIS, headers=header).status_code == 200


def test_exemplars_lead_to_traces(client: httpx.Client) -> None:
    """OpenMetrics, where it is asked for, names the trace of a slow prediction that its caller records; no other."""
    client.get("/metrics")  # what was slowest before counts no more
    traced(client, TRACE, "01")
    answer = client.get("/metrics", headers=OPENMETRICS)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    exemplars = [
        (sample, family.name)
        for family in openmetrics.text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert {name for _, name in exemplars} == {"serving_prediction_seconds"}
    (mine,) = [sample for sample, _ in exemplars if sample.exemplar.labels == {"trace_id": TRACE}]
    assert 0 < mine.exemplar.value <= float(mine.labels["le"])
    traced(client, "f" * 32, "00")
    assert "f" * 32 not in client.get("/metrics", headers=OPENMETRICS).text
    plain = client.get("/metrics")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert TRACE not in plain.text


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/openmetrics-text;version=1.0.0;q=0.5, text/plain;q=0.5", "application/openmetrics-text"),
        ("Application/OpenMetrics-Text", "application/openmetrics-text"),
        ("application/openmetrics-text;q=0.5, text/plain", "text/plain"),
        ("application/openmetrics-text; q=0.0, */*", "text/plain"),
        ("*/*", "text/plain"),
    ],
)
def test_the_format_is_the_one_that_is_liked_better(client: httpx.Client, accept: str, kind: str) -> None:
    """Weights in Accept are heard: OpenMetrics goes to whom it is at least as welcome as Prometheus' own text."""
    assert client.get("/metrics", headers={"accept": accept}).headers["content-type"].startswith(f"{kind};")


def test_both_formats_say_the_same(client: httpx.Client) -> None:
    """Which format a scraper asks for changes neither names nor labels, so series go on when it changes its mind."""
    client.post("/v1/models/iris:predict", json=IRIS)

    def series(families: Iterable[Any]) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {(s.name, frozenset(s.labels.items())) for family in families for s in family.samples}

    plain = series(text_string_to_metric_families(client.get("/metrics").text))
    other = series(openmetrics.text_string_to_metric_families(client.get("/metrics", headers=OPENMETRICS).text))
    assert plain <= other  # a connection may have come between


def test_the_manual_lists_what_there_is(client: httpx.Client) -> None:
    """The table of the manual has each family of a scrape, with its kind and labels, and no other."""
    text = client.get("/metrics").text
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", generated.metrics(), re.MULTILINE)
    assert {(name, kind) for name, kind, _ in rows} == set(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    labels = {name.removesuffix("_total"): set(re.findall(r"`(\w+)`", given)) for name, _, given in rows}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == labels[family.name], sample


def test_text_of_any_kind_is_escaped() -> None:
    """A name with quotes, backslashes and line ends comes out of both formats as it went in."""
    metrics = Metrics()
    name = 'a"b\\c\nd'
    metrics.model(name, "1").answered("v1", 5, 0.001)
    for is_open, parse in (
        (False, text_string_to_metric_families),
        (True, openmetrics.text_string_to_metric_families),
    ):
        families = parse(metrics.render(openmetrics=is_open)[0].decode())
        rows = [s for family in families for s in family.samples if s.name == "serving_rows_total"]
        assert [(sample.labels["model"], sample.value) for sample in rows] == [(name, 5.0)]


def test_three_hundred_models_fit_a_scrape() -> None:
    """With 300 models a scrape is under 300 kB: as it is while they rest, and as gzip, when all have been asked."""
    metrics = Metrics()
    names = [f"model-number-{number}" for number in range(300)]
    for name in names:
        model = metrics.model(name, "1")
        model.ready(True)
        model.info(task="classification", sha256="ab" * 32, threads=1, load_seconds=0.1234)
        metrics.serving(name, 3)
    figures = [("seconds", 1.2345), ("load_seconds", 0.02345), ("row_seconds", 1.23456e-5), ("memory_bytes", 12345678)]
    metrics.status(
        asked=dict.fromkeys(names, (3, False)),
        folder_gone=False,
        passed=[(name, "1", True) for name in names],
        figures=[(name, "1", "this", what, value) for name in names for what, value in figures],
        errors=0,
    )
    assert len(metrics.render()[0]) < 300_000
    for name in names:
        model = metrics.model(name, "1")
        for number in range(20):
            model.answered("v1", 1, 0.0003 + number * 0.001)
            model.stages(0.0001 * number, 0.0002 * number)
            model.ran(number % 7 + 1, [0.0001 * number], 0.0001 * number)
    whole = metrics.render()[0]
    assert len(whole) < 2_600_000
    assert len(gzip.compress(whole, 1)) < 160_000


def test_the_names_of_triton(two_workers: Server, eventually: Callable[[Callable[[], bool]], None]) -> None:
    """Dashboards and autoscalers for Triton find their counts, whose sums are those of our own."""
    with httpx.Client(base_url=two_workers.url) as client:
        for _ in range(5):
            client.post("/v1/models/diabetes:predict", json={"instances": [[0.1] * 10] * 3})
        client.post("/v1/models/diabetes:predict", json={"instances": [["x"]]})
        eventually(
            lambda: of(parsed(client.get("/metrics").text), "nv_inference_request_success", model="diabetes") == 5
        )
        text = client.get("/metrics").text
    samples = parsed(text)
    mine = {"model": "diabetes", "version": "1"}
    assert of(samples, "nv_inference_request_failure", **mine, reason="OTHER") == 1
    assert of(samples, "nv_inference_count", **mine) == 15
    assert of(samples, "nv_inference_exec_count", **mine) == 5
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    whole = of(samples, "nv_inference_request_duration_us", **mine)
    assert sum(of(samples, f"nv_inference_{part}_duration_us", **mine) for part in parts) == pytest.approx(whole)
    assert of(samples, "nv_inference_pending_request_count", **mine) == 0


def test_processes_calls_and_settings_are_told(
    two_workers: Server, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """Each worker's process and their parent's, gRPC calls, what runs and how it is set are on any scrape."""
    import tritonclient.grpc

    address = re.search(r"gRPC: (\S+)", two_workers.output())
    assert address
    with tritonclient.grpc.InferenceServerClient(address[1]) as client:
        assert client.is_server_live()
        with pytest.raises(tritonclient.grpc.InferenceServerException):
            client.get_model_metadata("none")

    def scraped() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return parsed(httpx.get(f"{two_workers.url}/metrics").text)

    service = "inference.GRPCInferenceService"
    eventually(lambda: of(scraped(), "serving_grpc_calls_total", method=f"{service}/ModelMetadata") == 1)
    # Either worker may still start.
    eventually(lambda: all(of(scraped(), "process_open_fds", worker=worker) > 0 for worker in ("0", "1", "parent")))
    samples = scraped()
    assert of(samples, "serving_grpc_calls_total", method=f"{service}/ServerLive", code="OK") == 1
    assert of(samples, "serving_grpc_calls_total", method=f"{service}/ModelMetadata", code="NOT_FOUND") == 1
    for name in ("resident_memory_bytes", "open_fds", "start_time_seconds", "cpu_seconds_total"):
        for worker in ("0", "1", "parent"):
            assert of(samples, f"process_{name}", worker=worker) > 0, (name, worker)
    assert of(samples, "serving_setting", name="workers") == 2
    assert of(samples, "serving_setting", name="fast_path") == 1
    assert of(samples, "serving_build_info") == 1
    assert of(samples, "serving_model_threads", model="iris", version="2") == 2
    assert of(samples, "serving_model_load_seconds", model="iris") > 0
    assert of(samples, "serving_event_loop_lag_seconds_count") > 0


def test_no_setting_that_is_text_is_told(client: httpx.Client) -> None:
    """Keys, paths and addresses stay out of the metrics: of the settings only numbers and switches are there."""
    assert str(MODELS) not in client.get("/metrics").text
    assert {*COUNTERS, *HISTOGRAMS, *GAUGES} >= {"serving_setting"}
