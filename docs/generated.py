"""Fills what the code and the results know best into the manual's pages when mkdocs builds them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_type_hints

from pydantic_core import PydanticUndefined

from benchmarks.peers.report import RESULTS, comparison
from serving.documented import descriptions
from serving.metrics.definitions import COUNTERS, GAUGES, HISTOGRAMS
from serving.repository.model_settings import SettingsDocument
from serving.settings import Settings


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each `{{ name }}` by its table. Raises KeyError for a name that there is not, which ends the build."""
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: TABLES[found[1]](), markdown)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def settings() -> str:
    """List every option: its flag, environment variable, default and meaning."""
    hints = get_type_hints(Settings)
    rows, told = [], descriptions(Settings)
    for name, field in Settings.model_fields.items():
        flag = f"`--{name.replace('_', '-')}`" + (f" / `--no-{name.replace('_', '-')}`" if hints[name] is bool else "")
        none = field.default in (None, (), PydanticUndefined)
        rows.append([flag, f"`SERVING_{name.upper()}`", "" if none else f"`{field.default}`", told.get(name, "")])
    return _table(("flag", "environment", "default", "meaning"), rows)


def model_settings() -> str:
    """List what model.toml may hold: each key with its table, and its meaning."""
    rows = []
    for table, tables in SettingsDocument.model_fields.items():
        for kind in (
            kind for kind in (tables.annotation, *get_args(tables.annotation)) if hasattr(kind, "model_fields")
        ):
            told = descriptions(kind)
            rows += [[f"`{table}.{name}`", told.get(name, "")] for name in kind.model_fields]
    return _table(("key", "meaning"), rows)


def metrics() -> str:
    """List every family of `/metrics`: its name as it is scraped, kind, labels and help."""
    rows = [[f"`{name}_total`", "counter", _labels(labels), text] for name, (text, labels) in COUNTERS.items()]
    rows += [[f"`{name}`", "histogram", _labels(labels), text] for name, (text, labels, _) in HISTOGRAMS.items()]
    rows += [[f"`{name}`", "gauge", _labels(labels), text] for name, (text, labels) in GAUGES.items()]
    return _table(("metric", "kind", "labels", "meaning"), rows)


def _labels(labels: tuple[str, ...]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def peers() -> str:
    """Show what `make peers` found the last time, and how each server was set."""
    facts = json.loads(RESULTS.joinpath("peers.json").read_text())
    machine = f"{facts['machine']} (load before: {facts['load']:.1f}), Python {facts['python']}"
    said = f"`{facts['command']}`, {facts['date']}, {machine}:"
    rows = []
    for name, about in facts["about"].items():
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        rows.append([name, versions, f"[{about['setting']}]({about['page']})" if about["page"] else about["setting"]])
    return "\n\n".join([said, _table(*comparison(facts)), _table(("", "versions", "set as its page advises"), rows)])


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "model_settings": model_settings,
    "metrics": metrics,
    "peers": peers,
}
