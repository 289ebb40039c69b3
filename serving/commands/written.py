"""Files that commands write for others: all into one folder, and said line by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from serving.commands.output import explained


def writer(name: str, what: str, wrote: str, files: Callable[[], dict[str, str]]) -> typer.Typer:
    """Make the commands `serving <name>`, of which `export` writes texts by their paths below a folder.

    what, wrote: help of all the commands, and of this one.
    """
    # The callback, which does nothing, keeps a group of one command from becoming that command.
    group = typer.Typer(name=name, help=what, callback=lambda: None, no_args_is_help=True, rich_markup_mode=None)

    @group.command("export", help=wrote)
    def export(
        folder: Annotated[
            Path, typer.Argument(metavar="DIR", help="Folder to write to; files of these names are replaced.")
        ],
    ) -> None:
        with explained():
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in files().items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
                typer.echo(str(folder / path))

    return group
