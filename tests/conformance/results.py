"""Results of several servers in one JSON file, and side by side as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.conformance.point import Result


def keep(path: Path, name: str, results: list[Result]) -> None:
    """Put the results of a server into the file, in place of those that it had of the same points."""
    whole = _read(path)
    asked = {(one.group, one.name) for one in results}
    before = [one for one in whole.get(name, []) if (one["group"], one["name"]) not in asked]
    whole[name] = [asdict(one) for one in results] + before
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")


def markdown(path: Path) -> str:
    """Write the servers of the file side by side: points kept of points asked by group, then where they differ."""
    whole = _read(path)
    servers = list(whole)
    verdicts = {name: {(one["group"], one["name"]): one for one in whole[name]} for name in servers}
    points = list(dict.fromkeys(key for name in servers for key in verdicts[name]))
    lines = [_row("points kept of points asked", *servers), _row(*["---"] * (len(servers) + 1))]
    for group in dict.fromkeys(group for group, _ in points):
        lines.append(_row(group, *(_share(whole[name], group) for name in servers)))
    lines.append(_row("all", *(_share(whole[name], None) for name in servers)))
    lines += ["", _row("where they differ", *servers), _row(*["---"] * (len(servers) + 1))]
    for key in points:
        found = [verdicts[name].get(key) for name in servers]
        if any(one and one["verdict"] == "no" for one in found):
            lines.append(_row(f"{key[0]}: {key[1]}", *(_cell(one) for one in found)))
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _share(results: list[dict[str, Any]], group: str | None) -> str:
    asked = [one["verdict"] for one in results if group in (None, one["group"]) and one["verdict"] != "not asked"]
    return f"{asked.count('yes')} of {len(asked)}" if asked else "-"


def _cell(one: dict[str, Any] | None) -> str:
    if one is None or one["verdict"] == "not asked":
        return "-"
    return "yes" if one["verdict"] == "yes" else f"no: {one['note'][:60]}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
