"""The names of what is counted: help, labels, buckets, and how the workers' gauges are made one."""

from __future__ import annotations

from typing import TypeAlias

Labels: TypeAlias = tuple[str, ...]
Version: TypeAlias = tuple[str, str]
"""Name and version of a model."""
Key: TypeAlias = tuple[str, Labels]
Cell: TypeAlias = "memoryview[float]"
"""A counter: a view of one number."""
Exemplar: TypeAlias = tuple[str, float, float]
"""The id of a trace, the value that was observed of it, and when (Unix time)."""
Sizes: TypeAlias = dict[int, tuple[float, float]]
"""By rows of a batch: how many such batches ran, and their seconds in the model."""

SECONDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
STAGES = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.05, 0.25)
"""Fewer: what is read of a stage is its share of the whole."""
DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 10.0, 100.0)

Families: TypeAlias = dict[str, tuple[str, Labels]]
"""By name: help, and the names of the labels."""

_MODEL = ("model", "version")
COUNTERS: Families = {
    "serving_predictions": ("Predictions by how they ended.", (*_MODEL, "protocol", "outcome")),
    "serving_failed_prediction_seconds": ("Seconds from body to answer, of predictions that failed.", _MODEL),
    "serving_rows": ("Rows predicted.", _MODEL),
    "serving_bad_rows": ("Rows of streams that could not be predicted.", _MODEL),
    "serving_rejected": ("Predictions that were not run, by reason.", (*_MODEL, "reason")),
    "serving_cache_requests": ("Predictions looked up in a response cache: hit, joined or miss.", (*_MODEL, "outcome")),
    "serving_invalid_features": ("Bad cells by feature.", (*_MODEL, "feature")),
    "serving_worker_restarts": ("Workers that were replaced, by why.", ("reason",)),
    "serving_log_lines_dropped": ("Lines of the log that nobody read.", ()),
    "serving_shadow_requests": ("Live requests in a shadow's share, by what became of the copy.", (*_MODEL, "outcome")),
    "serving_shadow_rows": ("Rows whose labels a shadow and the live version gave.", _MODEL),
    "serving_shadow_agreeing_rows": ("Rows for which both gave the same label.", _MODEL),
    "serving_connections_cut": (
        "Connections, and streams of gRPC, that the server ended for what their client did, by reason.",
        ("reason",),
    ),
    "serving_drift_rows": ("Rows counted to be compared with the reference.", _MODEL),
    "serving_drift_windows": ("Windows of rows compared with the reference: quiet or drifted.", (*_MODEL, "outcome")),
    "serving_feedback_outcomes": ("True outcomes that were joined with a prediction.", _MODEL),
    "serving_feedback_right": ("Those whose label was the outcome; of a regressor the parts that were right.", _MODEL),
    "serving_feedback_unmatched": ("True outcomes whose prediction was never found.", ("model",)),
    "serving_feedback_dropped_rows": ("Rows predicted that were not kept for their outcomes.", _MODEL),
    "serving_capture_dropped": (
        "Requests to be captured that were not: behind (they came too fast), unwritable.",
        ("reason",),
    ),
    "serving_job_rows": ("Rows of jobs, by outcome: good or bad.", ("outcome",)),
    "serving_http_requests": ("HTTP requests by status class.", ("route", "method", "status")),
    "serving_grpc_calls": ("gRPC calls by status.", ("method", "code")),
    "serving_codec_busy_seconds": ("Seconds of the workers' codec processes, which read and write what is long.", ()),
    "process_cpu_seconds": ("Processor time of the worker in a slot, or of the `parent` of all.", ("worker",)),
}
HISTOGRAMS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...]]] = {
    "serving_batch_rows": ("Rows that ran together.", _MODEL, ROWS),
    "serving_queue_seconds": ("Seconds from accepted to running, each request.", _MODEL, SECONDS),
    "serving_inference_seconds": ("Seconds in the model, each batch.", _MODEL, SECONDS),
    "serving_decode_seconds": ("Seconds from body to queue, each answered prediction that ran.", _MODEL, STAGES),
    "serving_encode_seconds": ("Seconds from the end of its batch to the answer, each of these.", _MODEL, STAGES),
    "serving_prediction_seconds": ("Seconds from body to answer, each prediction.", _MODEL, SECONDS),
    "serving_shadow_seconds": ("Seconds in the shadow's model, each copy.", _MODEL, SECONDS),
    "serving_shadow_score_difference": (
        "Greatest difference of a row's scores between a shadow and the live version.",
        _MODEL,
        DIFFERENCES,
    ),
    "serving_http_request_seconds": ("Seconds from request to answer.", ("route", "method"), SECONDS),
    "serving_event_loop_lag_seconds": (
        "Seconds by which an event loop came late to a timer, ten times a second.",
        (),
        SECONDS,
    ),
}
SUMMED: Families = {
    "serving_queued_rows": ("Rows that wait, over all workers.", _MODEL),
    "serving_http_in_flight": ("HTTP requests in progress, over all workers.", ("route", "method")),
    "serving_shadow_agreement_ratio": ("Share of compared rows with the same label, 0 to 1.", _MODEL),
    "serving_model_threads": ("Batches that may run at a time, over all workers.", _MODEL),
    "serving_connections": ("Open connections, over all workers.", ("transport",)),
    "serving_grpc_in_flight": ("gRPC calls in progress, over all workers.", ()),
    "serving_codec_waiting": ("Long bodies and answers that wait for a codec process, over all workers.", ()),
    "serving_held_bytes": ("Bytes of long bodies, and of answers not yet taken, over all workers.", ()),
    "serving_worker_changes_pending": (
        "Changes of models that the worker in a slot was told and has not finished, as the parent sees it.",
        ("worker",),
    ),
    "serving_worker_lag_seconds": (
        "Seconds for which the worker in a slot has left unacknowledged what it was told to serve.",
        ("worker",),
    ),
    "process_start_time_seconds": ("Unix time at which the process started.", ("worker",)),
    "process_resident_memory_bytes": ("Resident memory of the process.", ("worker",)),
    "process_virtual_memory_bytes": ("Virtual memory of the process.", ("worker",)),
    "process_open_fds": ("Open file descriptors of the process.", ("worker",)),
    "process_max_fds": ("File descriptors that the process may open.", ("worker",)),
}
"""Gauges that are added up over workers."""
LEAST: Families = {
    "serving_model_ready": ("1 where every worker serves the version.", _MODEL),
    "serving_model_generation": ("Generation of the traffic state that every worker serves.", ("model",)),
    "serving_gate_passed": ("1 where the gate let a version pass, 0 where it was refused.", _MODEL),
    "serving_jobs_database_up": ("1 where every worker can ask the database of jobs.", ()),
    "serving_model_info": ("1; the labels describe the version.", (*_MODEL, "task", "sha256")),
    "serving_build_info": ("1; the labels say what runs.", ("version", "python", "onnxruntime")),
    "serving_setting": ("Value of a setting that is a number; 0 and 1 where it is a switch.", ("name",)),
}
"""Gauges of which the least of all workers' counts: what is true of every one of them."""
GREATEST: Families = {
    "serving_last_prediction_timestamp_seconds": ("Unix time of the last answered prediction.", _MODEL),
    "serving_model_quarantined": ("1 where a version is held back because it ended workers.", _MODEL),
    "serving_model_asked_generation": ("Generation of the traffic state that the folder asks for.", ("model",)),
    **{
        f"serving_gate_{what}": (f"{text}, of `this` version or the one that was `serving` then.", (*_MODEL, "of"))
        for what, text in (
            ("seconds", "Seconds that the gate took in all"),
            ("load_seconds", "Seconds that the gate took to load and warm it"),
            ("row_seconds", "Seconds of one row in the gate, the median"),
            ("memory_bytes", "Growth of the gate's process that loaded it"),
        )
    },
    "serving_coordinator_failures": ("Unforeseen failures in bringing the workers to what the folder asks for.", ()),
    "serving_model_refused": (
        "1 where the state that the folder asks for can't be served, or what was served has vanished.",
        ("model",),
    ),
    "serving_coordinator_silent_seconds": (
        "Seconds for which a worker has heard nothing of the coordinator, 0 below 10: it serves what it did.",
        (),
    ),
    "serving_models_folder_gone": ("1 while the models folder is gone, and what was loaded serves on.", ()),
    "serving_drift_alarm": ("1 where the last window's rows differ from the reference.", _MODEL),
    "serving_drift_window_timestamp_seconds": ("Unix time at which the last window ended.", _MODEL),
    "serving_drift_psi": (
        "Population stability index of a feature, or an output, in the last window.",
        (*_MODEL, "feature"),
    ),
    "serving_drift_jensen_shannon_distance": (
        "Jensen-Shannon distance of the last window from the reference, 0 to 1.",
        (*_MODEL, "feature"),
    ),
    "serving_drift_ratio": (
        "Share of the last window's values, 0 to 1, by kind: missing, unseen (a category) or out_of_range.",
        (*_MODEL, "feature", "kind"),
    ),
    "serving_feedback_window_outcomes": ("Outcomes from which the live quality is computed.", _MODEL),
    "serving_feedback_accuracy_ratio": ("Share of right labels among the last outcomes, 0 to 1.", _MODEL),
    "serving_feedback_auc": ("Area under the ROC curve for the last outcomes, 0 to 1.", _MODEL),
    "serving_feedback_brier": ("Brier score of the last outcomes; 0 is best.", _MODEL),
    "serving_feedback_mae": ("Mean absolute error of the last outcomes.", _MODEL),
    "serving_jobs": ("Jobs of the folder that are kept, by state.", ("state",)),
    "serving_jobs_oldest_seconds": (
        "Seconds since the oldest job that has not ended was asked for; 0 without one.",
        (),
    ),
    "serving_model_load_seconds": ("Seconds in which a worker loaded and warmed the version.", _MODEL),
}
"""Gauges of which the greatest counts: what one worker knows, or the one that is worst off."""
GAUGES = SUMMED | LEAST | GREATEST
VERSIONED = frozenset(
    name
    for table in (COUNTERS, HISTOGRAMS, GAUGES)
    for name, family in table.items()
    if family[1][:2] == _MODEL and not name.startswith("serving_gate_")
)
"""What is counted of each version; the gate's figures are not: each status of the coordinator holds all of them."""
