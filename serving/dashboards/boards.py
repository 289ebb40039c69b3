"""The dashboards: of all models, of one, of a deployment, of drift and live quality, and of what there is room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serving.dashboards.grafana import Panel, Variable, dashboard
from serving.dashboards.panels import (
    WINDOW,
    gauge,
    legend,
    mean_of,
    now,
    plot,
    quantile_of,
    quantiles,
    rate,
    rate_of,
    ratio_of,
    shares,
    top,
    total,
)

_MODEL = Variable("model", "serving_model_ready")
_VERSION = Variable("version", 'serving_model_ready{model="$model"}', many=True)
_INSTANCE = Variable("instance", "serving_build_info", many=True)
_NAME = 'model="$model"'
ONE = f'{_NAME},version=~"$version"'
HERE = 'instance=~"$instance"'
SHARE = "percentunit"


def overview() -> dict[str, Any]:
    """What all models do, and whether something is wrong."""
    numbers = (
        now("Servers that answer", 'sum(up{job="serving"})'),
        now("Versions that serve", f"count(count by (model, version) (serving_model_ready{{{HERE}}} == 1))"),
        now("Models not as asked", f"sum(serving_model_refused{{{HERE}}})"),
        now("Versions in quarantine", f"sum(serving_model_quarantined{{{HERE}}}) or vector(0)"),
        now("Workers replaced in 1 h", f"sum(increase(serving_worker_restarts_total{{{HERE}}}[1h])) or vector(0)"),
        now("Versions that drift", f"sum(max by (model, version) (serving_drift_alarm{{{HERE}}})) or vector(0)"),
    )
    burn = (
        ("serving:prediction_errors:ratio_rate1h / 0.001", "{{model}} errors"),
        ("serving:prediction_slow:ratio_rate1h / 0.01", "{{model}} slow"),
    )
    in_flight = (
        (f"sum(serving_http_in_flight{{{HERE}}})", "HTTP"),
        (f"sum(serving_grpc_in_flight{{{HERE}}}) or vector(0)", "gRPC"),
    )
    invalid = rate_of("serving_invalid_features_total", "model, feature", HERE)
    predictions = (
        rate("Predictions, by model", "serving_predictions_total", "model", HERE),
        rate("Predictions, by how they ended", "serving_predictions_total", "outcome", HERE),
        rate("Rows", "serving_rows_total", "model", HERE, "rowsps"),
        plot("Share that failed", "serving:prediction_errors:ratio_rate5m", "model", SHARE),
        quantiles("Seconds from body to answer", "serving_prediction_seconds", "model", HERE, 0.5, 0.99),
        Panel("Error budget, as multiples of what may be spent", burn),
        rate("Rejected, by reason", "serving_rejected_total", "reason", HERE),
        plot("Bad cells, by feature", f"topk(10, {invalid})", "model, feature"),
        rate("Workers replaced, by reason", "serving_worker_restarts_total", "reason", HERE, "cps"),
    )
    requests = (
        rate("HTTP, by status", "serving_http_requests_total", "status", HERE),
        quantiles("HTTP, seconds from request to answer", "serving_http_request_seconds", "route", HERE, 0.99),
        rate("gRPC, by status", "serving_grpc_calls_total", "code", HERE),
        Panel("In flight", in_flight),
        rate("Connections cut, by reason", "serving_connections_cut_total", "reason", HERE, "cps"),
    )
    rows = (("Now", numbers), ("Predictions", predictions), ("Requests", requests))
    return dashboard("serving-overview", "Serving: overview", (_INSTANCE,), rows)


def model() -> dict[str, Any]:
    """One model, as its owner sees it."""
    stages = tuple(
        (mean_of(f"serving_{stage}_seconds", "version", ONE), legend("version", text))
        for stage, text in (
            ("decode", "decode"),
            ("queue", "queue"),
            ("inference", "inference, its batch"),
            ("encode", "encode"),
        )
    )
    failed = (
        (f"serving:prediction_errors:ratio_rate5m{{{_NAME}}}", "failed"),
        (f"serving:prediction_slow:ratio_rate5m{{{_NAME}}}", "slower than 250 ms"),
    )
    size = (
        (mean_of("serving_batch_rows", "version", ONE), legend("version", "mean")),
        (quantile_of(0.99, "serving_batch_rows", "version", ONE), legend("version", "p99")),
    )
    threads = f"sum by (version) (serving_model_threads{{{ONE}}} > 0)"
    busy = f"{rate_of('serving_inference_seconds_sum', 'version', ONE)} / {threads}"
    predictions = (
        rate("By how they ended", "serving_predictions_total", "version, outcome", ONE),
        rate("By protocol", "serving_predictions_total", "protocol", ONE),
        rate("Rows", "serving_rows_total", "version", ONE, "rowsps"),
        quantiles("Seconds from body to answer", "serving_prediction_seconds", "version", ONE, 0.5, 0.95, 0.99),
        Panel("Where the time goes, means", stages, "s", stacked=True),
        Panel("Share that failed", failed, SHARE),
    )
    batches = (
        Panel("Rows of a batch", size),
        quantiles("Seconds of a batch", "serving_inference_seconds", "version", ONE, 0.5, 0.99),
        quantiles("Seconds in the queue", "serving_queue_seconds", "version", ONE, 0.5, 0.99),
        total("Rows that wait", "serving_queued_rows", "version", ONE),
        plot("Its threads are busy", busy, "version", SHARE),
        rate("Response cache", "serving_cache_requests_total", "version, outcome", ONE),
    )
    invalid = rate_of("serving_invalid_features_total", "feature", ONE)
    refused = (
        plot("Bad cells, by feature", f"topk(10, {invalid})", "feature"),
        rate("Rejected, by reason", "serving_rejected_total", "reason", ONE),
    )
    rows = (("Predictions", predictions), ("Batches", batches), ("What is refused", refused))
    return dashboard("serving-model", "Serving: one model", (_MODEL, _VERSION), rows)


def deployment() -> dict[str, Any]:
    """The versions of a model beside each other, while one of them is tried."""
    asked = rate_of("serving_predictions_total", "version", ONE)
    failed = rate_of("serving_predictions_total", "version", f'{ONE},outcome=~"failed|expired"')
    generation = (
        (f"max(serving_model_asked_generation{{{_NAME}}})", "asked"),
        (f"min(serving_model_generation{{{_NAME}}})", "served"),
    )
    share = f"{asked} / scalar(sum(rate(serving_predictions_total{{{_NAME}}}{WINDOW})))"
    seconds = (
        (f"max by (version) (serving_gate_seconds{{{ONE}}})", "{{version}} gate"),
        (f"max by (version) (serving_model_load_seconds{{{ONE}}})", "{{version}} load"),
    )
    row_seconds = ratio_of("serving_inference_seconds_sum", "serving_batch_rows_sum", "version", ONE)
    state = (
        Panel("Generation", generation),
        plot("Every worker serves it", f"min by (version) (serving_model_ready{{{ONE}}})", "version"),
        plot("Share of requests", share, "version", SHARE),
    )
    live = (
        plot("Share that failed", f"({failed} or 0 * {asked}) / ({asked} > 0)", "version", SHARE),
        quantiles("Seconds from body to answer", "serving_prediction_seconds", "version", ONE, 0.5, 0.99),
        plot("Seconds of a row in the model", row_seconds, "version", "s"),
        *_quality(),
    )
    shadow = (
        rate("Copies, by what became of them", "serving_shadow_requests_total", "version, outcome", ONE),
        gauge("Rows with the same label", "serving_shadow_agreement_ratio", "version", ONE, SHARE),
        quantiles("Difference of scores", "serving_shadow_score_difference", "version", ONE, 0.5, 0.99, unit="short"),
    )
    gate = (
        gauge("Passed", "serving_gate_passed", "version", ONE),
        gauge("Seconds of a row", "serving_gate_row_seconds", "version, of", ONE, "s"),
        gauge("Memory", "serving_gate_memory_bytes", "version, of", ONE, "bytes"),
        Panel("Seconds of the gate, and to load", seconds, "s"),
    )
    rows = (("Where it stands", state), ("Live, by version", live), ("Shadow", shadow), ("Gate", gate))
    return dashboard("serving-deployment", "Serving: deployment", (_MODEL, _VERSION), rows)


def drift() -> dict[str, Any]:
    """Whether what is asked still looks like what the model was trained on, and whether its answers come true."""
    of = "version, feature"
    unmatched = rate_of("serving_feedback_unmatched_total", "model", _NAME)
    distance = "serving_drift_jensen_shannon_distance"
    alarm = (
        gauge("Alarm", "serving_drift_alarm", "version", ONE),
        rate("Windows compared", "serving_drift_windows_total", "version, outcome", ONE, "cps"),
        rate("Rows compared", "serving_drift_rows_total", "version", ONE, "rowsps"),
    )
    features = (
        top("Population stability index (0.1 little, 0.25 much)", "serving_drift_psi", of, ONE),
        top("Jensen-Shannon distance", distance, of, ONE),
        shares("Missing", "serving_drift_ratio", of, f'{ONE},kind="missing"'),
        shares("Unseen categories", "serving_drift_ratio", of, f'{ONE},kind="unseen"'),
        shares("Out of range", "serving_drift_ratio", of, f'{ONE},kind="out_of_range"'),
    )
    quality = (
        *_quality(),
        gauge("Area under the ROC curve", "serving_feedback_auc", "version", ONE),
        rate("Outcomes joined", "serving_feedback_outcomes_total", "version", ONE, "cps"),
        plot("Outcomes without a prediction", f"{unmatched} or vector(0)", "model", "cps"),
    )
    rows = (("Alarm", alarm), ("The last window against the reference", features), ("Live quality", quality))
    return dashboard("serving-drift", "Serving: drift and live quality", (_MODEL, _VERSION), rows)


def _quality() -> tuple[Panel, ...]:
    return (
        gauge("Right labels among the last outcomes", "serving_feedback_accuracy_ratio", "version", ONE, SHARE),
        gauge("Brier score of the last outcomes", "serving_feedback_brier", "version", ONE),
        gauge("Mean absolute error of the last outcomes", "serving_feedback_mae", "version", ONE),
    )


def capacity() -> dict[str, Any]:
    """What is used up first."""
    of, at, workers = "model, version", "instance, worker", 'max by (instance) (serving_setting{name="workers"})'
    speed = ratio_of("serving_batch_rows_sum", "serving_inference_seconds_sum", of, HERE)
    files = f"max by ({at}) (process_open_fds{{{HERE}}} / process_max_fds)"
    uptime = f"time() - max by ({at}) (process_start_time_seconds{{{HERE}}})"
    behind = (
        (f"max by ({at}) (serving_worker_lag_seconds{{{HERE}}})", legend(at, "seconds")),
        (f"max by ({at}) (serving_worker_changes_pending{{{HERE}}})", legend(at, "changes")),
    )
    codecs = f"{rate_of('serving_codec_busy_seconds_total', 'instance', HERE)} / on (instance) {workers}"

    def used(metric: str, setting: str) -> str:
        """Make the share of what all workers of an instance may have, by a setting that is each one's."""
        most = f'max by (instance) (serving_setting{{name="{setting}"}}) * on (instance) {workers}'
        return f"sum by (instance) ({metric}{{{HERE}}}) / on (instance) ({most})"

    full = f'{HERE},reason="queue_full"'
    models = (
        plot("Threads are busy", "serving:model_threads:busy_ratio_rate5m", f"instance, {of}", SHARE),
        plot("Rows that a busy thread does in a second", speed, of, "rowsps"),
        total("Rows that wait", "serving_queued_rows", of, HERE),
        rate("Rejected for want of room", "serving_rejected_total", "model", full),
        gauge("Memory, as the gate measured", "serving_gate_memory_bytes", of, f'{HERE},of="this"', "bytes"),
        gauge("Seconds to load", "serving_model_load_seconds", of, HERE, "s"),
    )
    processes = (
        rate("Processor", "process_cpu_seconds_total", at, HERE, SHARE),
        gauge("Resident memory", "process_resident_memory_bytes", at, HERE, "bytes"),
        quantiles("Event loops late", "serving_event_loop_lag_seconds", "instance", HERE, 0.5, 0.99),
        plot("Open files", files, at, SHARE),
        plot("Uptime", uptime, at, "s"),
        Panel("Behind the coordinator", behind),
    )
    clients = (
        total("Connections", "serving_connections", "instance, transport", HERE),
        plot(
            "Connections, of those that there may be", used("serving_connections", "max_connections"), "instance", SHARE
        ),
        plot("Bytes held, of those that may be", used("serving_held_bytes", "max_held_bytes"), "instance", SHARE),
        plot("Codec processes are busy", codecs, "instance", SHARE),
        total("Long bodies that wait", "serving_codec_waiting", "instance", HERE),
        rate("Lines of the log dropped", "serving_log_lines_dropped_total", "instance", HERE, "cps"),
    )
    jobs = (
        gauge("Jobs, by state", "serving_jobs", "state", HERE),
        gauge("The oldest that waits", "serving_jobs_oldest_seconds", "instance", HERE, "s"),
        rate("Rows of jobs", "serving_job_rows_total", "outcome", HERE, "rowsps"),
    )
    rows = (("Models", models), ("Processes", processes), ("Connections and bodies", clients), ("Jobs", jobs))
    return dashboard("serving-capacity", "Serving: capacity", (_INSTANCE,), rows)


BOARDS: tuple[Callable[[], dict[str, Any]], ...] = (overview, model, deployment, drift, capacity)
