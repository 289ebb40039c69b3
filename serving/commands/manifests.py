"""`serving manifests`: what Kubernetes needs to run this server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.commands.written import write
from serving.manifests.tree import tree

manifests = typer.Typer(help="Write manifests for Kubernetes.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add `serving manifests`."""
    app.add_typer(manifests, name="manifests")


@manifests.callback()
def _commands() -> None:
    """Write manifests for Kubernetes."""


@manifests.command("export")
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; files of these names are replaced.")
    ],
) -> None:
    """Write a kustomize base with components and overlays, a Helm chart, and a runtime for KServe."""
    write(folder, tree())
