"""`serving status | history`: what is asked for, what is served, and who changed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.commands.options import AsJson, Models, Name, StateDir, up_to_date
from serving.commands.output import explained, show, tell
from serving.errors import ServingError
from serving.repository import model_settings
from serving.repository.model_settings import ModelSettings, in_words
from serving.repository.servers import Server, ServerMonitor
from serving.repository.traffic import Traffic, current
from serving.repository.traffic_store import TrafficStore

_COLUMNS = ("model", "gen.", "stable", "canary", "shadow", "labels", "versions", "served")


def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A model; all without it.")] = None,
    as_json: AsJson = False,
    models: Models = Path("models"),
    state_dir: StateDir = None,
) -> None:
    """Show who gets each model's traffic, how trials go, and whether every running server serves it."""
    with explained():
        models, state_dir = up_to_date(models, state_dir, name)
        live = ServerMonitor(models, state_dir).servers()
        found = [state(models, state_dir, n, live) for n in ([name] if name else TrafficStore(models).names())]
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "models": found,
                    "servers": [[s.host, s.pid] for s in live],
                    "unheard": [[s.host, s.pid, s.unheard] for s in live if s.unheard],
                },
                indent=1,
            )
        )
        return
    rows = [_row(one) for one in found]
    shown = [i for i in range(len(_COLUMNS)) if i < 3 or any(row[i] for row in rows)]
    show([_COLUMNS[i] for i in shown], ([row[i] for i in shown] for row in rows))
    for one in found:
        said = [
            *one["trials"],
            *(f"version {version}: requests run alone: {reason}" for version, reason in one["alone"].items()),
            *([f"settings: {in_words(one['settings'])}"] if one["settings"] else ()),
            *one["problems"],
        ]
        for line in said:
            tell(f"{one['name']}: {line}")
    for server in live:
        if server.unheard:
            tell(f"{server.host}, process {server.pid}: {server.unheard}")
    for line in _no_models(live, {"", *(one["name"] for one in found)}) if name is None else ():
        tell(line)
    if not live:
        tell("no server of this folder is known here: others have told theirs to another --state-dir")


def _no_models(live: list[Server], names: set[str]) -> list[str]:
    """Say what lies among the models and is none, by those names."""
    problems = ((n, why) for one in live for n, _, why in one.problems)
    return list(dict.fromkeys(f"{n}: {why}" for n, why in problems if n not in names))


def state(root: Path, state_dir: Path | None, name: str, live: list[Server]) -> dict[str, Any]:
    """Return what is asked for and what is served of one model. Raises ModelNotFound."""
    store = TrafficStore(root, state_dir)
    versions = store.versions(name)
    standings = [(server, server.models.get(name, {})) for server in live]
    problems = list(dict.fromkeys(str(s["error"]) for _, s in standings if s.get("error")))
    try:
        traffic: Traffic | None = store.read(name)
    except ServingError as error:
        traffic = None
        problems.insert(0, error.message)
    own = ModelSettings()
    try:
        own = model_settings.read(root / name)
        traffic = own.traffic(traffic, versions) if traffic is not None else None
    except ServingError as error:
        problems.append(error.message)
    for version, why in ((v, why) for one in live for n, v, why in one.problems if n == name):
        if not any(why in said or said in why for said in problems):
            problems.append(f"version {version}: {why}" if version else why)
    generations = [s.get("serving") for _, s in standings]
    return {
        "name": name,
        "traffic": traffic.document() if traffic is not None else None,
        "stable": _stable(traffic, versions, [s for _, s in standings]),
        "versions": versions,
        "servers": len(standings),
        "up_to_date": traffic is not None and all(g == traffic.generation for g in generations),
        "serving": generations,
        "trials": [
            f"{line} ({server.host}, process {server.pid})" if len(live) > 1 else str(line)
            for server, s in standings
            for line in s.get("trial", ())
        ],
        "alone": {version: reason for _, s in standings for version, reason in s.get("alone", {}).items()},
        "settings": own.shown(),
        "problems": problems,
    }


def _stable(traffic: Traffic | None, versions: list[str], standings: list[dict[str, Any]]) -> str | None:
    """Return who answers: where nobody is named, servers know which of the highest is whole."""
    if traffic is None or traffic.stable is not None:
        return traffic.stable if traffic is not None else None
    return next((str(s["stable"]) for s in standings if s.get("stable")), None) or current(traffic, versions)


def _row(one: dict[str, Any]) -> list[str]:
    traffic = one["traffic"] or {}
    canary, shadow = traffic.get("canary"), traffic.get("shadow")
    sticky = "".join(f", by {k} {v}" for k, v in canary.get("sticky", {}).items()) if canary else ""
    if not one["servers"]:
        served = ""
    elif one["up_to_date"]:
        served = f"by {one['servers']}"
    else:
        served = "not yet: " + ", ".join("nothing" if g is None else str(g) for g in one["serving"])
    return [
        one["name"],
        str(traffic.get("generation", "")),
        "unloaded" if traffic.get("unloaded") else str(one["stable"] or "none"),
        f"{canary['version']}: {canary['percent']:g} %{sticky}" if canary else "",
        f"{shadow['version']}: {shadow['percent']:g} %" if shadow else "",
        ", ".join(f"{k} {v}" for k, v in traffic.get("labels", {}).items()),
        ", ".join(one["versions"]),
        served,
    ]


def history(
    name: Name,
    limit: Annotated[int, typer.Option(min=1, help="The last so many changes.")] = 20,
    as_json: AsJson = False,
    models: Models = Path("models"),
    state_dir: StateDir = None,
) -> None:
    """Show who published a model's versions or changed its traffic, when, how and why; the last is the last line."""
    with explained():
        models, state_dir = up_to_date(models, state_dir, name)
        entries = TrafficStore(models, state_dir).events(name, limit)
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
        return
    rows = []
    for entry in entries:
        when = entry["when"][:19].replace("T", " ")
        rows.append((str(entry["generation"] or ""), when, entry["who"], entry["what"], entry["why"]))
    show(("generation", "when (UTC)", "who", "what", "why"), rows)
