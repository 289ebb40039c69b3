"""The chart in Helm itself, which the test suite does without."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.conformance.environments import environment
from tests.drills.drill import Report, drill
from tests.manifests.chart import TREE, objects, rendered

SCRIPT = """
import helm_python as helm, json, sys
chart, given, release, namespace = sys.argv[1:]
found = helm.lint(chart)
with helm.Chart.load(chart) as loaded:
    made = loaded.render(json.loads(given), name=release, namespace=namespace)
print(json.dumps({"lint": found, "made": made}))
"""
GIVEN: list[dict[str, Any]] = [
    {},
    {"autoscaling": "keda", "monitoring": True, "networkPolicy": True, "queuedRows": 100},
    {"autoscaling": "prometheus-adapter", "volumes": [{"name": "state", "emptyDir": {}}], "args": ["run"]},
    {
        "pod": {"serviceAccountName": "ml", "tolerations": [{"operator": "Exists"}]},
        "env": [{"name": "A", "value": "1"}],
    },
]


@drill("helm-chart", "Helm lints the chart, and makes of it what the test suite holds equal to kustomize's base")
def helm_chart(report: Report) -> None:
    """Render it with several values, by Helm's own library."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in TREE.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(text)
        same = 0
        for given in GIVEN:
            command = [environment("helm") / "bin" / "python", "-c", SCRIPT, f"{folder}/chart", json.dumps(given)]
            done = subprocess.run([*command, "other", "elsewhere"], capture_output=True, text=True, check=True)
            told = json.loads(done.stdout)
            made = [one for text in told["made"].values() for one in objects("made.yaml", text)]
            due = rendered(given, "other", "elsewhere")
            same += sorted(made, key=yaml.safe_dump) == sorted(due, key=yaml.safe_dump)
            errors = [said["error"] for said in told["lint"]["messages"] if said["severity"] > 1] + told["lint"][
                "errors"
            ]
            report.exactly(f"warnings and errors of lint{''.join(f'; {error}' for error in errors)}", len(errors), 0)
        report.exactly("sets of values of which both make the same", same, len(GIVEN))
    broken = rendered({"replicas": 3}, "other", "elsewhere")
    report.control("other values make other objects", broken != rendered({}, "other", "elsewhere"))
