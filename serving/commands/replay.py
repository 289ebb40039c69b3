"""`serving replay`: what another version would have answered to requests that a server has captured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from serving.commands.status import AsJson
from serving.commands.traffic import Models, explained, up_to_date
from serving.linux.limits import cores
from serving.logs import visible


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("replay")(replay)


def replay(  # noqa: PLR0917  typer makes options of parameters
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What servers were told as --capture-dir.")],
    name: Annotated[str, typer.Option("--model", metavar="NAME", help="The model.", show_default=False)],
    version: Annotated[str, typer.Option(help="The version that is to score them.", show_default=False)],
    segment: Annotated[
        list[str] | None, typer.Option(help="Show it by a feature, `principal` or `version`; may be repeated.")
    ] = None,
    worst: Annotated[int, typer.Option(min=0, max=1000, help="Rows to show that differ most.")] = 5,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of rows that must get the same label, else exit status 1.")
    ] = None,
    max_difference: Annotated[
        float | None, typer.Option(min=0, help="Most that the p99 of differences of scores may be, else exit status 1.")
    ] = None,
    as_json: AsJson = False,
    models: Models = Path("models"),
) -> None:
    """Score captured requests again, by any version in the models folder, and show how its answers differ."""
    with explained(undone=2):  # 1 is said of a version that was compared, and is not as good
        from serving.capture import replay as again  # noqa: PLC0415  loads onnxruntime

        models, _ = up_to_date(models, None, name)
        found = again.replay(
            folder, models, name, version, segments=segment or (), worst=worst, threads=cores()
        ).report()
    found = {"model": name, "version": version} | found
    broken = found["broken"] = _broken(found, min_agreement, max_difference)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found)
    raise typer.Exit(1 if broken else 0)


def _broken(found: dict[str, Any], min_agreement: float | None, max_difference: float | None) -> list[str]:
    """Say which bounds are not kept; what can't be told keeps none."""
    said = []
    if min_agreement is not None and (found["agreement"] is None or found["agreement"] < min_agreement):
        said.append(f"agreement {_share(found['agreement'])} is below {_share(min_agreement)}")
    p99 = None if found["difference"] is None else found["difference"]["p99"]
    if max_difference is not None and (p99 is None or p99 > max_difference):
        said.append(f"the p99 of differences, {_number(p99)}, is above {_number(max_difference)}")
    if found["refused"] and not (min_agreement is None and max_difference is None):
        said.append(f"{found['refused']} rows are refused")
    return said


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    by = ", ".join(f"{rows} by version {version}" for version, rows in found["versions"].items())
    console.print(f"{found['model']}: version {found['version']} on {found['rows']} rows that were answered {by}")
    for feature, value in found["filled"].items():
        console.print(visible(f"{feature} was not captured: both versions were asked with {value}"), soft_wrap=True)
    for reason, count in found["reasons"].items():
        console.print(visible(f"refused {count} times: {reason}"), soft_wrap=True)
    _figures(console, "", [{"value": "all", **found}])
    for name, groups in found["segments"].items():
        _figures(console, name, groups)
    if found["shift"]:
        shift = ", ".join(f"{name} {value:+.4g}" for name, value in found["shift"].items())
        console.print(visible(f"mean score: {shift}"), soft_wrap=True)
    if found["worst"]:
        table = Table(title="rows that differ most", title_justify="left", box=box.SIMPLE)
        for head in ("request", "row", "given", "scored", "features"):
            table.add_column(head, overflow="fold")
        for row in found["worst"]:
            cells = (row["request_id"], str(row["row"]), *(_words(row[of]) for of in ("given", "scored", "features")))
            table.add_row(*map(visible, cells))
        console.print(table)
    for said in found["broken"]:
        console.print(said, style="bold red")


def _figures(console: Console, name: str, groups: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE)
    table.add_column(visible(name))
    for head in ("rows", "agreement", "difference: mean", "p50", "p99", "max"):
        table.add_column(head, justify="right")
    for group in groups:
        apart = group["difference"] or dict.fromkeys(("mean", "p50", "p99", "max"))
        figures = (_number(apart[of]) for of in ("mean", "p50", "p99", "max"))
        table.add_row(visible(group["value"]), str(group["rows"]), _share(group["agreement"]), *figures)
    console.print(table)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _words(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
