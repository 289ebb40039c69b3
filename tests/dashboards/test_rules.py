"""The rules for Prometheus: each alert fires when it should, none does while all is well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = files("serving.dashboards").joinpath("rules.yml").read_text()
ALERTS = {
    rule["alert"]: rule for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"] if "alert" in rule
}
V1 = 'model="iris",version="1"'
MINUTES = 480
ALL = f"x{MINUTES}"


def predictions(outcome: str, each: str) -> dict[str, str]:
    return {f'serving_predictions_total{{{V1},protocol="v1",outcome="{outcome}",instance="a"}}': each}


def latency(fast: int) -> dict[str, str]:
    """Of 10,000 predictions a minute so many take up to 0.25 s."""
    start = f'serving_prediction_seconds_%s{{{V1},instance="a"%s}}'
    return {
        start % ("bucket", ',le="0.25"'): f"0+{fast}{ALL}",
        start % ("bucket", ',le="+Inf"'): f"0+10000{ALL}",
        start % ("count", ""): f"0+10000{ALL}",
    }


def lag(fast: int) -> dict[str, str]:
    start = 'serving_event_loop_lag_seconds_bucket{instance="a",le="%s"}'
    return {start % "0.25": f"0+{fast}{ALL}", start % "0.5": f"0+600{ALL}", start % "+Inf": f"0+600{ALL}"}


def setting(name: str, value: int) -> dict[str, str]:
    return {f'serving_setting{{name="{name}",instance="a"}}': f"{value}{ALL}"}


def gauge(name: str, labels: str, value: str) -> dict[str, str]:
    return {f'{name}{{{labels}instance="a"}}': value}


WELL = {
    **gauge("up", 'job="serving",', f"1{ALL}"),
    **gauge("serving_model_refused", 'model="iris",', f"0{ALL}"),
    **gauge("serving_gate_passed", f"{V1},", f"1{ALL}"),
    **gauge("serving_model_asked_generation", 'model="iris",', "1x400 2x80"),
    **gauge("serving_model_generation", 'model="iris",', "1x402 2x78"),
    **predictions("ok", f"0+10000{ALL}"),
    **predictions("failed", "0+2x400 3000 3002+2x78"),  # for two minutes three of ten
    **predictions("invalid", f"0+9000{ALL}"),
    **predictions("rejected", f"0+9000{ALL}"),
    f'serving_rejected_total{{{V1},reason="rate_limited",instance="a"}}': f"0+9000{ALL}",
    **latency(9995),
    **lag(599),
    **setting("workers", 2),
    **setting("max_connections", 4000),
    **setting("max_held_bytes", 1000),
    **gauge("serving_connections", 'transport="http",', f"7000{ALL}"),
    **gauge("serving_held_bytes", "", f"1500{ALL}"),
    **gauge("process_open_fds", 'worker="0",', f"500{ALL}"),
    **gauge("process_max_fds", 'worker="0",', f"1000{ALL}"),
    **gauge("serving_inference_seconds_sum", f"{V1},", f"0+90{ALL}"),
    **gauge("serving_model_threads", f"{V1},", f"2{ALL}"),
    **gauge("serving_worker_restarts_total", 'reason="exit",', "0x470 1x10"),
    **gauge("serving_worker_lag_seconds", 'worker="0",', "0x479 9x1"),
    **gauge("serving_models_folder_gone", "", f"0{ALL}"),
    **gauge("serving_coordinator_silent_seconds", "", f"0{ALL}"),
    **gauge("serving_drift_alarm", f"{V1},", f"0{ALL}"),
    **gauge("serving_jobs_database_up", "", f"1{ALL}"),
}
IRIS = {"model": "iris"}
VERSION = {"model": "iris", "version": "1"}
TROUBLE: dict[str, tuple[dict[str, str], dict[str, dict[str, str]]]] = {
    "the server does not answer": (
        gauge("up", 'job="serving",', f"0{ALL}"),
        {"ServingDown": {"job": "serving", "instance": "a"}},
    ),
    "the folder asks for what can't be served": (
        gauge("serving_model_refused", 'model="iris",', f"1{ALL}"),
        {"ServingModelNotServed": {**IRIS, "instance": "a"}},
    ),
    "a version ended workers": (
        gauge("serving_model_quarantined", f"{V1},", f"1{ALL}"),
        {"ServingModelQuarantined": {**VERSION, "instance": "a"}},
    ),
    "the gate says no": (
        gauge("serving_gate_passed", f"{V1},", f"0{ALL}"),
        {"ServingGateFailed": {**VERSION, "instance": "a"}},
    ),
    "the generation that is served is old": (
        gauge("serving_model_generation", 'model="iris",', f"1{ALL}"),
        {"ServingBehind": {**IRIS, "instance": "a"}},
    ),
    "a worker hears nothing": (
        gauge("serving_worker_lag_seconds", 'worker="0",', f"9{ALL}"),
        {"ServingWorkerDeaf": {"worker": "0", "instance": "a"}},
    ),
    "nobody coordinates": (
        gauge("serving_coordinator_silent_seconds", "", f"30{ALL}"),
        {"ServingCoordinatorSilent": {"instance": "a"}},
    ),
    "the folder is gone": (
        gauge("serving_models_folder_gone", "", f"1{ALL}"),
        {"ServingFolderGone": {"instance": "a"}},
    ),
    "workers die": (
        gauge("serving_worker_restarts_total", 'reason="crash",', f"0+1{ALL}"),
        {"ServingCrashLoop": {"instance": "a"}},
    ),
    "jobs have no database": (
        gauge("serving_jobs_database_up", "", f"0{ALL}"),
        {"ServingJobsDatabaseDown": {"instance": "a"}},
    ),
    "rows drift": (gauge("serving_drift_alarm", f"{V1},", f"1{ALL}"), {"ServingDrift": VERSION}),
    "two of a hundred fail, for an hour": (
        predictions("failed", "0+2x420 1000+200x60"),
        {"ServingAvailabilityBurns": IRIS, "ServingAvailabilityBurnsSlowly": IRIS},
    ),
    "two of a thousand fail, all day": (
        predictions("failed", f"0+20{ALL}"),
        {"ServingAvailabilityBurnsSlowly": IRIS},
    ),
    "one of five is slow": (latency(8000), {"ServingLatencyBurns": IRIS, "ServingLatencyBurnsSlowly": IRIS}),
    "two of a hundred are slow": (latency(9800), {"ServingLatencyBurnsSlowly": IRIS}),
    "there is no room": (
        {f'serving_rejected_total{{{V1},reason="queue_full",instance="a"}}': f"0+9000{ALL}"},
        {"ServingOverloaded": IRIS, "ServingAvailabilityBurns": IRIS, "ServingAvailabilityBurnsSlowly": IRIS},
    ),
    "the model's threads never rest": (
        gauge("serving_inference_seconds_sum", f"{V1},", f"0+119{ALL}"),
        {"ServingModelSaturated": {**VERSION, "instance": "a"}},
    ),
    "the processor is short": (lag(500), {"ServingEventLoopLate": {"instance": "a"}}),
    "clients hold connections": (
        gauge("serving_connections", 'transport="http",', f"7900{ALL}"),
        {"ServingConnectionsFull": {"instance": "a"}},
    ),
    "bodies are held": (gauge("serving_held_bytes", "", f"1900{ALL}"), {"ServingBodiesHeld": {"instance": "a"}}),
    "files run out": (
        gauge("process_open_fds", 'worker="0",', f"950{ALL}"),
        {"ServingFilesRunOut": {"worker": "0", "instance": "a"}},
    ),
}


def expected(name: str, labels: dict[str, str]) -> dict[str, Any]:
    rule = ALERTS[name]
    summary = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], rule["annotations"]["summary"])
    return {"exp_labels": labels | rule["labels"], "exp_annotations": {"summary": summary}}


def test_each_alert_is_provoked() -> None:
    """There is no alert that nothing above makes fire."""
    assert {name for _, firing in TROUBLE.values() for name in firing} == set(ALERTS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed")
def test_each_alert_fires_in_its_trouble_and_in_no_other(tmp_path: Path) -> None:
    """Prometheus itself finds each alert firing on what it is meant for, over its whole windows, and none otherwise.

    Each trouble has a server and a model of its own, and one of them has none.
    """
    series: dict[str, str] = {}
    firing: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, (changed, alerts) in enumerate([({}, {}), *TROUBLE.values()]):
        mine = {"model": f"model{number}", "instance": f"server{number}"}
        for name, values in (WELL | changed).items():
            name = name.replace('model="iris"', f'model="{mine["model"]}"')  # noqa: PLW2901
            series[name.replace('instance="a"', f'instance="{mine["instance"]}"')] = values
        for alert, labels in alerts.items():
            firing[alert].append(expected(alert, {key: mine.get(key, value) for key, value in labels.items()}))
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{MINUTES}m", "alertname": alert, "exp_alerts": firing[alert]} for alert in ALERTS
        ],
    }
    (tmp_path / "rules.yml").write_text(RULES)
    (tmp_path / "test.yml").write_text(
        json.dumps({"rule_files": ["rules.yml"], "evaluation_interval": "5m", "tests": [case]})
    )
    for arguments in (["check", "rules", "rules.yml"], ["test", "rules", "test.yml"]):
        ended = subprocess.run(["promtool", *arguments], capture_output=True, check=False, cwd=tmp_path)
        assert ended.returncode == 0, (ended.stdout + ended.stderr).decode()
