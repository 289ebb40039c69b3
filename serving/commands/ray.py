"""`serving ray`: what deploys this server on a Ray cluster, and what tells a load balancer where its servers are."""

from __future__ import annotations

import logging
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from serving.scale import upstreams

ray = typer.Typer(help="Deploy on a Ray cluster.", no_args_is_help=True, rich_markup_mode=None)

FILES = ("serve.yaml", "servers.yaml", "rayservice.yaml", "rayservice-servers.yaml", "nginx.conf")


def register(app: typer.Typer) -> None:
    """Add `serving ray`."""
    app.add_typer(ray, name="ray")


@ray.callback()
def _commands() -> None:
    """Deploy on a Ray cluster."""


@ray.command("export")
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; files of these names are replaced.")
    ],
) -> None:
    """Write the files for `serve deploy`, for KubeRay and for nginx."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (folder / name).write_text(files("serving.scale").joinpath(name).read_text())
            typer.echo(str(folder / name))
    except OSError as error:
        Console(stderr=True, highlight=False).print(f"serving: {folder}: {error.strerror}", soft_wrap=True)
        raise typer.Exit(1) from None


@ray.command("upstreams")
def follow(
    out: Annotated[Path, typer.Option("--out", "-o", help="nginx includes this file; it is replaced.")],
    url: Annotated[
        list[str] | None,
        typer.Option(help="A proxy of Ray's [default: http://127.0.0.1:8000]; of several, the first that answers."),
    ] = None,
    reload: Annotated[str, typer.Option(help="Command to run each time that the file changes.")] = "nginx -s reload",
) -> None:
    """Keep nginx's list of servers as Ray has it, until it is ended."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    upstreams.follow(url or ["http://127.0.0.1:8000"], out, shlex.split(reload))
