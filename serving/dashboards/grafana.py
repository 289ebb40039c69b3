"""Dashboards as Grafana imports them, from what they show: panels in rows, each with its queries.

Source: Grafana's dashboard JSON model, schema version 36 (Grafana 10; later ones migrate it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24


@dataclass(frozen=True, slots=True)
class Panel:
    """queries: what is shown, each in PromQL with its legend. unit: as Grafana names it. kind: `timeseries` or `stat`.

    stacked: the queries are parts of a whole.
    """

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label. many: several of them, at first all."""

    label: str
    metric: str
    many: bool = False


Rows: TypeAlias = tuple[tuple[str, tuple[Panel, ...]], ...]


def dashboard(uid: str, title: str, variables: Iterable[Variable], rows: Rows) -> dict[str, Any]:
    """Make a dashboard; `rows` are titles with their panels, of one kind, three to a line, or six of single numbers."""
    return {
        "uid": uid,
        "title": title,
        "tags": ["serving"],
        "schemaVersion": 36,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), *map(_variable, variables)]},
        "panels": list(_laid_out(rows)),
    }


def document(made: dict[str, Any]) -> str:
    """Write a dashboard as a file that Grafana imports."""
    return json.dumps(made, indent=2) + "\n"


def _laid_out(rows: Rows) -> Iterator[dict[str, Any]]:
    number, y = 0, 0
    for title, panels in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": y},
            "panels": [],
        }
        y += 1
        most, height = (6, 4) if panels[0].kind == "stat" else (3, 8)
        columns = math.ceil(len(panels) / math.ceil(len(panels) / most))  # so that no panel stands alone
        for at, panel in enumerate(panels):
            number += 1
            width = _COLUMNS // min(columns, len(panels) - at // columns * columns)
            place = {"h": height, "w": width, "x": at % columns * width, "y": y + at // columns * height}
            yield _panel(number, panel) | {"gridPos": place}
        y += math.ceil(len(panels) / columns) * height


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    options: dict[str, Any] = {"tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    else:
        defaults["custom"] = {"fillOpacity": 20 if panel.stacked else 0, "showPoints": "never"}
        if panel.stacked:
            defaults["custom"]["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + at), "expr": expr, "legendFormat": legend, "datasource": _SOURCE}
            for at, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source", "current": {}}


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.metric}, {variable.label})"
    made: dict[str, Any] = {
        "name": variable.label,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": variable.label},
        "refresh": 2,
        "sort": 3,
        "multi": variable.many,
        "includeAll": variable.many,
    }
    if variable.many:
        made["allValue"] = ".*"
        made["current"] = {"text": ["All"], "value": ["$__all"]}
    return made
