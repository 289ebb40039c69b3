"""The example alerts of the manual: each fires when it should, none does while all is well."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serving.metrics.definitions import COUNTERS, GAUGES, HISTOGRAMS
from tests.conftest import ROOT

RULES = re.search(r"```yaml\n(groups:.*?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL)
V1 = 'model="iris",version="1"'
OK = {f'serving_predictions_total{{{V1},protocol="v1",outcome="ok"}}': "0+1000x30"}
QUIET = {
    'up{job="serving",instance="a"}': "1x30",
    'serving_model_refused{model="iris",instance="a"}': "0x30",
    f'serving_model_quarantined{{{V1},instance="a"}}': "0x30",
    'serving_model_asked_generation{model="iris",instance="a"}': "1x10 2x20",
    'serving_model_generation{model="iris",instance="a"}': "1x11 2x19",
    **OK,
    f'serving_predictions_total{{{V1},protocol="v1",outcome="failed"}}': "0+5x30",
    f'serving_predictions_total{{{V1},protocol="v1",outcome="rejected"}}': "0+20x30",
    f'serving_prediction_seconds_bucket{{{V1},le="0.1"}}': "0+1000x30",
    f'serving_prediction_seconds_bucket{{{V1},le="+Inf"}}': "0+1000x30",
    'serving_worker_restarts_total{reason="exit",instance="a"}': "0x10 1x20",
    'serving_worker_lag_seconds{worker="0",instance="a"}': "0x10 2x20",
    'serving_models_folder_gone{instance="a"}': "0x30",
}
TROUBLE: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "ServingDown": ({'up{job="serving",instance="a"}': "0x30"}, {"job": "serving", "instance": "a"}),
    "ServingModelNotServed": (
        {'serving_model_refused{model="iris",instance="a"}': "1x30"},
        {"model": "iris", "instance": "a"},
    ),
    "ServingModelQuarantined": (
        {f'serving_model_quarantined{{{V1},instance="a"}}': "1x30"},
        {"model": "iris", "version": "1", "instance": "a"},
    ),
    "ServingBehind": (
        {
            'serving_model_asked_generation{model="iris",instance="a"}': "2x30",
            'serving_model_generation{model="iris",instance="a"}': "1x30",
        },
        {"model": "iris", "instance": "a"},
    ),
    "ServingWorkerDeaf": (
        {'serving_worker_lag_seconds{worker="0",instance="a"}': "9x30"},
        {"worker": "0", "instance": "a"},
    ),
    "ServingFolderGone": ({'serving_models_folder_gone{instance="a"}': "1x30"}, {"instance": "a"}),
    "ServingErrors": (
        {**OK, f'serving_predictions_total{{{V1},protocol="v2",outcome="failed"}}': "0+50x30"},
        {"model": "iris", "version": "1"},
    ),
    "ServingOverloaded": (
        {**OK, f'serving_predictions_total{{{V1},protocol="grpc",outcome="rejected"}}': "0+100x30"},
        {"model": "iris"},
    ),
    "ServingSlow": (
        {
            f'serving_prediction_seconds_bucket{{{V1},le="0.25"}}': "0+900x30",
            f'serving_prediction_seconds_bucket{{{V1},le="0.5"}}': "0+1000x30",
            f'serving_prediction_seconds_bucket{{{V1},le="+Inf"}}': "0+1000x30",
        },
        {"model": "iris"},
    ),
    "ServingWorkersDie": (
        {'serving_worker_restarts_total{reason="signal",instance="a"}': "0+1x30"},
        {"instance": "a"},
    ),
}


def rules() -> str:
    assert RULES is not None
    return RULES[1]


def test_the_rules_ask_for_metrics_that_there_are() -> None:
    """Every metric in the manual's alerts is one that the server exposes."""
    exposed = {f"{name}_total" for name in COUNTERS} | {f"{name}_bucket" for name in HISTOGRAMS} | set(GAUGES)
    asked = set(re.findall(r"serving_\w+", rules()))
    assert asked
    assert asked <= exposed


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Debian's prometheus is not installed")
def test_each_alert_fires_in_its_trouble_and_in_no_other(tmp_path: Path) -> None:
    """Prometheus itself finds each alert firing on what it is meant for, and none on a server that is well."""
    names = re.findall(r"alert: (\w+)", rules())
    assert set(names) == set(TROUBLE)

    def case(series: dict[str, str], firing: dict[str, dict[str, str]]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [
                {"eval_time": "25m", "alertname": name}
                | ({"exp_alerts": [{"exp_labels": firing[name]}]} if name in firing else {})
                for name in names
            ],
        }

    (tmp_path / "rules.yml").write_text(rules())
    cases = [case(QUIET, {}), *(case(series, {name: labels}) for name, (series, labels) in TROUBLE.items())]
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": ["rules.yml"], "tests": cases}))
    ended = subprocess.run(["promtool", "test", "rules", str(tmp_path / "test.yml")], capture_output=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
