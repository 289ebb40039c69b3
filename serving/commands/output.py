"""What commands show: lines and tables for people, and one line with an exit status for what is refused."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from serving.access.principal import AccessInvalid
from serving.errors import InvalidRequest, ServingError
from serving.logs import visible


def tell(text: str, *, err: bool = False, style: str | None = None) -> None:
    """Print a line as it is, however long; what could steer a terminal is shown as escapes."""
    Console(stderr=err, highlight=False, markup=False).print(visible(text), style=style, soft_wrap=True)


def show(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    numbers: Collection[str] = (),
    whole: Collection[str] = (),
    styles: Iterable[str | None] = repeat(None),
) -> None:
    """Print a table. numbers: columns that stand to the right; whole: that do not wrap; styles: of each row."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for head in heads:
        table.add_column(
            visible(head),
            justify="right" if head in numbers else "left",
            no_wrap=head in whole,
            overflow="fold",
        )
    for row, style in zip(rows, styles, strict=False):
        table.add_row(*map(visible, row), style=style)
    Console(highlight=False, markup=False).print(table)


@contextmanager
def explained(undone: int = 1) -> Iterator[None]:
    """Turn what is refused into one line and an exit status: 2 for a bad request, else `undone`."""
    try:
        yield
    except (ServingError, AccessInvalid) as error:
        tell(f"serving: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, InvalidRequest | AccessInvalid) else undone) from None
    except OSError as error:
        if error.errno == errno.EPIPE:  # who reads the output has seen enough
            raise
        tell(f"serving: {error.filename or 'the output'}: {(error.strerror or str(error)).lower()}", err=True)
        raise typer.Exit(undone) from None
