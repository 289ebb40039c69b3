"""Files that commands write for others: all into one folder, and said line by line."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console


def write(folder: Path, files: dict[str, str]) -> None:
    """Write texts by their paths below a folder, replacing files of these names, and print each path.

    Raises typer.Exit where that can't be done, having said why.
    """
    try:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    except OSError as error:
        Console(stderr=True, highlight=False).print(f"serving: {folder}: {error.strerror}", soft_wrap=True)
        raise typer.Exit(1) from None
    for name in files:
        typer.echo(str(folder / name))
