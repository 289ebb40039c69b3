"""What deploying shows in /metrics, and what it leaves in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2 as httpx

from serving.deploy.publish import publish
from tests.conftest import MODELS, running
from tests.drills.drill import Report
from tests.drills.swaps import swaps


def test_the_gate_s_figures_stand_beside_those_of_the_version_that_serves(
    tmp_path: Path, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """What a new version costs, and what the one that served cost in the same minute, can be read from /metrics."""
    shutil.copytree(MODELS / "iris" / "1", tmp_path / "iris" / "1")
    with running(models=tmp_path) as server:
        publish(tmp_path, "iris", MODELS / "iris" / "2" / "model.onnx", who="test")

        def shown() -> bool:
            text = httpx.get(f"{server.url}/metrics").text
            return all(
                f'serving_gate_{what}{{model="iris",of="{of}",version="2"}}' in text
                or f'serving_gate_{what}{{model="iris",version="2",of="{of}"}}' in text
                for what in ("load_seconds", "row_seconds", "memory_bytes")
                for of in ("this", "serving")
            )

        eventually(shown)
        assert "serving_coordinator_failures 0.0" in httpx.get(f"{server.url}/metrics").text


def test_the_memory_of_versions_that_went_comes_back() -> None:
    """Versions come and go, twenty of them, and no more stays of all than a third of one."""
    report = Report()
    swaps(report, times=20, warm=40, share=0.33)
    assert report.kept, report.broken()
