"""The dashboards as files: Grafana's own schema takes them, they ask for what there is, and the command writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from serving.dashboards.boards import BOARDS
from serving.metrics.definitions import COUNTERS, GAUGES, HISTOGRAMS
from tests.commands.test_command import command
from tests.dashboards.test_rules import RULES

MADE = {board["uid"]: board for board in (make() for make in BOARDS)}


def lost(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Say where something of ours is not in theirs, which has the defaults too."""
    if isinstance(ours, dict):
        return [where for key in ours for where in lost(ours[key], theirs.get(key), f"{at}/{key}")]
    if isinstance(ours, list | tuple):
        return [where for i, one in enumerate(ours) for where in lost(one, theirs[i], f"{at}/{i}")]
    return [] if ours == theirs else [at]


@pytest.mark.parametrize("board", MADE.values(), ids=MADE)
def test_grafana_takes_it(board: dict[str, Any]) -> None:
    """Grafana's own types of a dashboard read it, and give back all that is in it; no panel lies on another."""
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert lost(board, read) == []
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_they_ask_for_metrics_that_there_are() -> None:
    """Every metric in a dashboard or a rule is one that the server exposes, or that a rule records."""
    exposed = {f"{name}_total" for name in COUNTERS} | set(GAUGES)
    exposed |= {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    asked = set(re.findall(r"\b(?:serving|process)_\w+", RULES + "".join(map(json.dumps, MADE.values()))))
    assert asked <= exposed, asked - exposed
    recorded = set(re.findall(r"record: (\S+)", RULES))
    assert set(re.findall(r"\bserving:\w+:\w+", json.dumps(MADE) + RULES)) == recorded


def test_the_command_writes_them(tmp_path: Path) -> None:
    """`serving dashboards export DIR` writes each dashboard, the rules and a configuration, again where they are."""
    for _ in range(2):
        done = command("dashboards", "export", str(tmp_path / "new"))
        assert done.returncode == 0, done.stderr
    written = {file.name: file.read_text() for file in (tmp_path / "new").iterdir()}
    assert set(written) == {*(f"{uid}.json" for uid in MADE), "rules.yml", "prometheus.yml", "compose.yml"}
    for uid, board in MADE.items():
        assert json.loads(written[f"{uid}.json"]) == json.loads(json.dumps(board))
    assert written["rules.yml"] == RULES
    (tmp_path / "file").touch()
    done = command("dashboards", "export", str(tmp_path / "file"))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert str(tmp_path / "file") in done.stderr
