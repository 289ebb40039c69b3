"""Says what an export is at, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console

Say: TypeAlias = Callable[[str], None]


@contextmanager
def progress() -> Iterator[Say]:
    """Show a line that turns while work goes on; what is said replaces it."""
    with Console(stderr=True, force_jupyter=False).status("exporting") as status:
        yield status.update
