"""`serving dashboards`: what Grafana and Prometheus need to show this server and to raise alarms."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from serving.commands.written import write
from serving.dashboards.boards import BOARDS
from serving.dashboards.grafana import document

dashboards = typer.Typer(
    help="Write dashboards for Grafana, and rules for Prometheus.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add `serving dashboards`."""
    app.add_typer(dashboards, name="dashboards")


@dashboards.callback()
def _commands() -> None:
    """Write dashboards for Grafana, and rules for Prometheus."""


@dashboards.command("export")
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; files of these names are replaced.")
    ],
) -> None:
    """Write the dashboards as JSON, the rules, how to scrape a server, and a compose file of all three."""
    made = {f"{board['uid']}.json": document(board) for board in (make() for make in BOARDS)}
    others = ("rules.yml", "prometheus.yml", "compose.yml")
    made |= {name: files("serving.dashboards").joinpath(name).read_text() for name in others}
    write(folder, made)
