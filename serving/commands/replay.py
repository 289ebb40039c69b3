"""`serving replay`: what another version would have answered to requests that a server has captured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.bulk.formats import check_installed
from serving.commands.options import AsJson, Models, up_to_date
from serving.commands.output import explained, show, tell
from serving.linux.limits import cores


def replay(  # noqa: PLR0917  typer makes options of parameters
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What servers were told as --capture-dir.")],
    name: Annotated[str, typer.Option("--model", metavar="NAME", help="The model.")],
    version: Annotated[str, typer.Option(help="The version that is to score them.")],
    segment: Annotated[
        list[str] | None, typer.Option(help="Show it by a feature, `principal` or `version`; may be repeated.")
    ] = None,
    worst: Annotated[int, typer.Option(min=0, max=1000, help="Rows to show that differ most.")] = 5,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of rows that must get the same label, else exit status 1.")
    ] = None,
    max_difference: Annotated[
        float | None, typer.Option(min=0, help="Most that scores may differ (p99), else exit status 1.")
    ] = None,
    as_json: AsJson = False,
    models: Models = Path("models"),
) -> None:
    """Score captured requests again, by any version in the models folder, and show how its answers differ."""
    with explained(undone=2):  # 1 is said of a version that was compared, and is not as good
        check_installed()
        from serving.capture import replay as again  # noqa: PLC0415  loads onnxruntime and pyarrow

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
    by = ", ".join(f"{rows} by version {version}" for version, rows in found["versions"].items())
    tell(f"{found['model']}: version {found['version']} on {found['rows']} rows that were answered {by}")
    for feature, value in found["filled"].items():
        tell(f"{feature} was not captured: both versions were asked with {value}")
    for reason, count in found["reasons"].items():
        tell(f"refused {count} times: {reason}")
    for name, groups in {"": [{"value": "all", **found}], **found["segments"]}.items():
        apart = ("mean", "p50", "p99", "max")
        heads = ("rows", "agreement", "difference: mean", *apart[1:])
        show((name, *heads), (_figures(group, apart) for group in groups), numbers=heads)
    if found["shift"]:
        tell(f"mean score: {', '.join(f'{name} {value:+.4g}' for name, value in found['shift'].items())}")
    if found["worst"]:
        columns = ("request", "row", "given", "scored", "features")
        show(columns, map(_worst, found["worst"]), title="rows that differ most")
    for said in found["broken"]:
        tell(said, style="bold red")


def _figures(group: dict[str, Any], apart: tuple[str, ...]) -> list[str]:
    difference = group["difference"] or {}
    figures = (_number(difference.get(of)) for of in apart)
    return [group["value"], str(group["rows"]), _share(group["agreement"]), *figures]


def _worst(row: dict[str, Any]) -> list[str]:
    return [row["request_id"], str(row["row"]), *(_words(row[of]) for of in ("given", "scored", "features"))]


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _words(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
